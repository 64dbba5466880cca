"""Duplicates: equal payload and the same source identity or explicit dedupe key; settled only after the twin was sent."""

from __future__ import annotations

from sqlalchemy import ColumnElement, Connection, and_, func, or_, select, update

from dlq.ledger.schema import entry

_SENT = ("replayed", "confirmed", "returned")


def mark(tx: Connection, queue: str) -> tuple[int, int]:
    """Among new entries: mark what is a twin of an earlier one, and what only claims to be. Returns (twins, conflicts).

    A return is asked for first: one that came back is no twin of what it was, only of another return of the same.
    """
    twins = conflicts = 0
    twin = entry.alias("twin")
    for same in (twin.c.dedupe_key == entry.c.dedupe_key, twin.c.origin == entry.c.origin):
        first = (
            select(func.min(twin.c.id))
            .where(
                same,
                twin.c.queue == queue,
                twin.c.id < entry.c.id,
                twin.c.duplicate_of.is_(None),
                twin.c.reason != "conflict",
                or_(
                    twin.c.return_of == entry.c.return_of,
                    and_(twin.c.return_of.is_(None), entry.c.return_of.is_(None)),
                ),
            )
            .scalar_subquery()
        )
        candidates = tx.execute(
            select(entry.c.id, entry.c.payload_sha, first.label("twin")).where(
                _fresh(queue), first.is_not(None)
            )
        ).all()
        for row in candidates:
            other = tx.execute(select(entry.c.payload_sha, entry.c.state).where(entry.c.id == row.twin)).one()
            if other.payload_sha == row.payload_sha:
                tx.execute(
                    update(entry)
                    .where(entry.c.id == row.id)
                    .values(duplicate_of=row.twin, reason="twin_not_sent")
                )
                twins += 1
            else:
                tx.execute(update(entry).where(entry.c.id == row.id).values(reason="conflict"))
                conflicts += 1
    return twins, conflicts


def _fresh(queue: str) -> ColumnElement[bool]:
    return and_(
        entry.c.queue == queue,
        entry.c.state == "open",
        entry.c.reason.in_(("new", "returned", "first_intake")),
        entry.c.duplicate_of.is_(None),
    )


def settle(tx: Connection, queue: str, drain: str) -> int:
    """Settle the twins of what was sent; free those whose twin will never be. Returns how many were settled."""
    twin = entry.alias("twin")
    pairs = (
        select(entry.c.id)
        .join(twin, twin.c.id == entry.c.duplicate_of)
        .where(entry.c.queue == queue, entry.c.state == "open")
    )
    done = tx.execute(
        update(entry)
        .where(
            entry.c.id.in_(pairs.where(twin.c.state.in_(_SENT), twin.c.payload_sha == entry.c.payload_sha))
        )
        .values(state="duplicate", settled_drain=drain, reason="its twin was sent")
    )
    gone = pairs.where(twin.c.state.in_(("discarded", "handed_back")))
    tx.execute(update(entry).where(entry.c.id.in_(gone)).values(duplicate_of=None, reason="new"))
    return int(done.rowcount)
