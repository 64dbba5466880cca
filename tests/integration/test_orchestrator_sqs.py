"""The reference orchestrator on a real SQS server: what is moved to the dead-letter queue, and what SIGKILL leaves."""

from __future__ import annotations

import json
import os
import random
import sqlite3
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from dlq.orchestrator import CapabilityMissing, Replay
from dlq.orchestrator_http import HttpOrchestrator
from dlq_demo.elasticmq import ACCESS_KEY, REGION, SECRET_KEY, ElasticMq, arn
from dlq_demo.orchestrator import SqsOrchestrator
from dlq_orchestrator.traffic import send_to_queue, workflows

RECEIVES = 2


class Stream:
    """An orchestrator between two queues of its own."""

    def __init__(
        self, sqs: ElasticMq, folder: Path, *, receives: int = RECEIVES, visibility: int = 1
    ) -> None:
        suffix = uuid.uuid4().hex[:8]
        self.sqs = sqs.client()
        self.name = f"billing-{suffix}"
        self.dlq = sqs.create_queue(f"billing-dlq-{suffix}")
        self.origin = sqs.create_queue(
            self.name, dead_letters=f"billing-dlq-{suffix}", receives=receives, visibility=visibility
        )
        self.service = SqsOrchestrator(sqs, origin=self.name, folder=folder)
        self.client = HttpOrchestrator(self.service.url, self.service.token)

    def send(self, body: str, **attributes: Any) -> str:
        """Send a message; underscores in an attribute's name are dashes. Returns its MessageId."""
        typed = {
            name.replace("_", "-"): value
            if isinstance(value, dict)
            else {"DataType": "String", "StringValue": value}
            for name, value in attributes.items()
        }
        sent = self.sqs.send_message(QueueUrl=self.origin, MessageBody=body, MessageAttributes=typed)
        message_id: str = sent["MessageId"]
        return message_id

    def replay(self, body: str, key: str, retry: int, **attributes: Any) -> str:
        ours = {"drain": "d", "job": "j", "ordinal": 1, "entry": "e", "key": key, "retry": retry, "ts": 1}
        return self.send(body, dlq=json.dumps(ours, separators=(",", ":")), **attributes)

    def outcome(self, key: str) -> str:
        return self.client.outcomes([key])[key].state

    def ended(self, key: str) -> str:
        return until(lambda: state if (state := self.outcome(key)) in ("succeeded", "failed") else None)

    def dead_letters(self, at_least: int, seconds: float = 30.0) -> list[dict[str, Any]]:
        """What lies in the DLQ; they stay there, out of sight."""
        letters: list[dict[str, Any]] = []
        deadline = time.monotonic() + seconds
        while True:
            found = self.sqs.receive_message(
                QueueUrl=self.dlq,
                MaxNumberOfMessages=10,
                VisibilityTimeout=600,
                MessageAttributeNames=["All"],
                MessageSystemAttributeNames=["All"],
            ).get("Messages", [])
            letters += found
            if len(letters) >= at_least and not found:
                return letters
            assert time.monotonic() < deadline, f"{len(letters)} dead letters in {seconds:.0f} s"
            time.sleep(0 if found else 0.2)

    def in_dlq(self) -> int:
        return self.waiting(self.dlq)

    def waiting(self, queue: str) -> int:
        counts = self.sqs.get_queue_attributes(QueueUrl=queue, AttributeNames=["All"])["Attributes"]
        return sum(int(value) for name, value in counts.items() if name.startswith("ApproximateNumber"))

    def succeeded(self, correlation_id: str) -> None:
        def done() -> bool:
            state = self.client.workflow(correlation_id)
            return state is not None and state.state == "succeeded"

        until(done)

    def memory(self, query: str) -> list[tuple[Any, ...]]:
        """What the orchestrator's state holds; it may be running."""
        with sqlite3.connect(f"file:{self.service.state}/orchestrator.sqlite?mode=ro", uri=True) as db:
            return db.execute(query).fetchall()


