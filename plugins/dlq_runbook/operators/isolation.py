"""Holding new failures while the queue is drained, and letting them go again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dlq_runbook.operators.base import DlqOperator

if TYPE_CHECKING:
    from airflow.sdk import Context

    from dlq.drain import Drain


class Isolate(DlqOperator):
    """Pause automatic dead-lettering under a lease that ends by itself.

    Always succeeds: a skipped or failed setup would take its whole scope with it.
    """

    isolated = False

    def stage(self, drain: Drain, context: Context) -> dict[str, Any]:
        from dlq.routing import isolate

        return isolate(drain, self.timeout_s)


class RestoreRouting(DlqOperator):
    """Let failures reach the queue again, whatever happened before."""

    isolated = False

    def stage(self, drain: Drain, context: Context) -> dict[str, Any]:
        from dlq.routing import restore_routing

        return restore_routing(drain)
