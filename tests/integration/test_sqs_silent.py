"""What SQS itself moved to the dead-letter queue says of no error: the orchestrator is asked, else a canary tries."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.integration.test_sqs import Queues

from dlq.drain import Drain
from dlq.intake import take_custody
from dlq.orchestrator import FailedWorkflow
from dlq.triage import assign
from dlq_demo.elasticmq import ElasticMq


@pytest.fixture
def queues(elasticmq: ElasticMq, tmp_path: Path) -> Iterator[Queues]:
    made = Queues(elasticmq, tmp_path)
    made.begin()
    for n in range(6):
        made.client.send_message(
            QueueUrl=made.url,
            MessageBody=f"body {n}",
            MessageAttributes={"correlation-id": {"DataType": "String", "StringValue": f"wf-{n}"}},
        )
    received = 0
    while received < 6:
        received += len(
            made.client.receive_message(QueueUrl=made.url, MaxNumberOfMessages=10).get("Messages", [])
        )
    time.sleep(1.2)  # their visibility ends, and the next receive has them moved
    for _ in range(3):
        made.client.receive_message(QueueUrl=made.url, MaxNumberOfMessages=10)
    yield made
    made.ledger.close()


def knows(failures: dict[str, FailedWorkflow]) -> Any:
    def answer(ids: Sequence[str]) -> dict[str, FailedWorkflow]:
        return {each: failures[each] for each in ids if each in failures}

    return SimpleNamespace(capabilities=lambda: frozenset({"failures"}), failures=answer)


def failed(kind: str) -> FailedWorkflow:
    return FailedWorkflow(kind, "it failed", "payments.charge", "charge", 3, 1_764_000_000_000)


def taken(queues: Queues, orchestrator: Any) -> Drain:
    drain = queues.open()
    drain.__dict__["orchestrator"] = orchestrator
    assert take_custody(drain, 60)["taken"] == 6
    return drain


def test_the_orchestrator_says_why(queues: Queues) -> None:
    known = {
        "wf-0": failed("TransientNetwork"),
        "wf-1": failed("QuotaExceeded"),
        "wf-2": failed("ScopeViolation"),
    }
    assign(taken(queues, knows(known)))
    assert dict(
        queues.rows(
            "SELECT e.correlation_id, g.error_type || ' ' || e.reason FROM entry e JOIN grp g ON g.id = e.grp"
        )
    ) == {
        "wf-0": "TransientNetwork ready",
        "wf-1": "QuotaExceeded waiting_for_fix",
        "wf-2": "ScopeViolation waiting_for_fix",
        **{f"wf-{n}": "unknown ready" for n in (3, 4, 5)},  # for a canary to try
    }


def test_what_nobody_explains_goes_to_a_person_where_the_file_says_so(queues: Queues) -> None:
    source = queues.config.source.model_copy(update={"no_error": "manual"})
    queues.config = queues.config.model_copy(update={"source": source})
    assign(taken(queues, None))
    assert dict(queues.rows("SELECT reason, COUNT(*) FROM entry GROUP BY reason")) == {
        "waiting_for_person": 6
    }


def test_the_source_queue_selects_the_target(elasticmq: ElasticMq, queues: Queues) -> None:
    target = queues.config.target.model_copy(update={"queue": None})
    queues.config = queues.config.model_copy(update={"target": target})
    taken(queues, None)
    assert queues.rows("SELECT DISTINCT target FROM entry") == [(queues.orders,)]