@pytest.fixture
def stream(elasticmq: ElasticMq, tmp_path: Path) -> Iterator[Stream]:
    stream = Stream(elasticmq, tmp_path)
    with stream.service:
        yield stream
    stream.client.close()


def until(holds: Callable[[], Any], seconds: float = 30.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.05)
    return found


def charge(correlation_id: str, **fault: Any) -> str:
    args: dict[str, Any] = {"amount_cents": 1000, "currency": "EUR"}
    if fault:
        args["fault"] = fault
    step = {"name": "charge", "plugin": "payments", "tool": "charge", "args": args}
    return json.dumps({"workflow": "order", "correlation_id": correlation_id, "steps": [step]})


def test_what_succeeds_is_deleted(stream):
    stream.send(charge("c1"), dedupe_key="d1")
    stream.succeeded("c1")
    until(lambda: stream.waiting(stream.origin) == 0)
    assert stream.memory("SELECT effect_key FROM effect") == [("d1/charge",)]
    assert stream.in_dlq() == 0


def test_what_fails_is_moved_by_the_queue_as_it_was_and_the_orchestrator_knows_why(stream):
    attributes = {
        "correlation-id": {"DataType": "String", "StringValue": "c1"},
        "traceparent": {"DataType": "String", "StringValue": f"00-{'a' * 32}-{'b' * 16}-01"},
        "count": {"DataType": "Number.int", "StringValue": "7"},
        "bytes": {"DataType": "Binary", "BinaryValue": b"\x00\xff"},
    }
    body = charge("c1", error="RateLimit", attempts=99)
    message_id = stream.send(body, **attributes)
    (letter,) = stream.dead_letters(1)
    assert (letter["MessageId"], letter["Body"]) == (message_id, body)
    assert letter["MessageAttributes"] == attributes
    assert letter["Attributes"]["DeadLetterQueueSourceArn"] == arn(stream.name)

    state = stream.client.workflow("c1")
    assert (state.state, state.trace_id, state.failure.error_type) == ("failed", "a" * 32, "RateLimit")
    (why,) = stream.client.failures(["c1", "c2"]).values()
    assert why.message.startswith("429 Too Many Requests from payments")
    assert (why.error_type, why.component, why.stage, why.attempts, why.workflow) == (
        "RateLimit",
        "payments.charge",
        "charge",
        3,
        "order",
    )
    assert (why.trace_id, why.retry_count) == ("a" * 32, 0)
    assert abs(why.failed_at_ms / 1000 - time.time()) < 60
    # three tries each time the queue handed it out
    assert [step.attempts for step in state.steps] == [3 * RECEIVES]


def test_a_failure_that_comes_again_is_pending_and_counts_as_none_yet(elasticmq, tmp_path):
    stream = Stream(elasticmq, tmp_path, receives=100, visibility=600)
    with stream.service, stream.client:
        stream.replay(charge("c1", error="ScopeViolation", attempts=99), "k1", 1)
        until(lambda: (state := stream.client.workflow("c1")) is not None and state.failure)
        assert stream.client.workflow("c1").state == "pending"
        assert stream.outcome("k1") == "pending"
        assert stream.client.success_rate(600).total == 0


def test_hostile_messages_are_dead_lettered_as_they_are_and_known_by_their_ids(stream):
    bodies = ["no JSON", "[" * 100_000, '{"workflow": "order"}', "\U0001f4a3 \t\r\n", "null"]
    sent = {
        stream.send(body, correlation_id={"DataType": "Binary", "BinaryValue": b"\xff"}) for body in bodies
    }
    stream.send(charge("after"))
    letters = stream.dead_letters(len(bodies))
    assert Counter(letter["Body"] for letter in letters) == Counter(bodies)
    assert {letter["MessageId"] for letter in letters} == sent
    assert {why.error_type for why in stream.client.failures(sorted(sent)).values()} == {"DataCorruption"}
    assert len(stream.client.failures(sorted(sent))) == len(bodies)
    stream.succeeded("after")


