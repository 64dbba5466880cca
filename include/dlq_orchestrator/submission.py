"""Submitting a workflow: the same road as everybody else's, through the origin topic."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import cast

from confluent_kafka import KafkaError, KafkaException, Message, Producer

from dlq_orchestrator.core.workflow_safety import WorkflowSafety
from dlq_orchestrator.workflow import Headers, parse_workflow

_DEADLINE_S = 10.0


class NotSubmitted(Exception):
    """The origin topic did not take the workflow in time; submitting it again is safe."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a submitted workflow lies."""

    topic: str
    partition: int
    offset: int


class Submission:
    """Produces workflows to the origin topic.

    :param producer: one of its own: whoever flushes a producer runs the delivery reports of all its users.
    """

    def __init__(self, producer: Producer, topic: str, safety: WorkflowSafety) -> None:
        self._producer = producer
        self._topic = topic
        self._safety = safety

    def submit(self, document: bytes, traceparent: str | None) -> Place:
        """
        :raises DataCorruption: the document is not a workflow.
        :raises NotSubmitted: no acknowledgement.
        """
        workflow = parse_workflow(document)
        correlation_id = workflow.correlation_id.encode()
        headers: Headers = [("correlation-id", correlation_id)]
        if traceparent:
            headers.append(("traceparent", traceparent.encode()))
        deadline = time.monotonic() + _DEADLINE_S
        delivered = threading.Event()
        reports: list[tuple[KafkaError | None, Message]] = []

        def report(error: KafkaError | None, message: Message) -> None:
            reports.append((error, message))
            delivered.set()

        try:
            self._producer.produce(
                self._topic, key=correlation_id, value=document, headers=list(headers), on_delivery=report
            )
        except KafkaException as error:
            raise NotSubmitted(f"{self._topic}: {error.args[0].str()}") from None
        self._producer.flush(_DEADLINE_S)
        if not delivered.wait(max(0.1, deadline - time.monotonic())):
            raise NotSubmitted(f"{self._topic} did not acknowledge within {_DEADLINE_S:.0f} s")
        refused, message = reports[0]
        if refused is not None:
            raise NotSubmitted(f"{self._topic}: {refused.str()}")
        self._safety.expect(workflow.correlation_id, workflow.workflow)
        return Place(self._topic, cast(int, message.partition()), cast(int, message.offset()))
