"""Buttons on a task's page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from airflow.sdk import BaseOperatorLink
from airflow.sdk.configuration import conf

from dlq_runbook.drains import run_key

if TYPE_CHECKING:
    from airflow.sdk import BaseOperator
    from airflow.sdk.types import TaskInstanceKey

REPORTS = "/dlq"
"""Where the reports' app is mounted in Airflow's API server."""


class ReportLink(BaseOperatorLink):
    """Opens the run's report."""

    name = "Report"

    def get_link(self, operator: BaseOperator, *, ti_key: TaskInstanceKey) -> str:
        from dlq.drain import drain_id

        drain = drain_id(operator.queue_name, run_key(ti_key.dag_id, ti_key.run_id))
        base = (conf.get("api", "base_url", fallback="") or "").rstrip("/")
        return f"{base}{REPORTS}/report/{ti_key.dag_id}/{drain}.html"
