"""Entries in doubt, and the person who says what became of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from sqlalchemy import ColumnElement, Connection, and_, case, func, insert, literal, select, update

from dlq import clock
from dlq.drain import Drain
from dlq.entry import FLAWS
from dlq.errors import Refused
from dlq.ledger.jobs import forget_sends, record_decision
from dlq.ledger.schema import entry, job, plan, source
from dlq.selection import Selection

Fate = Literal["open", "replayed", "discarded"]


def resolve(drain: Drain, chosen: Selection, fate: Fate, *, who: str, why: str) -> int:
    """Settle or free what is in doubt among ``chosen``, by a person's word; returns how many.

    ``open``: it was not sent, the next drain looks at it as at a new one. ``replayed``: it was sent; its outcome stays
    unknown. ``discarded``: nobody needs it any more.

    :raises Refused: when none of the chosen is in doubt.
    """
    with drain.ledger.write(drain.queue, drain.epoch) as tx:
        doubtful = and_(chosen.condition(tx, drain.queue), entry.c.state == "ambiguous")
        rows = tx.execute(select(entry.c.grp, func.count()).where(doubtful).group_by(entry.c.grp)).all()
        counts = [(int(group), int(n)) for group, n in rows]
        total = sum(n for _, n in counts)
        if not total:
            raise Refused(
                f"queue {drain.queue}: none of these entries is in doubt (state ambiguous); "
                f"`dlq status {drain.queue}` counts them"
            )
        for subject, n in _subjects(tx, doubtful, counts):
            decision = record_decision(
                tx, drain.queue, who, f"resolve:{fate}", subject, f"{n} in doubt", f"{fate}: {why}", drain.id
            )
        if fate == "open":
            reason = case(
                (entry.c.reason.in_(FLAWS), entry.c.reason),
                (entry.c.duplicate_of.is_not(None), literal("twin_not_sent")),
                else_=literal("new"),
            )
            forget_sends(tx, doubtful)
            tx.execute(update(entry).where(doubtful).values(state="open", reason=reason, job=None))
        elif fate == "discarded":
            tx.execute(
                update(entry)
                .where(doubtful)
                .values(state="discarded", settled_drain=drain.id, reason=f"discarded by decision {decision}")
            )
        else:
            _replayed(tx, drain, doubtful, decision)
    drain.note("resolve", f"{total} in doubt are {fate} now, by {who}", level="warning", resolved=total)
    return total


def _subjects(
    tx: Connection, doubtful: ColumnElement[bool], counts: Sequence[tuple[int, int]]
) -> list[tuple[str, int]]:
    """One decision on a single entry names it, on more each of their groups."""
    if sum(n for _, n in counts) > 1:
        return [(f"group {group}", n) for group, n in counts]
    one = tx.execute(
        select(source.c.uri, entry.c.part, entry.c.place)
        .join(source, source.c.id == entry.c.source)
        .where(doubtful)
    ).one()
    return [(f"entry {one.uri}/{one.part}/{one.place}", 1)]


def _replayed(tx: Connection, drain: Drain, doubtful: ColumnElement[bool], decision: int) -> None:
    """Settle as sent. What no job of this ledger sent gets one without lines: whoever sent it is not known here."""
    ours = and_(doubtful, entry.c.job.is_(None))
    target = func.coalesce(entry.c.target, drain.config.target.allow[0])
    topics = [str(t) for t in tx.execute(select(target).where(ours).distinct()).scalars()]
    now = clock.now()
    made = f"{drain.id}.said{decision}"
    if topics:
        tx.execute(
            insert(plan).values(
                id=made,
                queue=drain.queue,
                drain=drain.id,
                stage="resolve",
                hash=f"said:{decision}",
                proposed_at=now,
                expires_at=now,
                decision=decision,
                approved_at=now,
            )
        )
    for number, topic in enumerate(topics, 1):
        tx.execute(
            insert(job).values(
                id=f"{made}.{number}",
                queue=drain.queue,
                plan=made,
                drain=drain.id,
                kind="replay",
                target=topic,
                size=0,
                state="closed",
                ended="said to be sent",
            )
        )
        tx.execute(update(entry).where(ours, target == topic).values(job=f"{made}.{number}"))
    tx.execute(
        update(entry)
        .where(doubtful)
        .values(state="replayed", settled_drain=drain.id, reason=f"said to be sent, by decision {decision}")
    )
