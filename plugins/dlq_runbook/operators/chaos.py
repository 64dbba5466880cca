"""Breaking what a queue's workflows need, and seeing that a drain recovers all of it."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from airflow.sdk.exceptions import AirflowFailException

from dlq_runbook.drains import look
from dlq_runbook.links import ReportLink
from dlq_runbook.operators.base import DlqOperator
from dlq_runbook.operators.drain import OpenDrain

if TYPE_CHECKING:
    from airflow.sdk import Context

    from dlq.drain import Drain


class _Held(OpenDrain):
    """A stage that takes the queue's lease for itself alone: between two of them a drain has it."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(kind="cli", **kwargs)

    def work(self, drain: Drain, context: Context) -> Any:
        """What is done while the queue is held."""
        raise NotImplementedError

    def stage(self, drain: Drain, context: Context) -> Any:
        from dlq.ledger import lease

        try:
            return self.work(drain, context)
        finally:
            if not drain.dry_run:
                lease.release(drain.ledger, drain.queue, drain.id, drain.epoch, "done")


class InjectFaults(_Held):
    """Break, let workflows fail into the queue, stop breaking: fault by fault, as the queue's file says."""

    def work(self, drain: Drain, context: Context) -> list[dict[str, Any]]:
        from dlq import chaos

        return [asdict(one) for one in chaos.inject(drain)]


class AssertRecovery(_Held):
    """Hold every workflow that was broken against its golden flow, and write the report."""

    operator_extra_links = (ReportLink(),)

    def work(self, drain: Drain, context: Context) -> dict[str, Any]:
        from dlq import chaos
        from dlq.chaos import report

        told = context["ti"].xcom_pull(task_ids="inject_faults")
        if told is None:
            raise AirflowFailException("inject_faults did not end: nothing can be said of what it broke")
        found = chaos.recover(drain, [chaos.Injected(**one) for one in told], self.deadline_s(drain, context))
        rows = [report.row(one) for one in found]
        if drain.dry_run:
            return {"said": "dry run: nothing was broken", "whole": None}
        written = report.write(drain.config.report, drain.id, drain.queue, context["dag_run"].run_id, rows)
        self.log.info("%s", written["said"])
        if not written["whole"]:
            context["ti"].xcom_push(key="report", value=written)
            raise AirflowFailException(written["said"])
        return written


class EndFaults(DlqOperator):
    """Bring back what was before, whatever the drain made of it."""

    isolated = False

    def attached(self, context: Context) -> Drain:
        return look(self.queue_name, context)

    def hold(self, drain: Drain) -> None:
        """What is brought back is the orchestrator's: no lease is needed."""

    def stage(self, drain: Drain, context: Context) -> None:
        from dlq import chaos

        if left := chaos.end_faults(drain):
            raise RuntimeError("Still broken: " + "; ".join(left))
