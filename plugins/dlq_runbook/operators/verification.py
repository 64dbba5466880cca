"""Proving that nothing was lost or run twice, and that the platform works again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow.sdk.exceptions import AirflowFailException

from dlq_runbook.operators.base import DlqOperator

if TYPE_CHECKING:
    from airflow.sdk import Context

    from dlq.drain import Drain


class VerifyConservation(DlqOperator):
    """Compare the accounts with what the log, the archive and the target saw. A broken law fails the task."""

    isolated = False

    def stage(self, drain: Drain, context: Context) -> dict[str, Any]:
        from dlq.conservation import verify_conservation

        proof = verify_conservation(drain)
        if proof["proven"] is False:
            context["ti"].xcom_push(key="proof", value=proof)
            for broken in proof["broken"]:
                self.log.error("Broken: %(law)s: %(what)s (%(n)s)", broken)
            raise AirflowFailException(
                f"Conservation is not proven: {len(proof['broken'])} finding(s), listed above"
            )
        for witness, said in proof.get("witnesses", {}).items():
            self.log.info("Witness %s: %s", witness, said)
        return proof


class VerifyGoldenFlows(DlqOperator):
    """Run workflows whose output is known, end to end, now that routing is back. A wrong one fails."""

    isolated = False

    def stage(self, drain: Drain, context: Context) -> dict[str, Any]:
        from dlq.flows import verify_golden_flows

        golden = verify_golden_flows(drain)
        if golden["passed"] is False:
            context["ti"].xcom_push(key="golden", value=golden)
            raise AirflowFailException("Golden flows failed: see the lines above and the report")
        return golden
