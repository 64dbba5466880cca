"""Duplicates: equal payload and the same source identity or dedupe key; settled only after the twin was sent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Column, ColumnElement, Connection, and_, func, literal, or_, select, true, update

from dlq.ledger.schema import entry

_SENT = ("replayed", "confirmed", "returned")
_GONE = ("discarded", "handed_back")
_PAGE = 1_000
_TWIN, _OTHER = entry.alias("twin"), entry.alias("other")


def mark(tx: Connection, queue: str) -> tuple[int, int]:
    """Among new entries: mark what is a twin of an earlier one, and what only claims to be. Returns (twins, conflicts).

    A return is asked for first: one that came back is no twin of what it was, only of another return of the same; and
    it is that whatever else it says, for one replay that two groups dead-letter must not become two of each. The
    twin of what a person discarded, or handed back, is a person's to decide on: never dropped, never replayed unasked.
    """
    twins = conflicts = last = 0
    for identity in (entry.c.return_of, entry.c.dedupe_key, entry.c.origin):
        while page := _claims(tx, queue, identity, last):
            for claim in page:
                other = _earlier(tx, queue, identity, claim)
                if other is None:
                    continue
                values: dict[str, Any] = {"duplicate_of": other.id, "reason": "twin_not_sent"}
                if other.payload_sha != claim.payload_sha:
                    values = {"reason": "conflict"}
                    conflicts += 1
                elif other.state in _GONE:
                    values = {"reason": f"twin_{other.state}"}
                else:
                    twins += 1
                tx.execute(update(entry).where(entry.c.id == claim.id).values(**values))
            last = page[-1].id
        last = 0
    _shorten(tx, queue)
    return twins, conflicts


def _claims(tx: Connection, queue: str, identity: Column[str], after: int) -> Sequence[Any]:
    """The next new entries of which an earlier one has the same identity."""
    fresh = and_(
        entry.c.queue == queue,
        entry.c.state == "open",
        entry.c.reason.in_(("new", "returned", "first_intake")),
        entry.c.duplicate_of.is_(None),
    )
    known = select(_TWIN.c.id).where(
        _TWIN.c[identity.key] == identity,
        _may_be_twin(_TWIN.c, queue),
        _TWIN.c.id < entry.c.id,
        or_(
            and_(_TWIN.c.return_of == entry.c.return_of, _TWIN.c.target.is_not_distinct_from(entry.c.target)),
            and_(_TWIN.c.return_of.is_(None), entry.c.return_of.is_(None)),
        ),
    )
    return tx.execute(
        select(entry.c.id, entry.c.payload_sha, entry.c.return_of, entry.c.target, identity.label("identity"))
        .where(fresh, entry.c.id > after, known.exists())
        .order_by(entry.c.id)
        .limit(_PAGE)
    ).all()


def _earlier(tx: Connection, queue: str, identity: Column[str], claim: Any) -> Any:
    """The first entry of the claim's identity, one that may yet be sent before one that never will."""
    return tx.execute(
        select(entry.c.id, entry.c.payload_sha, entry.c.state)
        .where(
            identity == claim.identity,
            _may_be_twin(entry.c, queue),
            entry.c.id < claim.id,
            entry.c.return_of.is_not_distinct_from(claim.return_of),
            true() if claim.return_of is None else entry.c.target.is_not_distinct_from(claim.target),
        )
        .order_by(entry.c.state.in_(_GONE), entry.c.id)
        .limit(1)
    ).first()


def _may_be_twin(columns: Any, queue: str) -> ColumnElement[bool]:
    return and_(columns.queue == queue, columns.duplicate_of.is_(None), columns.reason != "conflict")


def _shorten(tx: Connection, queue: str) -> None:
    """Point the twin of a twin at the first of them: the one between is never sent."""
    first = select(_TWIN.c.duplicate_of).where(_TWIN.c.id == entry.c.duplicate_of).scalar_subquery()
    while tx.execute(
        update(entry)
        .where(
            entry.c.queue == queue,
            entry.c.state == "open",
            entry.c.duplicate_of.is_not(None),
            first.is_not(None),
        )
        .values(duplicate_of=first)
    ).rowcount:
        pass


def settle(tx: Connection, queue: str, drain: str) -> int:
    """Settle the twins of what was sent. Where one will never be sent, the first of its twins takes its place and waits
    for a person. Returns how many were settled."""
    pairs = (
        select(entry.c.id)
        .join(_TWIN, _TWIN.c.id == entry.c.duplicate_of)
        .where(entry.c.queue == queue, entry.c.state == "open", entry.c.duplicate_of.is_not(None))
    )
    done = tx.execute(
        update(entry)
        .where(
            entry.c.id.in_(pairs.where(_TWIN.c.state.in_(_SENT), _TWIN.c.payload_sha == entry.c.payload_sha))
        )
        .values(state="duplicate", settled_drain=drain, reason="its twin was sent")
    )
    orphans = entry.c.id.in_(pairs.where(_TWIN.c.state.in_(_GONE)))
    heir = (
        select(func.min(_OTHER.c.id))
        .where(_OTHER.c.duplicate_of == entry.c.duplicate_of, _OTHER.c.state == "open")
        .scalar_subquery()
    )
    tx.execute(update(entry).where(orphans, entry.c.id != heir).values(duplicate_of=heir))
    fate = (
        select(literal("twin_") + _TWIN.c.state).where(_TWIN.c.id == entry.c.duplicate_of).scalar_subquery()
    )
    tx.execute(update(entry).where(orphans).values(duplicate_of=None, reason=fate))
    return int(done.rowcount)
