"""Looking at what is in custody, and choosing what to do about it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow.sdk.bases.branch import BranchMixIn

from dlq_runbook.forms import one_line
from dlq_runbook.operators.base import DlqOperator

if TYPE_CHECKING:
    from airflow.sdk import Context

    from dlq.drain import Drain


class InspectSample(DlqOperator):
    """Show the first and oldest of each group, redacted."""

    def stage(self, drain: Drain, context: Context) -> dict[str, Any]:
        from dlq.triage import inspect_sample

        looked = inspect_sample(drain)
        self.log.info("The sample, redacted:\n%s", table(looked["sample"]))
        return looked


class Categorize(DlqOperator):
    """Group the failures by fingerprint and component, and say what kind each is."""

    def stage(self, drain: Drain, context: Context) -> dict[str, Any]:
        from dlq.triage import categorize

        return categorize(drain)


class FindRootCause(DlqOperator):
    """Rank what the failed entries share more than others do. Finding nothing stops nothing."""

    def stage(self, drain: Drain, context: Context) -> dict[str, Any]:
        from dlq.triage import find_root_cause

        return find_root_cause(drain)


class ChooseRemedies(DlqOperator, BranchMixIn):
    """Go the ways the categories ask for: any mix, or nothing to do."""

    inherits_from_skipmixin = True

    def stage(self, drain: Drain, context: Context) -> dict[str, Any]:
        from dlq.triage import choose_remedies

        return choose_remedies(drain)

    def execute(self, context: Context) -> Any:
        chosen = super().execute(context)
        # Following a branch ends the task before its result is kept.
        context["ti"].xcom_push(key="chosen", value=chosen)
        return self.do_branch(context, chosen["branches"])


COLUMNS = {
    "place": 12,
    "category": 9,
    "error_type": 22,
    "component": 26,
    "failed_at": 19,
    "replays": 7,
    "message": 60,
}
"""What of each entry the log shows, in characters."""


def table(sample: list[dict[str, Any]]) -> str:
    """A sample as text in columns. What entries say is untrusted: it stays on its line."""
    rows = [tuple(COLUMNS), *([_cell(entry.get(name)) for name in COLUMNS] for entry in sample)]
    widths = [min(most, max(len(row[i]) for row in rows)) for i, most in enumerate(COLUMNS.values())]
    return "\n".join(
        "  ".join(cell[:width].ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _cell(value: Any) -> str:
    return "-" if value is None else one_line(value)