def test_a_replay_is_told_by_its_key_and_has_its_effect_once(stream):
    body = charge("c1", error="PluginError", attempts=4)
    stream.send(body, dedupe_key="d1")
    (letter,) = stream.dead_letters(1)
    assert letter["Body"] == body
    for retry in (1, 2, 3):
        stream.replay(body, f"k{retry}", retry, dedupe_key="d1", retry_count="0")
        stream.ended(f"k{retry}")
    assert [stream.outcome(f"k{retry}") for retry in (1, 2, 3)] == ["failed", "succeeded", "succeeded"]
    (returned,) = stream.dead_letters(1)
    assert json.loads(returned["MessageAttributes"]["dlq"]["StringValue"])["key"] == "k1"
    assert stream.memory("SELECT effect_key FROM effect") == [("d1/charge",)]
    assert stream.client.failures(["c1"]) == {}
    until(lambda: stream.waiting(stream.origin) == 0)


def test_a_failed_outcome_is_only_told_once_its_dead_letter_is_in_the_dlq(stream):
    for n in range(4):
        stream.replay(charge(f"c{n}", error="ScopeViolation", attempts=99), f"k{n}", 1)
        assert stream.ended(f"k{n}") == "failed"
        assert stream.in_dlq() == n + 1


def test_a_dedupe_key_that_succeeded_has_no_second_effect(stream):
    for n in range(20):
        stream.send(charge(f"c{n % 3}"), dedupe_key="d")
    until(lambda: stream.waiting(stream.origin) == 0)
    assert stream.memory("SELECT effect_key FROM effect") == [("d/charge",)]
    assert stream.in_dlq() == 0


@pytest.mark.parametrize(
    "attribute",
    [
        "no JSON",
        '{"key": 7, "retry": 1}',
        '{"key": "", "retry": null}',
        '["k"]',
        {"DataType": "Binary", "BinaryValue": b'{"key": "k", "retry": 9}'},
    ],
)
def test_an_attribute_that_is_no_replays_makes_an_ordinary_message(stream, attribute):
    stream.send(charge("c1", error="PluginError", attempts=1), dlq=attribute, retry_count="1")
    stream.succeeded("c1")
    assert stream.outcome("k") == "unknown"


def test_a_submitted_workflow_takes_the_queue_like_any_other(stream):
    document = json.loads(charge("c1"))
    with httpx.Client(
        base_url=stream.service.url, headers={"Authorization": f"Bearer {stream.service.token}"}
    ) as http:
        answer = http.post("/v1/workflows", json=document)
        assert answer.status_code == 202
        assert answer.json().keys() == {"correlation_id", "queue", "message_id"}
        assert answer.json()["queue"] == stream.name
        refused = http.post("/v1/workflows", json={**document, "correlation_id": "\uffff"})
        assert refused.status_code == 422
    stream.succeeded("c1")


def test_a_workflow_is_replayed_as_it_came_with_the_replays_own_attribute(stream):
    attributes = {
        "dedupe-key": {"DataType": "String", "StringValue": "d1"},
        "size": {"DataType": "Number.int", "StringValue": "7"},
        "raw": {"DataType": "Binary", "BinaryValue": b"\x00\xff"},
    }
    body = charge("c1", error="PluginError", attempts=4)
    stream.send(body, **attributes)
    until(lambda: stream.client.failures(["c1"]))
    stream.dead_letters(1)
    ours = {"dlq-entry": "e1", "dlq-job": "j1", "dlq-ordinal": "3", "dlq-original-timestamp": "12"}
    for _ in range(2):
        answer = stream.client.replay_workflows([Replay("c1", "k1", 1, headers=ours)])
        assert answer["k1"].state == "accepted"
    assert stream.ended("k1") == "failed"
    (letter,) = stream.dead_letters(1)
    assert letter["Body"] == body
    mark = json.loads(letter["MessageAttributes"].pop("dlq")["StringValue"])
    assert mark == {"entry": "e1", "job": "j1", "ordinal": 3, "ts": 12, "key": "k1", "retry": 1}
    assert letter["MessageAttributes"] == attributes
    stream.client.replay_workflows([Replay("c1", "k2", 2)])
    assert stream.ended("k2") == "succeeded"
    assert stream.memory("SELECT effect_key FROM effect") == [("d1/charge",)]
    assert stream.memory("SELECT count(*) FROM record") == [(0,)]


