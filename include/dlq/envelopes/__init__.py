"""Envelope formats: how a producer wrote the failure onto a dead letter, chosen by what each carries."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from typing import Protocol

from dlq.entry import Record, Understood
from dlq.envelopes import ids, orchestrator, unknown
from dlq.memo import Memo

__all__ = ["Format", "decode", "survives"]


class Format(Protocol):
    """One convention. ``headers`` holds the last value of each name."""

    @property
    def name(self) -> str: ...

    def recognises(self, names: AbstractSet[str], /) -> bool: ...

    def read(self, headers: Mapping[str, bytes | None], /) -> Understood: ...


_FORMATS: tuple[Format, ...] = (orchestrator, unknown)


def _shape(names: tuple[str, ...]) -> tuple[Format, ids.Where]:
    present = frozenset(names)
    return next(f for f in _FORMATS if f.recognises(present)), ids.where(names)


# One producer's records carry the same names in the same order: what follows from names is worked out once.
_shapes: Memo[tuple[str, ...], tuple[Format, ids.Where]] = Memo(
    _shape, 1024, lambda names: sum(map(len, names)) <= 4096
)


def decode(record: Record) -> Understood:
    """What ``record`` says of its failure, origin and ids. Never raises: a broken header costs its field."""
    headers = dict(record.headers)
    found, at = _shapes[tuple(headers)]
    understood = found.read(headers)
    ids.read(headers, at, understood)
    return understood


_FAILURE_PREFIXES = ("wf-", "dlq-")


def survives(name: str) -> bool:
    """Whether a record keeps the header on its replay: those of earlier hops' failures and replays go, or it would grow
    with every hop."""
    return not name.startswith(_FAILURE_PREFIXES)
