"""How a queue stands, and what of it waits for what: read without the lease, changing nothing."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, and_, func, select

from dlq import expiry, held, slo
from dlq.config import QueueConfig
from dlq.drain import Drain, dry
from dlq.errors import DlqError
from dlq.ledger.schema import drain as drains
from dlq.ledger.schema import entry, grp, job, queue, work
from dlq.plan import READY
from dlq.ports import Connections
from dlq.redact import redact


def status(config: QueueConfig, connections: Connections) -> dict[str, Any]:
    """Depth, outstanding, ratio and what is unsettled; what can't be known now is None, and ``findings`` say why.

    :raises dlq.errors.DlqError: when the ledger can't be read.
    """
    findings: list[str] = []
    with dry(config, run_id="status", connections=connections) as look:
        with look.ledger.read() as tx:
            found = _ledgers(tx, config.name)
            saved = expiry.in_custody(tx, entry.c.queue == config.name, entry.c.settled_drain.is_(None))
        depth = workflows = queued = None
        try:
            depth = look.depth()
            queued = expiry.in_queue(look.source, look.positions()) if depth.entries else None
            workflows = slo.workflows(look)
        except DlqError as error:
            findings.append(str(error))
    outstanding = None if depth is None else depth.entries + found["unsettled"]
    return {
        "queue": config.name,
        "depth": None if depth is None else depth.entries,
        "depth_by_part": None if depth is None else {str(p): n for p, n in depth.by_part.items()},
        "unsettled": found["unsettled"],
        "outstanding": outstanding,
        "workflows": workflows,
        "ratio": outstanding / workflows if outstanding is not None and workflows else None,
        "slo": config.slo.ratio,
        "first_to_expire": {"in_queue": queued, "in_custody": saved},
        **{
            key: found[key]
            for key in ("open", "on_hold", "holder", "last_drain", "paused_by", "unfinished_jobs")
        },
        "findings": findings,
    }


def _ledgers(tx: Connection, name: str) -> dict[str, Any]:
    lease = tx.execute(select(queue).where(queue.c.name == name)).mappings().first()
    holder = None
    if lease is not None and lease["holder"] is not None:
        row = tx.execute(
            select(drains.c.kind, drains.c.phase, drains.c.opened_at).where(drains.c.id == lease["holder"])
        ).first()
        holder = {
            "drain": lease["holder"],
            "until": lease["lease_until"],
            "kind": row.kind if row else None,
            "phase": row.phase if row else None,
            "opened_at": row.opened_at if row else None,
        }
    last = (
        tx.execute(
            select(drains.c.id, drains.c.kind, drains.c.opened_at, drains.c.closed_at, drains.c.verdict)
            .where(drains.c.queue == name)
            .order_by(drains.c.epoch.desc())
            .limit(1)
        )
        .mappings()
        .first()
    )
    owner = func.coalesce(work.c.owner, entry.c.owner, grp.c.owner)
    rows = tx.execute(
        select(
            entry.c.state,
            entry.c.reason,
            owner.label("owner"),
            func.count().label("entries"),
            func.min(entry.c.expires_at).label("dies_first"),
        )
        .select_from(entry)
        .join(grp, grp.c.id == entry.c.grp)
        .outerjoin(work, work.c.id == entry.c.work)
        .where(entry.c.queue == name, entry.c.settled_drain.is_(None))
        .group_by(entry.c.state, entry.c.reason, owner)
        .order_by(func.count().desc(), entry.c.reason)
    ).mappings()
    still = [dict(row) for row in rows]
    jobs = tx.execute(
        select(job.c.id, job.c.kind, job.c.target, job.c.state, job.c.cursor, job.c.size)
        .where(job.c.queue == name, job.c.state.in_(("approved", "running")))
        .order_by(job.c.id)
    ).mappings()
    return {
        "unsettled": sum(int(row["entries"]) for row in still),
        "open": still,
        "on_hold": held.standing(tx, name),
        "holder": holder,
        "last_drain": None if last is None else dict(last),
        "paused_by": None if lease is None else lease["paused_by"],
        "unfinished_jobs": [dict(row) for row in jobs],
    }


def waiting(look: Drain, groups: tuple[int, ...] = ()) -> list[dict[str, Any]]:
    """What is unsettled by group, target, and why it is not replayed; ``reason`` in ``plan.READY`` is what would be."""
    wanted = [entry.c.queue == look.queue, entry.c.settled_drain.is_(None)]
    if groups:
        wanted.append(entry.c.grp.in_(groups))
    with look.ledger.read() as tx:
        rows = tx.execute(
            select(
                grp.c.id.label("group"),
                grp.c.error_type,
                grp.c.component,
                grp.c.category,
                grp.c.remedy,
                grp.c.signature,
                entry.c.state,
                entry.c.reason,
                entry.c.target,
                func.coalesce(entry.c.owner, grp.c.owner).label("owner"),
                func.count().label("entries"),
            )
            .join(grp, grp.c.id == entry.c.grp)
            .where(and_(*wanted))
            .group_by(
                grp.c.id,
                grp.c.error_type,
                grp.c.component,
                grp.c.category,
                grp.c.remedy,
                grp.c.signature,
                entry.c.state,
                entry.c.reason,
                entry.c.target,
                func.coalesce(entry.c.owner, grp.c.owner),
            )
            .order_by(func.count().desc(), grp.c.id)
        ).mappings()
        found = [{**row, "signature": redact(row["signature"])} for row in rows]
    return sorted(found, key=lambda row: row["reason"] not in READY)
