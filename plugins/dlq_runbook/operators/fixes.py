"""Fixing what a retry can't heal: a plugin's quota or its scopes, within bounds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow.sdk.exceptions import AirflowFailException, AirflowSkipException

from dlq_runbook.forms import short
from dlq_runbook.operators.approval import PlanApproval, Proposal
from dlq_runbook.operators.base import DlqOperator

if TYPE_CHECKING:
    from airflow.sdk import Context

    from dlq.config import Approval
    from dlq.drain import Drain


class ProposeFix(DlqOperator):
    """Work out which limits to raise and which plugins to patch, and change nothing."""

    def stage(self, drain: Drain, context: Context) -> dict[str, Any]:
        from dlq.fixes import propose_fix

        return propose_fix(drain)


class ApproveFix(PlanApproval):
    """Decide on the proposed fixes."""

    def policy(self, approval: Approval) -> str:
        return approval.fix

    def proposal(self, drain: Drain, context: Context) -> Proposal:
        proposed = context["ti"].xcom_pull(task_ids="propose_fix")
        fixes = proposed["fixes"]
        if not fixes:
            self.log.info("Nothing to approve: %s", proposed["said"])
            raise AirflowSkipException("Nothing to approve")
        waiting = sum(fix["entries"] for fix in fixes)
        outside = sum(not fix["within_policy"] for fix in fixes)
        return Proposal(
            digest=proposed["hash"],
            subject=f"Queue {drain.queue}: change {len(fixes)} plugin(s)?",
            facts=(
                f"Drain `{drain.id}`, plan `{short(proposed['hash'])}`",
                f"{len(fixes)} change(s) would be made; {waiting:,} entries wait for them",
                f"{outside} of them outside the bounds of the queue's file"
                if outside
                else "All within the bounds of the queue's file",
                "Approve: make them, try a few entries, then the rest; if those fail, it is undone",
                "Reject: nothing changes, and the entries stay open",
            ),
            untrusted="\n".join(f"{fix['says']}: {fix['entries']} entries" for fix in fixes),
            within_policy=not outside,
        )

    def rehearse(self, proposal: Proposal, how: str) -> dict[str, Any]:
        super().rehearse(proposal, how)
        raise AirflowSkipException("Dry run: nothing is applied")


class ApplyFix(DlqOperator):
    """Make the change that was approved, and no other."""

    def stage(self, drain: Drain, context: Context) -> dict[str, Any]:
        from dlq.fixes import apply_fix

        approved = context["ti"].xcom_pull(task_ids="approve_fix")
        if approved is None:
            raise AirflowFailException(
                "approve_fix was marked, nobody decided: clear it with its downstream and decide"
            )
        return apply_fix(drain, approved["hash"], approved.get("decision"))


class CanaryFix(DlqOperator):
    """Replay a few of the entries that waited for the fix; if they fail again the fix is rolled back."""

    def stage(self, drain: Drain, context: Context) -> dict[str, Any]:
        from dlq.fixes import canary_fix

        return canary_fix(drain, self.deadline_s(drain, context))
