"""The SLO's figure: outstanding ÷ workflows in the window."""

from __future__ import annotations

from dataclasses import dataclass

from dlq.drain import Drain
from dlq.errors import DlqError
from dlq.orchestrator import OrchestratorError


@dataclass(frozen=True)
class Standing:
    """How the queue stands; ``ratio`` is None where the number of workflows isn't known, and nothing branches
    on it then.
    """

    depth: int
    unsettled: int
    workflows: int | None

    @property
    def outstanding(self) -> int:
        return self.depth + self.unsettled

    @property
    def ratio(self) -> float | None:
        return self.outstanding / self.workflows if self.workflows else None

    def __str__(self) -> str:
        ratio = (
            f"{self.ratio:.3%} of {self.workflows} workflows"
            if self.ratio is not None
            else "ratio not known (set slo.workflows or an orchestrator)"
        )
        return f"{self.outstanding} outstanding ({self.depth} in the queue, {self.unsettled} in custody): {ratio}"


def workflows(drain: Drain) -> int | None:
    """Workflows in ``slo.window``: the orchestrator's count, else what the targets' topics grew by, else
    ``slo.workflows``.
    """
    orchestrator = drain.orchestrator
    if orchestrator is not None:
        try:
            if "outcome" in orchestrator.capabilities():
                return orchestrator.success_rate(round(drain.config.slo.window)).total
        except OrchestratorError:
            pass  # the next best answer is better than none in an incident
    if drain.config.slo.workflows is not None:
        return drain.config.slo.workflows
    try:
        return drain.target.grown(drain.config.slo.window) or None
    except DlqError:
        return None


def standing(drain: Drain) -> Standing:
    return Standing(drain.depth().entries, drain.unsettled(), workflows(drain))
