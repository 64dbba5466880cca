"""The data-loss guard and the disaster-recovery branch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow.sdk.bases.branch import BranchMixIn

from dlq_runbook.operators.base import DlqOperator

if TYPE_CHECKING:
    from airflow.sdk import Context

    from dlq.drain import Drain


class GuardDataLoss(DlqOperator, BranchMixIn):
    """Past the limit of outstanding entries the archive is read back before anything is replayed."""

    inherits_from_skipmixin = True

    def stage(self, drain: Drain, context: Context) -> dict[str, Any]:
        from dlq.limits import guard_data_loss

        return guard_data_loss(drain)

    def execute(self, context: Context) -> Any:
        guarded = super().execute(context)
        # Following a branch ends the task before its result is kept.
        context["ti"].xcom_push(key="guarded", value=guarded)
        return self.do_branch(context, guarded["next"])


class InvokeDrPlan(DlqOperator):
    """Read the whole archive of what is outstanding back, so that a restore is known to work."""

    def stage(self, drain: Drain, context: Context) -> dict[str, Any]:
        from dlq.limits import invoke_dr_plan

        return invoke_dr_plan(drain)
