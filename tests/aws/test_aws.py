"""A drain on a real AWS account: ``make test-aws QUEUE=<name>``. Nothing here runs by itself.

The queue is one for tests, with a dead-letter queue of its own: SQS itself moves there what is received and not deleted
often enough. No queue is created, changed or purged, and only messages that this test sent are deleted.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.exceptions import BotoCoreError
from sqlalchemy import text

from dlq import plan, sqs
from dlq.config import QueueConfig
from dlq.conservation import verify_conservation
from dlq.errors import DlqError, SourceError
from dlq.first_intake import free
from dlq.intake import take_custody
from dlq.ledger import Ledger
from dlq.opening import open_drain
from dlq.ports import Connection
from dlq.replay import drain_remaining
from dlq.sending import SendRun
from dlq.triage import assign

pytestmark = [pytest.mark.aws, pytest.mark.timeout(1800)]

MESSAGES = 30
PATIENCE_S = 600.0
CLEARED_WITHIN_S = 60.0


def queue_for_tests(client: Any, named: str) -> sqs.Queue:
    """The queue, if it may be used.

    :raises pytest.fail.Exception: saying why not.
    """
    try:
        found = sqs.find(client, named, "QUEUE", SourceError)
    except DlqError as error:
        pytest.fail(str(error))
    if "test" not in found.name.lower():
        pytest.fail(
            f"queue {found.name}: its name doesn't say that it is for tests; name one with 'test' in it"
        )
    if found.held:
        pytest.fail(f"queue {found.name} holds about {found.held} messages; empty it, or name another one")
    return found


@pytest.fixture
def client() -> Any:
    try:
        if boto3.Session().get_credentials() is None:
            pytest.skip("no AWS credentials: set AWS_PROFILE, or what else boto3 looks at")
        return boto3.client("sqs")
    except BotoCoreError as error:
        pytest.skip(f"no SQS client: {error}; set AWS_REGION and credentials")


@pytest.fixture
def origin(client: Any) -> sqs.Queue:
    named = os.environ.get("QUEUE")
    if not named:
        pytest.skip("no QUEUE: make test-aws QUEUE=<the name of a test queue that has a dead-letter queue>")
    return queue_for_tests(client, named)


@pytest.fixture
def dlq(client: Any, origin: sqs.Queue) -> sqs.Queue:
    if (arn := origin.redrive.get("deadLetterTargetArn")) is None:
        pytest.fail(
            f"queue {origin.name} has no dead-letter queue: give it a redrive policy (maxReceiveCount 1)"
        )
    return queue_for_tests(client, str(arn))


class Messages:
    """What this test sent, by a mark in each body, and how it is got rid of."""

    def __init__(self, client: Any, queues: list[sqs.Queue]) -> None:
        self._client, self._queues = client, queues
        self._mark = f"dlq-runbook test {uuid.uuid4().hex}"
        self.seen: set[str] = set()

    def bodies(self) -> set[str]:
        return {f"{self._mark} {n}" for n in range(MESSAGES)}

    def send(self, to: sqs.Queue) -> None:
        for number, body in enumerate(sorted(self.bodies())):
            fifo = (
                {"MessageGroupId": f"g{number % 3}", "MessageDeduplicationId": uuid.uuid4().hex}
                if to.fifo
                else {}
            )
            attribute = {"DataType": "Number.int", "StringValue": str(number)}
            self._client.send_message(
                QueueUrl=to.url, MessageBody=body, MessageAttributes={"number": attribute}, **fifo
            )

    def fail(self, at: sqs.Queue, until: sqs.Queue) -> None:
        """Receive them and let go of them at once, until SQS has dead-lettered all."""
        end = time.monotonic() + PATIENCE_S
        while sqs.find(self._client, until.url, "QUEUE", SourceError).held < MESSAGES:
            assert time.monotonic() < end, "SQS didn't dead-letter all that was received too often"
            self._receive(at, VisibilityTimeout=0)

    def consume(self, at: sqs.Queue) -> bool:
        """Delete what this test sent, and leave what it didn't; returns whether anything came."""
        got = self._receive(at)
        for message in got:
            if message["Body"].startswith(self._mark):
                self.seen.add(message["Body"])
                self._client.delete_message(QueueUrl=at.url, ReceiptHandle=message["ReceiptHandle"])
        return bool(got)

    def clear(self) -> None:
        for queue in self._queues:
            empty, end = 0, time.monotonic() + CLEARED_WITHIN_S
            while empty < 3 and time.monotonic() < end:
                empty = 0 if self.consume(queue) else empty + 1

    def _receive(self, at: sqs.Queue, **how: int) -> list[Mapping[str, Any]]:
        found: list[Mapping[str, Any]] = self._client.receive_message(
            QueueUrl=at.url, MaxNumberOfMessages=sqs.BATCH, WaitTimeSeconds=2, **how
        ).get("Messages", [])
        return found


@pytest.fixture
def messages(client: Any, origin: sqs.Queue, dlq: sqs.Queue) -> Iterator[Messages]:
    made = Messages(client, [origin, dlq])
    yield made
    made.clear()


def test_what_sqs_dead_lettered_is_taken_replayed_and_proven(
    client: Any, origin: sqs.Queue, dlq: sqs.Queue, messages: Messages, tmp_path: Path
) -> None:
    config = QueueConfig.model_validate(
        {
            "name": "aws",
            "source": {
                "kind": "sqs",
                "connection": "aws",
                "queue": dlq.arn,
                "start": "earliest",
                "wait": os.environ.get("DLQ_SQS_WAIT", "20s"),
                "quiet": os.environ.get("DLQ_SQS_QUIET", "1m"),
            },
            "target": {"kind": "sqs", "connection": "aws", "allow": [origin.arn]},
            "ledger": f"sqlite:///{tmp_path}/ledger.db",
            "archive": str(tmp_path / "archive"),
            "report": str(tmp_path / "report"),
        }
    )
    ledger = Ledger.create(config.ledger)
    messages.send(origin)
    messages.fail(origin, dlq)

    with open_drain(config, run_id="test", connections=lambda name: Connection(name, "aws")) as drain:
        done = take_custody(drain, PATIENCE_S)
        assert (done["taken"], done["reached"]) == (MESSAGES, True), done
        assign(drain)
        free(drain, (), who="test")
        (job,) = plan.make(drain, "test", plan.ready(drain), who="test", saw="all", canary=False)
        with SendRun(drain, job.id) as run:
            assert run.send(job.size, time.monotonic() + PATIENCE_S) == MESSAGES
            run.close("done", "ready")
        end = time.monotonic() + PATIENCE_S
        while messages.seen != messages.bodies():
            assert time.monotonic() < end, f"{len(messages.seen)} of {MESSAGES} replays arrived"
            messages.consume(origin)
        # a queue tells of no message what became of it: it succeeded once it must have come back
        end = time.monotonic() + PATIENCE_S
        while states(ledger) != {"confirmed": MESSAGES}:
            assert time.monotonic() < end, states(ledger)
            assert drain_remaining(drain, PATIENCE_S)["outstanding"] == 0
        proof = verify_conservation(drain)
        assert proof["proven"], proof["said"]
    ledger.close()


def states(ledger: Ledger) -> dict[str, int]:
    with ledger.read() as tx:
        rows = tx.execute(text("SELECT state, COUNT(*) AS n FROM entry GROUP BY state")).all()
    return {row.state: row.n for row in rows}
