"""What retention deletes first: of what still lies in the queue, and what custody has saved from it."""

from __future__ import annotations

from collections.abc import Mapping

from sqlalchemy import ColumnElement, Connection, func, select

from dlq import clock
from dlq.entry import Record
from dlq.errors import SourceError
from dlq.ledger.schema import entry
from dlq.ports import Source
from dlq.sample import oldest

_PARTITIONS = 50
_DEADLINE_S = 5.0


def of(record: Record, kept_ms: int | None) -> str | None:
    """From when on retention may delete a record; None where nobody knows."""
    return clock.minute_of(record.timestamp_ms + kept_ms) if kept_ms and record.timestamp_ms else None


def in_queue(source: Source, positions: Mapping[int, int]) -> str | None:
    """When the first of what is not in custody yet may be deleted, by the heads of the partitions.

    None where nothing is left, or it is not known: a queue that can't be read says nothing, and one without a log isn't
    looked at, since a receive counts.
    """
    kept_ms = source.retention_ms() if source.has_log else None
    if kept_ms is None:
        return None
    try:
        heads = oldest(source, positions, _PARTITIONS, _DEADLINE_S)
    except SourceError:
        return None
    return min((at for record in heads if (at := of(record, kept_ms))), default=None)


def in_custody(tx: Connection, *entries: ColumnElement[bool]) -> str | None:
    """When the first of these entries would have been deleted from the queue."""
    return tx.execute(select(func.min(entry.c.expires_at)).where(*entries)).scalar()


def said(queued: str | None, saved: str | None) -> str:
    """Both in words, empty where neither is known. Truly: nothing that is in custody expires."""
    words = []
    if queued:
        words.append(f"first to expire in the queue: {queued}, unless it is taken before")
    if saved:
        words.append(f"in custody nothing expires; the first of it to expire in the queue: {saved}")
    return "; ".join(words)
