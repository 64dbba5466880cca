"""Thirty minutes after an incident began, is the queue still too full?"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from airflow.sdk.bases.sensor import BaseSensorOperator
from airflow.sdk.exceptions import AirflowSkipException, TaskDeferred

from dlq_runbook.connections import connection
from dlq_runbook.drains import airflow_errors, attach
from dlq_runbook.triggers.threshold import PATIENCE_S, ThresholdTrigger

if TYPE_CHECKING:
    from airflow.sdk import Context


class WaitThreshold(BaseSensorOperator):
    """Wait, without a worker, until the drain is over or the incident is as old as ``slo.escalate_after``.

    Goes on to the escalation only if the queue is over its threshold then; else it is skipped, and says why.

    :param queue_name: The queue's name, the stem of its file.
    """

    ui_color = "#eef3f8"

    def __init__(self, *, queue_name: str, **kwargs: Any) -> None:
        # A triggerer that is down must neither hold the run for ever nor fail it.
        super().__init__(soft_fail=True, **kwargs)
        self.queue_name = queue_name

    def execute(self, context: Context) -> dict[str, Any]:
        from dlq.threshold import escalate_at, threshold_state

        with airflow_errors(), attach(self.queue_name, context) as drain:
            if drain.dry_run:
                raise AirflowSkipException("Dry run: nobody would be told before the clock")
            until = escalate_at(drain.config, drain.id)
            if until <= datetime.now(UTC):
                # Past its clock it answers at once: a trigger that fires at once can be lost.
                return self.execute_complete(context, threshold_state(drain.config, connection, drain.id))
        self.log.info("Escalates at %s UTC if the queue is over its threshold then", f"{until:%H:%M:%S}")
        raise TaskDeferred(
            trigger=ThresholdTrigger(queue_name=self.queue_name, drain=drain.id, until=until.isoformat()),
            method_name="execute_complete",
            timeout=until - datetime.now(UTC) + timedelta(seconds=2 * PATIENCE_S),
        )

    def execute_complete(self, context: Context, event: dict[str, Any]) -> dict[str, Any]:
        """Go on if the queue is over its threshold."""
        if not event["over"]:
            self.log.info("Nobody is told. %s", said(event))
            raise AirflowSkipException(said(event))
        self.log.warning("%s", said(event))
        return event


def said(event: dict[str, Any]) -> str:
    """Why the sensor ends, in a line."""
    if "error" in event:
        return f"Not known at the clock: {event['error']}"
    return event.get("said") or "The drain is over: its verdict says what is still open"