def test_a_replay_that_the_queue_does_not_take_is_refused_beside_those_it_takes(stream):
    stream.send(charge("c1", error="PluginError", attempts=1))
    stream.send("full", **{f"a{n}": "1" for n in range(9)}, correlation_id="c2")
    until(lambda: len(stream.client.failures(["c1", "c2"])) == 2)
    answer = stream.client.replay_workflows(
        [
            Replay("c1", "bytes", 1, value=b"\xff"),
            Replay("c1", "empty", 1, value=b""),
            Replay("c1", "control", 1, value=b"\x01"),
            Replay("c2", "crowded", 1),
            Replay("c1", "taken", 1),
        ]
    )
    refused = dict.fromkeys(("bytes", "empty", "control", "crowded"), "not_taken")
    assert {key: said.why for key, said in answer.items()} == {"taken": None, **refused}
    assert stream.ended("taken") == "succeeded"


def test_failures_cannot_be_held_back_and_the_capabilities_say_so(stream):
    assert stream.client.capabilities() == {"outcome", "failures", "replay", "quotas", "plugins", "debugger"}
    with pytest.raises(CapabilityMissing):
        stream.client.pause_routing("drain-1", 60)
    with httpx.Client(
        base_url=stream.service.url, headers={"Authorization": f"Bearer {stream.service.token}"}
    ) as http:
        pause = {"holder": "drain-1", "seconds": 60}
        for answer in (http.get("/v1/routing"), http.post("/v1/routing/pause", json=pause)):
            assert answer.status_code == 404
            assert "level `routing`" in answer.json()["detail"]


def test_quotas_are_changed_as_on_kafka(stream):
    args = {"text": "tea", "memory_mb": 600}
    step = {"name": "embed", "plugin": "embedding", "tool": "embed", "args": args}
    body = json.dumps({"workflow": "index", "correlation_id": "c1", "steps": [step]})
    stream.send(body)
    stream.dead_letters(1)
    assert stream.client.failures(["c1"])["c1"].error_type == "MemoryQuotaExceeded"
    stream.client.set_quota("embedding", 700, "raise")
    stream.replay(body, "k1", 1)
    assert stream.ended("k1") == "succeeded"


@pytest.mark.slow
def test_sigkill_at_any_moment_loses_no_message_and_doubles_no_effect(elasticmq, tmp_path):
    # a killed process has used up a reception of what it held: with few of them, healthy messages are moved too
    stream = Stream(elasticmq, tmp_path, receives=8)
    records = list(workflows(4000, 11, {"healthy": 0.9, "scope": 0.06, "corrupt": 0.04}))
    moments = random.Random(5)
    ran = []
    send_to_queue(stream.sqs, stream.origin, records)
    with stream.client:
        stream.service.start()
        for _ in range(8):
            time.sleep(moments.uniform(0.05, 0.6))
            stream.service.kill()
            ran += stream.memory("SELECT count(*) FROM workflow")
            stream.service.start()
        until(lambda: stream.waiting(stream.origin) == 0, 120)
        stream.service.stop()
    assert len(set(ran)) > 4  # killed at work, not before or after it
    letters = stream.dead_letters(1)
    dead = {letter["MessageAttributes"]["correlation-id"]["StringValue"] for letter in letters}
    assert len(dead) == len(letters)  # each once
    ends = dict(stream.memory("SELECT correlation_id, state FROM workflow WHERE workflow IS NOT NULL"))
    succeeded = {correlation_id for correlation_id, state in ends.items() if state == "succeeded"}
    of_kind = {
        kind: {dict(r.headers)["correlation-id"].decode() for r in records if r.kind == kind}
        for kind in ("healthy", "scope", "corrupt")
    }
    assert of_kind["scope"] | of_kind["corrupt"] <= dead
    assert of_kind["healthy"] <= succeeded | dead
    effects = Counter(key for (key,) in stream.memory("SELECT effect_key FROM effect"))
    assert effects
    assert set(effects.values()) == {1}


