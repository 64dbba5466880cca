"""The runbook's stages in their order, at a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

import click

from dlq import conservation, flows, intake, limits, replay, triage, verdict
from dlq import plan as planning
from dlq.cli import terminal
from dlq.drain import Drain
from dlq.errors import Refused
from dlq.hold import Hold
from dlq.ledger.jobs import record_decision
from dlq.ledger.schema import entry
from dlq.telemetry import stage

STAGE = "retry_transient"


def drain_at_terminal(
    held: Hold, groups: Sequence[int], deadline_s: float, *, approve_dr: bool, who: str
) -> dict[str, Any]:
    """Take, look, replay, prove, and give the verdict, within ``deadline_s``.

    :raises Refused: when nothing may be replayed before a person said so.
    """
    drain = held.drain
    deadline = time.monotonic() + deadline_s

    def left() -> float:
        return max(1.0, deadline - time.monotonic())

    with stage("open_drain") as span:
        span.of(drain.queue, drain.id, dry_run=drain.dry_run)
        flows.baseline(drain)
    with terminal.progress("taking into custody") as progress, stage("take_custody") as span:
        span.came_to(intake.take_custody(drain, left(), progress))
    if limits.guard_data_loss(drain)["next"] == "invoke_dr_plan":
        limits.invoke_dr_plan(drain)
        _go_on(drain, approve_dr=approve_dr, who=who)
    triage.categorize(drain)
    triage.find_root_cause(drain)
    with terminal.progress("replaying") as progress, stage(STAGE):
        if groups:
            _replay_groups(drain, groups, deadline, who, progress)
        else:
            canary = replay.replay_canary(drain, STAGE, left(), progress)
            for job in canary["jobs"]:
                replay.replay_batches(drain, job, left(), progress)
            replay.drain_remaining(drain, left(), progress)
    with stage("verify_conservation"):
        conservation.verify_conservation(drain)
    with stage("verify_golden_flows") as span:
        span.came_to(flows.verify_golden_flows(drain))
    said = verdict.close_drain(drain)
    held.verdict = None  # written down, and the queue is free
    return said


def _replay_groups(drain: Drain, groups: Sequence[int], deadline: float, who: str, progress: Any) -> None:
    """Only these groups, and of them only what a replay may take without asking; a person chose them."""
    condition = planning.ready(drain) & entry.c.grp.in_(groups)
    named = ", ".join(str(group) for group in sorted(groups))
    ran = replay.replay_now(
        drain, STAGE, condition, who=who, saw=f"group(s) {named}", deadline=deadline, progress=progress
    )
    for one in ran:
        drain.note(STAGE, str(one), level="info" if one.ended == "done" else "warning", **one.data())
    if not ran:
        drain.note(
            STAGE, f"nothing of group(s) {named} is ready to be replayed; `dlq plan {drain.queue}` says why"
        )


def _go_on(drain: Drain, *, approve_dr: bool, who: str) -> None:
    """Past ``limits.dr`` the archive has been read back; whether to go on is the policy's, or a person's, to say."""
    if drain.config.approval.dr == "policy":
        who, said = f"policy:{drain.queue}.yaml@{drain.config.sha}", "policy"
    elif approve_dr:
        said = "--approve-dr"
    elif sys.stdin.isatty() and click.confirm(
        "The archive is verified. Replay although more than limits.dr is outstanding?", err=True
    ):
        said = "at the terminal"
    else:
        raise Refused(
            f"queue {drain.queue}: more than limits.dr is outstanding and approval.dr is person. It is all in custody, "
            "nothing was replayed; run it again with --approve-dr once you have looked"
        )
    with drain.ledger.write(drain.queue, drain.epoch) as tx:
        saw = "the archive was read back in full"
        decision = record_decision(tx, drain.queue, who, "approve_dr", drain.id, saw, "Approve", drain.id)
    drain.note("approve_dr", f"going on, by {who} ({said})", choice="Approve", decision=decision)
