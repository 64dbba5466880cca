"""The one file of this folder that Airflow imports by path; everything else is the package beside it."""

from __future__ import annotations

from typing import Any

from airflow.sdk.plugins_manager import AirflowPlugin

from dlq_runbook.links import REPORTS


class DlqRunbookPlugin(AirflowPlugin):
    name = "dlq_runbook"

    @property
    def fastapi_apps(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """Read by the API server only, so that no worker imports a web framework for it."""
        from dlq_runbook.reports import app

        return [{"app": app, "url_prefix": REPORTS, "name": "DLQ reports"}]