def test_sigterm_gives_back_what_was_received_and_not_run(elasticmq, tmp_path):
    stream = Stream(elasticmq, tmp_path, visibility=600)
    with stream.service, stream.client:
        # 4 s: in each of its steps two tries run into their time limit of 200 ms
        slow = json.loads(charge("slow", error="PluginTimeout", attempts=2))
        slow["steps"] = [{**slow["steps"][0], "name": f"charge-{n}"} for n in range(10)]
        stream.send(json.dumps(slow))
        until(lambda: visible(stream) == 0)
        time.sleep(0.5)  # until it is being run: what comes before that would join its batch
        for n in range(20):
            stream.send(charge(f"c{n}"))
        until(lambda: visible(stream) == 0)
        stream.service.stop()
    assert stream.memory("SELECT correlation_id, state FROM workflow") == [("slow", "succeeded")]
    assert stream.waiting(stream.origin) == visible(stream) == 20


def visible(stream: Stream) -> int:
    name = "ApproximateNumberOfMessages"
    found = stream.sqs.get_queue_attributes(QueueUrl=stream.origin, AttributeNames=[name])
    return int(found["Attributes"][name])


def start(
    sqs: ElasticMq, state: Path, *more: str, environment: dict[str, str] | None = None, **changes: str
) -> subprocess.CompletedProcess[str]:
    """Run the program to its end; it is expected not to start."""
    options = {"endpoint-url": sqs.endpoint, "region": REGION, "state": str(state)} | {
        name.replace("_", "-"): value for name, value in changes.items()
    }
    ours = {
        "DLQ_ORCHESTRATOR_TOKEN": "t",
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
    }
    return subprocess.run(
        [
            *(sys.executable, "-m", "dlq_orchestrator"),
            *(f"--{name}={value}" for name, value in options.items()),
            *more,
        ],
        env=os.environ | ours | (environment or {}),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_what_keeps_it_from_starting_is_said(elasticmq, stream, tmp_path):
    elsewhere = tmp_path / "other"
    elasticmq.create_queue(f"{stream.name}-plain")
    elasticmq.create_queue(f"{stream.name}.fifo")
    queue = stream.name
    for refused, code, says in [
        (start(elasticmq, elsewhere, origin_queue="nowhere"), 1, "there is no queue nowhere: create it"),
        (start(elasticmq, elsewhere, origin_queue=f"{queue}-plain"), 1, "has no redrive policy"),
        (start(elasticmq, elsewhere, origin_queue=f"{queue}.fifo"), 1, "is a FIFO queue"),
        (
            start(elasticmq, elsewhere, origin_queue=queue, endpoint_url="http://127.0.0.1:9"),
            1,
            "check --endpoint-url",
        ),
        (
            start(elasticmq, elsewhere, origin_queue=queue, region="no where"),
            1,
            "check --endpoint-url, --region",
        ),
        (start(elasticmq, elsewhere), 2, "either --origin-topic or --origin-queue"),
        (start(elasticmq, elsewhere, origin_queue=queue, origin_topic="t"), 2, "either --origin-topic or"),
        (start(elasticmq, elsewhere, origin_topic="t"), 2, "--origin-topic needs --bootstrap-servers too"),
        (start(elasticmq, stream.service.state, origin_queue=queue), 1, "is in use by another orchestrator"),
    ]:
        assert says in refused.stderr
        assert refused.returncode == code
        assert "Traceback" not in refused.stderr


def test_a_queue_that_is_deleted_ends_it_with_a_word(stream):
    stream.sqs.delete_queue(QueueUrl=stream.origin)
    until(lambda: f"{stream.name}: " in stream.service.log.read_text() and not stream.service.alive)
