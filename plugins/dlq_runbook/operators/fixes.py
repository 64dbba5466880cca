"""Fixing what a retry can't heal: a plugin's quota, within bounds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dlq_runbook.operators.base import DlqOperator

if TYPE_CHECKING:
    from airflow.sdk import Context

    from dlq.drain import Drain


class ProposeFix(DlqOperator):
    """Work out which limits to raise and how far, and change nothing."""

    def stage(self, drain: Drain, context: Context) -> dict[str, Any]:
        from dlq.fixes import propose_fix

        return propose_fix(drain)


class ApplyFix(DlqOperator):
    """Make the change that was approved, and no other."""

    def stage(self, drain: Drain, context: Context) -> dict[str, Any]:
        from dlq.fixes import apply_fix

        approved = context["ti"].xcom_pull(task_ids="approve_fix")
        return apply_fix(drain, approved["hash"])


class CanaryFix(DlqOperator):
    """Replay a few of the entries that waited for the fix; if they fail again the fix is rolled back."""

    def stage(self, drain: Drain, context: Context) -> dict[str, Any]:
        from dlq.fixes import canary_fix

        return canary_fix(drain, self.deadline_s(drain, context))
