"""What a replayed SQS message says of itself: one attribute of ours, since it takes ten and the producer's come first.
(Kafka records have ``dlq-…`` headers.)
"""

from __future__ import annotations

from typing import Annotated

import msgspec

NAME = "dlq"


class Mark(msgspec.Struct):
    """The attribute's compact JSON; of a message that comes in it is a claim, and the ledger decides.

    ``key`` is the idempotency key, ``retry`` how often the entry was replayed with this one, ``ts`` the original's
    time in epoch ms.
    """

    drain: str
    job: str
    ordinal: Annotated[int, msgspec.Meta(ge=0, lt=10**17)]
    entry: str
    key: str
    retry: Annotated[int, msgspec.Meta(ge=0, le=1_000_000)]
    ts: int = 0


def read(value: bytes) -> Mark | None:
    """The mark, or None where it is none."""
    try:
        return msgspec.json.decode(value, type=Mark)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def written(mark: Mark) -> str:
    return msgspec.json.encode(mark).decode()
