"""Submitting a workflow: the same road as everybody else's, through the origin."""

from __future__ import annotations

from dlq_orchestrator.core.workflow_safety import WorkflowSafety
from dlq_orchestrator.origin import Inlet, Outgoing, Place
from dlq_orchestrator.workflow import Headers, parse_workflow


class Submission:
    """Puts workflows into the origin, and knows them as `pending` from then on."""

    def __init__(self, inlet: Inlet, safety: WorkflowSafety) -> None:
        self._inlet = inlet
        self._safety = safety

    def submit(self, document: bytes, traceparent: str | None) -> Place:
        """
        :raises DataCorruption: the document is not a workflow, or the origin takes no such text.
        :raises NotSubmitted: no acknowledgement.
        """
        workflow = parse_workflow(document)
        key = workflow.correlation_id.encode()
        headers: Headers = [("correlation-id", key)]
        if traceparent:
            headers.append(("traceparent", traceparent.encode()))
        [place] = self._inlet.put([Outgoing(key, document, headers)])
        if not isinstance(place, Place):
            raise place
        self._safety.expect(workflow.correlation_id, workflow.workflow)
        return place
