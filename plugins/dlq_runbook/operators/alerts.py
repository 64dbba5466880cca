"""What is said to the people who watch: the alert is acknowledged, the engineering lead is told."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow.sdk.exceptions import AirflowFailException

from dlq.errors import DlqError
from dlq_runbook.operators.base import DlqOperator

if TYPE_CHECKING:
    from airflow.sdk import Context

    from dlq.drain import Drain


class AcknowledgeAlert(DlqOperator):
    """Silence exactly this queue's alerts while it is drained. A failure is said, and stops nothing."""

    isolated = False

    def stage(self, drain: Drain, context: Context) -> dict[str, Any]:
        from dlq.alerts import acknowledge_alert

        return acknowledge_alert(drain)


class Escalate(DlqOperator):
    """Tell the engineering lead that the queue is still over its threshold.

    Never fails: whether a message arrived is no reason to call a drain unproven.
    """

    isolated = False

    def stage(self, drain: Drain, context: Context) -> dict[str, Any]:
        from dlq.threshold import escalate

        return escalate(drain)

    def execute(self, context: Context) -> dict[str, Any]:
        try:
            result = super().execute(context)
        except (DlqError, AirflowFailException) as error:
            result = {"delivered": False, "said": str(error)}
        if not result["delivered"]:
            self.log.error("NOT DELIVERED: %s. Tell the engineering lead yourself", result["said"])
        return result
