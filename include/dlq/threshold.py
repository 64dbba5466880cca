"""The runbook's threshold: more than 1 % after 30 minutes goes to the engineering lead."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import select

from dlq import clock, slo
from dlq.config import QueueConfig
from dlq.drain import Drain
from dlq.errors import DlqError
from dlq.ledger import Ledger
from dlq.ledger.schema import drain as drains
from dlq.ledger.schema import incident
from dlq.notify import notify
from dlq.ports import Connections

OVER_PHASES = ("restore_routing", "verify", "closed")
"""Once a drain has come to these, there is nothing to wait for."""


def escalate_at(config: QueueConfig, drain_id: str) -> datetime:
    """The moment, by the incident's start, after which a bad ratio is the engineering lead's."""
    ledger = Ledger.open(config.ledger)
    try:
        with ledger.read() as tx:
            started = (
                tx.execute(
                    select(incident.c.started_at)
                    .join(drains, drains.c.incident == incident.c.id)
                    .where(drains.c.id == drain_id)
                ).scalar()
                or clock.now()
            )
    finally:
        ledger.close()
    return datetime.fromisoformat(started) + timedelta(seconds=config.slo.escalate_after)


def threshold_state(config: QueueConfig, connections: Connections, drain_id: str) -> dict[str, Any]:
    """Where the drain is and how bad it is; reads only, needs no lease."""
    ledger = Ledger.open(config.ledger)
    with Drain(drain_id, config, ledger, connections, epoch=-1, dry_run=True) as look:
        with ledger.read() as tx:
            row = tx.execute(
                select(drains.c.phase, drains.c.closed_at).where(drains.c.id == drain_id)
            ).first()
        phase = "closed" if row is None or row.closed_at is not None else str(row.phase)
        if phase in OVER_PHASES:
            return {"phase": phase, "over": False, "ratio": None, "outstanding": None}
        now = slo.standing(look)
        over = None if now.ratio is None else now.ratio > config.slo.escalate
        return {
            "phase": phase,
            "over": over,
            "ratio": now.ratio,
            "outstanding": now.outstanding,
            "said": str(now),
        }


def escalate(drain: Drain) -> dict[str, Any]:
    """Call the engineering lead. Never raises: a failed call is written down, in red."""
    try:
        now = str(slo.standing(drain))
    except DlqError as error:
        now = f"the queue can't be looked at: {error}"
    delivered, how = notify(
        drain,
        f"DLQ {drain.queue}: over {drain.config.slo.escalate:.1%} after {drain.config.slo.escalate_after / 60:.0f} min",
        f"Drain {drain.id}: {now}.",
    )
    drain.note("escalate", f"{now}. {how}", level="warning" if delivered else "error", delivered=delivered)
    return {"delivered": delivered, "said": how}
