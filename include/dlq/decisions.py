"""Decisions of people and of policy: append-only, and the only writes that need no lease."""

from __future__ import annotations

from dlq.drain import Drain
from dlq.ledger.jobs import record_decision


def record(drain: Drain, queue: str, *, who: str, kind: str, subject: str, saw: str, choice: str) -> int:
    """Write down who decided what of which subject, and what they saw; returns the decision's number."""
    with drain.ledger.write(queue, None) as tx:
        return record_decision(
            tx, queue, who, kind, subject, saw, choice, None if drain.dry_run else drain.id
        )
