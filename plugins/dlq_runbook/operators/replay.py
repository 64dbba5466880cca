"""Sending entries again, at the pace their outcomes allow."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dlq_runbook.forms import one_line
from dlq_runbook.operators.base import DlqOperator

if TYPE_CHECKING:
    from airflow.sdk import Context

    from dlq.drain import Drain


class _Replaying(DlqOperator):
    def say_plan(self, result: dict[str, Any]) -> None:
        """Of a dry run: what would be sent."""
        for one in result.get("would", []):
            what = one_line(f"{one['error_type']} in {one['component']}")
            self.log.info("Would replay %s of %s to %s", one["entries"], what, one["target"])


class ReplayCanary(_Replaying):
    """Plan the replay, send a few entries, and wait for their outcome.

    Returns the jobs still to run, for :class:`ReplayBatches` to be mapped over; an empty list skips it.
    """

    def stage(self, drain: Drain, context: Context) -> list[str]:
        from dlq.replay import replay_canary

        canary = replay_canary(drain, self.task_id, self.deadline_s(drain, context), progress=self.progress)
        context["ti"].xcom_push(key="canary", value=canary)
        self.say_plan(canary)
        return list(canary["jobs"])


class ReplayBatches(DlqOperator):
    """Send a job's entries in growing batches, each after the outcome of the one before.

    :param job: The job's id.
    """

    def __init__(self, *, job: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.job = job

    def stage(self, drain: Drain, context: Context) -> dict[str, Any]:
        from dlq.replay import replay_batches

        return replay_batches(drain, self.job, self.deadline_s(drain, context), progress=self.progress)


class DrainRemaining(_Replaying):
    """Replay what waited for a fix, then take and replay in rounds until the queue is empty or time is up."""

    def stage(self, drain: Drain, context: Context) -> dict[str, Any]:
        from dlq.replay import drain_remaining

        drained = drain_remaining(drain, self.deadline_s(drain, context), progress=self.progress)
        self.say_plan(drained)
        return drained
