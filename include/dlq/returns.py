"""The history of a failure that came back: the entry it first was, each replay, and each dead letter of one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sqlalchemy import ColumnElement, Connection, select

from dlq.ledger.custody import batched
from dlq.ledger.schema import delivery, entry, job_entry, source

_MOST = 1_000  # entries of one family; two groups that dead-letter each replay double it each time
_IN = 500


def families(tx: Connection, numbers: Iterable[int]) -> dict[int, list[dict[str, Any]]]:
    """By entry, what it came back of, oldest first, itself last."""
    known: dict[int, dict[str, Any]] = {}
    wanted = set(numbers)
    asked = sorted(wanted)
    while wanted:
        found = _hops(tx, entry.c.id, wanted)
        known.update(found)
        wanted = {hop["return_of"] for hop in found.values()} - known.keys() - {None}
    chains = {}
    for number in asked:
        chain: list[dict[str, Any]] = []
        at: int | None = number
        while at is not None and at in known and len(chain) < len(known):  # a ring ends, too
            chain.insert(0, known[at])
            at = known[at]["return_of"]
        chains[number] = chain
    return chains


def family(tx: Connection, number: int) -> list[dict[str, Any]]:
    """All that an entry came back of and as, and their other returns, in the order they were taken."""
    chain = families(tx, [number])[number]
    known = {hop["id"]: hop for hop in chain}
    wanted = set(known)
    while wanted and len(known) < _MOST:
        found = _hops(tx, entry.c.return_of, wanted)
        wanted = found.keys() - known.keys()
        known.update(found)
    return [known[each] for each in sorted(known)]


def _hops(tx: Connection, column: ColumnElement[Any], numbers: Iterable[int]) -> dict[int, dict[str, Any]]:
    """Entries, each with when and in which job it was sent last (None: never)."""
    found = {}
    for some in batched(sorted(numbers), _IN):
        rows = tx.execute(
            select(
                entry.c.id,
                source.c.uri.label("source"),
                *(entry.c[name] for name in ("part", "place", "state", "reason", "attempts", "failed_at")),
                entry.c.job,
                entry.c.return_of,
                entry.c.duplicate_of,
                delivery.c.sent_at,
            )
            .join(source, source.c.id == entry.c.source)
            .outerjoin(job_entry, (job_entry.c.job == entry.c.job) & (job_entry.c.entry == entry.c.id))
            .outerjoin(
                delivery, (delivery.c.job == entry.c.job) & (delivery.c.ordinal == job_entry.c.ordinal)
            )
            .where(column.in_(some))
        ).mappings()
        found.update({int(row["id"]): dict(row) for row in rows})
    return found
