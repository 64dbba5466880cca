"""The data-loss guard and the disaster-recovery branch."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from airflow.sdk.bases.branch import BranchMixIn

from dlq_runbook.operators.approval import PlanApproval, Proposal
from dlq_runbook.operators.base import DlqOperator

if TYPE_CHECKING:
    from airflow.sdk import Context

    from dlq.config import Approval
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


class ApproveDr(PlanApproval):
    """Decide whether a drain of a very deep queue goes on, now that its backup is known to be good."""

    def policy(self, approval: Approval) -> str:
        return approval.dr

    def proposal(self, drain: Drain, context: Context) -> Proposal:
        guarded = context["ti"].xcom_pull(task_ids="guard_data_loss", key="guarded")
        verified = context["ti"].xcom_pull(task_ids="invoke_dr_plan")
        seen = json.dumps([drain.id, guarded, verified], sort_keys=True)
        return Proposal(
            digest=hashlib.sha256(seen.encode()).hexdigest(),
            subject=f"Queue {drain.queue}: go on with {guarded['outstanding']:,} dead letters?",
            facts=(
                f"Drain `{drain.id}`",
                f"{guarded['outstanding']:,} entries are outstanding; the limit is {guarded['limit']:,}",
                f"{verified['verified_entries']:,} entries in {verified['verified_segments']:,} segments were "
                "read back from the archive, every sum right: they can be restored",
                "Approve: entries are replayed, a canary first",
                "Reject: nothing is replayed, everything stays in custody, open",
            ),
            untrusted="",
            within_policy=True,
        )
