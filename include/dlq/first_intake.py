"""What a queue's first intake found: old letters, maybe dealt with by hand; they wait until a person frees them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, and_, func, select, update

from dlq.drain import Drain
from dlq.ledger.jobs import record_decision
from dlq.ledger.schema import entry, grp
from dlq.triage import assign

REASON = "first_intake"


def waiting(tx: Connection, queue: str, groups: Sequence[int] = ()) -> list[dict[str, Any]]:
    """What waits, by group."""
    rows = tx.execute(
        select(
            grp.c.id.label("group"),
            grp.c.error_type,
            grp.c.component,
            grp.c.category,
            grp.c.remedy,
            func.count().label("entries"),
        )
        .join(entry, entry.c.grp == grp.c.id)
        .where(_condition(queue, groups))
        .group_by(grp.c.id, grp.c.error_type, grp.c.component, grp.c.category, grp.c.remedy)
        .order_by(func.count().desc(), grp.c.id)
    ).mappings()
    return [dict(row) for row in rows]


def free(drain: Drain, groups: Sequence[int], *, who: str) -> list[dict[str, Any]]:
    """Free what waits, by a decision for each group; nothing is sent, the next drain goes by each group's remedy."""
    with drain.ledger.write(drain.queue, drain.epoch) as tx:
        freed = waiting(tx, drain.queue, groups)
        for each in freed:
            saw = f"{each['entries']} x {each['error_type']} in {each['component']}"
            record_decision(tx, drain.queue, who, REASON, f"group {each['group']}", saw, "free", drain.id)
        tx.execute(update(entry).where(_condition(drain.queue, groups)).values(reason="new"))
    assign(drain)
    total = sum(each["entries"] for each in freed)
    drain.note(REASON, f"{total} entries of the first intake are free, by {who}", freed=total)
    return freed


def _condition(queue: str, groups: Sequence[int]) -> Any:
    ours = and_(entry.c.queue == queue, entry.c.state == "open", entry.c.reason == REASON)
    return and_(ours, entry.c.grp.in_(groups)) if groups else ours
