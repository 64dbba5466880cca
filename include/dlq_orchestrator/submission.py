"""Submitting a workflow: the same road as everybody else's, through the origin."""

from __future__ import annotations

from dlq_orchestrator.core.workflow_safety import WorkflowSafety
from dlq_orchestrator.origin import Inlet, Place
from dlq_orchestrator.workflow import parse_workflow


class Submission:
    """Puts workflows into the origin, and knows them as `pending` from then on."""

    def __init__(self, inlet: Inlet, safety: WorkflowSafety) -> None:
        self._inlet = inlet
        self._safety = safety

    def submit(self, document: bytes, traceparent: str | None) -> Place:
        """
        :raises DataCorruption: the document is not a workflow.
        :raises NotSubmitted: no acknowledgement.
        """
        workflow = parse_workflow(document)
        place = self._inlet.put(document, workflow.correlation_id, traceparent)
        self._safety.expect(workflow.correlation_id, workflow.workflow)
        return place
