"""Taking the queue's entries into custody."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dlq_runbook.operators.base import DlqOperator

if TYPE_CHECKING:
    from airflow.sdk import Context

    from dlq.drain import Drain


class TakeCustody(DlqOperator):
    """Bytes to the archive, rows to the ledger, and only then the queue is told: this is the backup."""

    def stage(self, drain: Drain, context: Context) -> dict[str, Any]:
        from dlq.intake import take_custody

        return take_custody(drain, self.deadline_s(drain, context), progress=self.progress)
