"""A dead letter as a decoder sees it."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from typing import Protocol, runtime_checkable

import msgspec

from dlq.entry import Record, Understood


class Letter(msgspec.Struct, gc=False):
    """A record and its headers by name. Where one is repeated, ``first`` has its first value and ``last`` its last:
    which of them is right differs from producer to producer.
    """

    record: Record
    first: Mapping[str, bytes | None]
    last: Mapping[str, bytes | None]


@runtime_checkable
class Format(Protocol):
    """One convention by which producers write a failure onto a dead letter.

    A queue's file may name classes of your own under ``formats``; each is made without arguments and asked before the
    shipped ones.
    """

    @property
    def name(self) -> str:
        """What ``Understood.format`` says."""
        ...

    def recognises(self, names: AbstractSet[str], /) -> bool:
        """Whether headers of these names can be this convention's. Asked once for each set of names."""
        ...

    def read(self, letter: Letter, /) -> Understood | None:
        """What the letter says; None where it is none of this convention's after all. Must not raise: a broken header
        costs its field.
        """
        ...

    def owns(self, name: str, /) -> bool:
        """Whether a header of this name tells of the failure: it is then not part of a replay."""
        ...
