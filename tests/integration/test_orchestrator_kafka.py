"""The reference orchestrator on a real broker: its dead letters, its outcomes, and what SIGKILL leaves."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Consumer, KafkaError, Message, Producer, TopicPartition

from dlq.orchestrator import OrchestratorUnreachable, Replay
from dlq.orchestrator_http import HttpOrchestrator
from dlq_demo.broker import Broker, create_topic
from dlq_demo.orchestrator import ReferenceOrchestrator
from dlq_orchestrator.plugins import TOOLS
from dlq_orchestrator.traffic import TrafficRecord, send, workflows


class Stream:
    """An orchestrator between two topics of its own."""

    def __init__(self, broker: Broker, folder: Path, *, dlq_config: dict[str, str] | None = None) -> None:
        self.bootstrap = broker.bootstrap
        suffix = uuid.uuid4().hex[:8]
        self.origin, self.dlq = f"orders-{suffix}", f"orders.dlq-{suffix}"
        create_topic(self.bootstrap, self.origin, 3)
        create_topic(self.bootstrap, self.dlq, 2, dlq_config)
        self.service = ReferenceOrchestrator(
            self.bootstrap, origin=self.origin, dlq=self.dlq, folder=folder, group=f"workers-{suffix}"
        )
        self.client = HttpOrchestrator(self.service.url, self.service.token)

    def produce(
        self, value: bytes | None, headers: Any = (), *, key: bytes | None = None, partition: int = 0
    ) -> None:
        producer = Producer({"bootstrap.servers": self.bootstrap, "message.max.bytes": 5_000_000})
        producer.produce(self.origin, key=key, value=value, headers=list(headers), partition=partition)
        assert producer.flush(10) == 0

    def read(self, topic: str) -> list[Message]:
        """All records of a topic, as a read_committed consumer sees them now."""
        consumer = Consumer(
            {
                "bootstrap.servers": self.bootstrap,
                "group.id": "test",
                "enable.auto.commit": False,
                "isolation.level": "read_committed",
                "enable.partition.eof": True,
            }
        )
        partitions = consumer.list_topics(topic).topics[topic].partitions
        consumer.assign([TopicPartition(topic, partition, 0) for partition in partitions])
        records, ends = [], 0
        while ends < len(partitions):
            message = consumer.poll(10)
            assert message is not None, f"{topic} is silent"
            if error := message.error():
                assert error.code() == KafkaError._PARTITION_EOF, error
                ends += 1
            else:
                records.append(message)
        consumer.close()
        return records

    def end(self, partition: int) -> int:
        """Where a partition of the origin ends."""
        client = Consumer({"bootstrap.servers": self.bootstrap, "group.id": "test"})
        _, end = client.get_watermark_offsets(TopicPartition(self.origin, partition), 10)
        client.close()
        return end

    def committed(self, partition: int) -> int:
        """The orchestrator's committed offset on its origin."""
        client = Consumer({"bootstrap.servers": self.bootstrap, "group.id": self.service.group})
        (position,) = client.committed([TopicPartition(self.origin, partition)], 10)
        client.close()
        return position.offset

    def dead_letters(self, at_least: int) -> list[Message]:
        return until(lambda: found if len(found := self.read(self.dlq)) >= at_least else None)

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
def stream(broker: Broker, tmp_path: Path) -> Iterator[Stream]:
    stream = Stream(broker, tmp_path)
    with stream.service:
        yield stream
    stream.client.close()


def until(holds: Callable[[], Any], seconds: float = 30.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.05)
    return found


def charge(correlation_id: str, **fault: Any) -> bytes:
    args: dict[str, Any] = {"amount_cents": 1000, "currency": "EUR"}
    if fault:
        args["fault"] = fault
    step = {"name": "charge", "plugin": "payments", "tool": "charge", "args": args}
    return json.dumps({"workflow": "order", "correlation_id": correlation_id, "steps": [step]}).encode()


def ours(message: Message) -> dict[str, str]:
    return {n.removeprefix("wf-"): v.decode() for n, v in message.headers() if n.startswith("wf-")}


def test_a_dead_letter_keeps_its_record_to_the_byte_and_says_why_it_failed(stream):
    own = [
        ("correlation-id", b"c1"),
        ("x", b"\x00\xff"),
        ("wf-error-type", b"an earlier failure"),
        ("x", b""),
        ("none", None),
        ("dlq-key", b"k1"),
        ("dlq-entry", b"kafka:abc/0/7"),
        ("traceparent", b"00-" + b"a" * 32 + b"-" + b"b" * 16 + b"-01"),
        ("retry-count", b"0"),
        ("dlq-retry-count", b"2"),
    ]
    value = charge("c1", error="RateLimit", attempts=99)
    stream.produce(value, own, key=b"\xfe\x00", partition=2)
    (letter,) = stream.dead_letters(1)
    (record,) = stream.read(stream.origin)
    assert (letter.key(), letter.value()) == (b"\xfe\x00", value)
    assert [h for h in letter.headers() if not h[0].startswith("wf-")] == [
        h for h in own if h[0][:3] != "wf-"
    ]
    said = ours(letter)
    assert said.pop("error-message").startswith("429 Too Many Requests from payments")
    assert "RateLimit" in said.pop("stack-trace")
    assert abs(int(said.pop("failed-at")) / 1000 - time.time()) < 60
    assert said == {
        "error-type": "RateLimit",
        "component": "payments.charge",
        "stage": "charge",
        "attempts": "3",
        "origin-topic": stream.origin,
        "origin-partition": "2",
        "origin-offset": "0",
        "origin-timestamp": str(record.timestamp()[1]),
        "consumer-group": stream.service.group,
    }
    assert stream.client.workflow("c1").trace_id == "a" * 32


def test_hostile_records_are_dead_lettered_as_they_are(stream):
    hostile = [None, b"", b"\xff\xfe\x00", b"{" * 1_000_000, b"[" * 100_000]
    for value in hostile:
        stream.produce(value)
    stream.produce(charge("after"))
    letters = stream.dead_letters(len(hostile))
    assert {letter.key() for letter in letters} == {None}
    assert {ours(letter)["error-type"] for letter in letters} == {"DataCorruption"}
    assert Counter(letter.value() for letter in letters) == Counter(hostile)
    stream.succeeded("after")


def test_a_flaky_step_is_tried_with_growing_waits_and_never_dead_lettered(stream):
    stream.produce(charge("c1", error="TransientNetwork", attempts=2))
    stream.succeeded("c1")
    assert [step.attempts for step in stream.client.workflow("c1").steps] == [3]
    assert stream.read(stream.dlq) == []


def test_a_replay_of_the_dead_letter_is_told_by_its_key_and_has_its_effect_once(stream):
    stream.produce(charge("c1", error="PluginError", attempts=4), [("dedupe-key", b"d1")])
    (letter,) = stream.dead_letters(1)
    for retry_count in (1, 2, 3):
        ours_now = [("dlq-key", f"k{retry_count}".encode()), ("dlq-retry-count", str(retry_count).encode())]
        stream.produce(letter.value(), [*letter.headers(), *ours_now])
        until(
            lambda key=f"k{retry_count}": stream.client.outcomes([key])[key].state in ("succeeded", "failed")
        )
    assert {k: o.state for k, o in stream.client.outcomes(["k1", "k2", "k3"]).items()} == {
        "k1": "failed",
        "k2": "succeeded",
        "k3": "succeeded",
    }
    assert len(stream.dead_letters(2)) == 2
    assert stream.memory("SELECT effect_key FROM effect") == [("d1/charge",)]


def test_a_workflow_is_replayed_to_the_byte_with_the_replays_own_headers(stream):
    headers = [
        ("h", b"1"),
        ("h", None),
        ("dedupe-key", b"d"),
        ("bytes", b"\xff\x00"),
        ("dlq-key", b"earlier"),
    ]
    value = charge("c", error="PluginError", attempts=4)
    stream.produce(value, headers, key=b"\x00key")
    until(lambda: stream.client.failures(["c"]))
    for _ in range(2):
        answer = stream.client.replay_workflows([Replay("c", "k", 1, headers={"dlq-entry": "e"})])
        assert answer["k"].state == "accepted"
    until(lambda: stream.client.outcomes(["k"])["k"].state == "failed")
    _, replayed = sorted(stream.read(stream.origin), key=lambda message: message.timestamp())
    assert (replayed.key(), replayed.value()) == (b"\x00key", value)
    ours = [("dlq-entry", b"e"), ("dlq-key", b"k"), ("dlq-retry-count", b"1")]
    assert replayed.headers() == [*headers[:-1], *ours]


def test_a_replay_too_large_for_the_origin_is_refused_beside_those_it_takes(stream):
    for n in range(3):
        stream.produce(charge(f"c{n}", error="PluginError", attempts=1))
    until(lambda: len(stream.client.failures(["c0", "c1", "c2"])) == 3)
    answer = stream.client.replay_workflows(
        [Replay("c0", "k0", 1), Replay("c1", "k1", 1, value=os.urandom(2_000_000)), Replay("c2", "k2", 1)]
    )
    assert {key: said.why for key, said in answer.items()} == {"k0": None, "k1": "not_taken", "k2": None}
    until(lambda: {state.state for state in stream.client.outcomes(["k0", "k2"]).values()} == {"succeeded"})


def test_what_failed_under_another_dedupe_key_is_run_though_its_workflow_has_succeeded(stream):
    stream.produce(charge("c"), [("dedupe-key", b"first")])
    stream.succeeded("c")
    other = charge("c", error="PluginError", attempts=1).replace(b'"charge"', b'"charge again"', 1)
    stream.produce(other, [("dedupe-key", b"second")])
    until(lambda: stream.memory("SELECT 1 FROM record"))
    stream.client.replay_workflows([Replay("c", "k", 1)])
    until(lambda: stream.client.outcomes(["k"])["k"].state == "succeeded")
    until(lambda: not stream.memory("SELECT 1 FROM record"))
    assert stream.memory("SELECT key FROM dedupe ORDER BY key") == [("first",), ("second",)]


def test_a_failed_outcome_is_only_told_once_its_dead_letter_is_in_the_dlq(stream):
    for n in range(8):
        stream.produce(charge(f"c{n}", error="ScopeViolation", attempts=99), [("dlq-key", f"k{n}".encode())])
        until(lambda key=f"k{n}": stream.client.outcomes([key])[key].state == "failed")
        assert len(stream.read(stream.dlq)) == n + 1


def test_paused_routing_holds_failures_through_sigkill_lets_replays_pass_and_releases_on_resume(stream):
    stream.client.pause_routing("drain-1", 600)
    for n in range(5):
        stream.produce(charge(f"c{n}", error="ScopeViolation", attempts=99), [("n", str(n).encode())])
    until(lambda: stream.client.routing().held == 5)
    assert stream.read(stream.dlq) == []
    stream.produce(charge("r", error="ScopeViolation", attempts=99), [("dlq-key", b"k"), ("n", b"replay")])
    (letter,) = stream.dead_letters(1)
    assert dict(letter.headers())["n"] == b"replay"

    stream.service.kill()
    stream.service.start()
    assert (stream.client.routing().holder, stream.client.routing().held) == ("drain-1", 5)
    assert stream.client.workflow("c0").state == "failed"
    stream.client.resume_routing("drain-1")
    until(lambda: stream.client.routing().held == 0)
    released = [m for m in stream.read(stream.dlq) if dict(m.headers())["n"] != b"replay"]
    assert Counter(dict(m.headers())["n"] for m in released) == Counter(str(n).encode() for n in range(5))
    assert {ours(m)["origin-topic"] for m in released} == {stream.origin}


def test_a_routing_lease_that_nobody_extends_ends_by_itself(stream):
    began = time.monotonic()
    stream.client.pause_routing("a worker that is killed now", 2)
    stream.produce(charge("c", error="ScopeViolation", attempts=99))
    until(lambda: stream.client.routing().held == 1)
    stream.dead_letters(1)
    assert time.monotonic() - began >= 2
    assert (stream.client.routing().mode, stream.client.routing().held) == ("auto", 0)


def test_once_a_pause_is_answered_nothing_more_is_dead_lettered(stream):
    producer = Producer({"bootstrap.servers": stream.bootstrap})
    for n in range(3000):
        producer.produce(stream.origin, value=charge(f"c{n}", error="ScopeViolation", attempts=99))
    assert producer.flush(30) == 0
    stream.dead_letters(1)
    stream.client.pause_routing("drain-1", 600)
    before = len(stream.read(stream.dlq))
    until(lambda: stream.client.success_rate(600).failed == 3000)
    assert len(stream.read(stream.dlq)) == before
    assert stream.client.routing().held == 3000 - before
    stream.client.resume_routing("drain-1")
    assert len(stream.dead_letters(3000)) == 3000


def test_a_dead_letter_the_dlq_cannot_take_is_kept_and_does_not_stop_the_others(broker, tmp_path):
    stream = Stream(broker, tmp_path, dlq_config={"max.message.bytes": "100000"})
    with stream.service, stream.client:
        # held while routing is paused, both are written together; random, so that compression doesn't save it
        stream.client.pause_routing("test", 600)
        stream.produce(random.Random(1).randbytes(200_000))
        stream.produce(charge("c", error="ScopeViolation", attempts=99))
        until(lambda: stream.client.routing().held == 2)
        stream.client.resume_routing("test")
        (letter,) = stream.dead_letters(1)
        assert ours(letter)["error-type"] == "ScopeViolation"
        until(lambda: stream.client.routing().undeliverable == 1)
        stream.produce(charge("after"))
        stream.succeeded("after")
    ((kept,),) = stream.memory("SELECT value FROM held WHERE undeliverable")
    assert kept == random.Random(1).randbytes(200_000)


def test_a_workflow_of_an_aborted_transaction_is_not_run(stream):
    producer = Producer({"bootstrap.servers": stream.bootstrap, "transactional.id": uuid.uuid4().hex})
    producer.init_transactions(30)
    producer.begin_transaction()
    producer.produce(stream.origin, value=charge("aborted"), partition=0)
    producer.flush()
    producer.abort_transaction(30)
    stream.produce(charge("after"), partition=0)
    stream.succeeded("after")
    assert stream.client.workflow("aborted") is None


@pytest.mark.parametrize("kills", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_sigkill_at_random_moments_leaves_each_effect_once_and_loses_no_dead_letter(stream, kills, capsys):
    """A crash between a dead letter's acknowledgement and the record of it writes it twice: counted."""
    dice = random.Random()
    each = 2000
    count = each * kills
    records = list(workflows(count, dice.getrandbits(32)))
    producer = Producer({"bootstrap.servers": stream.bootstrap})
    for round_ in range(kills):
        send(producer, stream.origin, records[round_ * each : (round_ + 1) * each])
        time.sleep(dice.uniform(0, 1.5))  # the random moment
        stream.service.kill()
        stream.service.start()
    until(lambda: stream.client.success_rate(3600).total == count, seconds=120)

    effects = Counter(key for (key,) in stream.memory("SELECT effect_key FROM effect"))
    doubled = [key for key, times in effects.items() if times > 1]
    failed = {dict(r.headers)["correlation-id"] for r in records if r.kind not in ("healthy", "flaky")}
    letters = Counter(dict(m.headers())["correlation-id"] for m in stream.read(stream.dlq))
    with capsys.disabled():
        print(
            f"\n{kills} kills over {count} workflows: {len(effects)} effects, {len(doubled)} doubled; "
            f"{len(failed)} failures, {len(failed - letters.keys())} lost, "
            f"{letters.total() - len(letters)} dead-lettered twice"
        )
    assert doubled == []
    assert effects.keys() >= {key for r in records if r.kind in ("healthy", "flaky") for key in effects_of(r)}
    assert letters.keys() == failed


def test_sigkill_in_the_middle_of_a_thousand_replays_leaves_each_effect_once(stream, capsys):
    """Asked for over HTTP: an answer that was lost with the process is asked for again, under the same keys."""
    dice = random.Random()
    records = list(workflows(1000, dice.getrandbits(32), {"plugin_error": 1, "transient": 1}))
    send(Producer({"bootstrap.servers": stream.bootstrap}), stream.origin, records)
    until(lambda: stream.client.success_rate(3600).failed == 1000, seconds=60)
    replays = [
        Replay(dict(r.headers)["correlation-id"].decode(), f"replay-{n}", 1) for n, r in enumerate(records)
    ]

    def ask() -> None:
        left = [replays[first : first + 100] for first in range(0, len(replays), 100)]
        while left:
            with suppress(OrchestratorUnreachable):
                answer = stream.client.replay_workflows(left[0])
                assert {replayed.state for replayed in answer.values()} == {"accepted"}
                left.pop(0)

    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(ask)
        for _ in range(3):
            time.sleep(dice.uniform(0.05, 0.5))  # the random moment
            stream.service.kill()
            stream.service.start()
        asking.result(120)

    keys = [replay.key for replay in replays]
    until(lambda: {o.state for o in stream.client.outcomes(keys).values()} == {"succeeded"}, seconds=60)
    effects = Counter(key for (key,) in stream.memory("SELECT effect_key FROM effect"))
    put = sum(any(name == "dlq-key" for name, _ in m.headers()) for m in stream.read(stream.origin))
    with capsys.disabled():
        print(f"\n3 kills in 1000 replays: {put} records put in, {len(effects)} effects, each once")
    assert effects == Counter({key for record in records for key in effects_of(record)})
    assert put >= 1000


def effects_of(record: TrafficRecord) -> list[str]:
    """The effects a workflow has once it succeeded."""
    dedupe_key = dict(record.headers)["dedupe-key"]
    assert dedupe_key is not None
    steps = json.loads(record.value)["steps"]
    return [f"{dedupe_key.decode()}/{s['name']}" for s in steps if TOOLS[s["plugin"], s["tool"]].effect]


@pytest.mark.slow
def test_a_broker_that_restarts_costs_nothing_but_time(tmp_path):
    records = list(workflows(2000, 11))
    with Broker(tmp_path / "kafka") as broker:
        stream = Stream(broker, tmp_path)
        with stream.service, stream.client:
            producer = Producer({"bootstrap.servers": stream.bootstrap})
            send(producer, stream.origin, records[:1000])
            broker.restart()
            send(producer, stream.origin, records[1000:])
            until(lambda: stream.client.success_rate(3600).total == 2000, seconds=60)
            ends = {p: stream.end(p) for p in range(3)}
            until(lambda: {p: stream.committed(p) for p in range(3)} == ends)
            failed = {
                dict(r.headers)["correlation-id"] for r in records if r.kind not in ("healthy", "flaky")
            }
            assert {dict(m.headers())["correlation-id"] for m in stream.read(stream.dlq)} == failed
    effects = Counter(key for (key,) in stream.memory("SELECT effect_key FROM effect"))
    assert set(effects.values()) == {1}


def test_fenced_by_a_member_of_its_own_name_it_joins_again(stream):
    ((instance,),) = stream.memory("SELECT id FROM instance")
    rival = Consumer(
        {
            "bootstrap.servers": stream.bootstrap,
            "group.id": stream.service.group,
            "group.instance.id": f"orchestrator-{instance}",
            "enable.auto.commit": False,
        }
    )
    joined: list[Any] = []
    rival.subscribe([stream.origin], on_assign=lambda _, partitions: joined.append(partitions))
    until(lambda: rival.poll(0.1) or joined)
    rival.close()
    for partition in range(3):
        stream.produce(charge(f"c{partition}"), partition=partition)
        stream.succeeded(f"c{partition}")
    assert "fenced, joins again" in stream.service.log.read_text()


def test_sigterm_ends_it_in_order(stream):
    stream.produce(charge("c1"))
    stream.succeeded("c1")
    began = time.monotonic()
    stream.service.stop()
    assert time.monotonic() - began < 8
    assert stream.committed(0) == 1


def start(stream: Stream, state: Path, token: str = "t", **changes: str) -> subprocess.CompletedProcess[str]:
    """Run the program to its end; it is expected not to start."""
    options = {
        "bootstrap-servers": stream.bootstrap,
        "origin-topic": stream.origin,
        "dlq-topic": stream.dlq,
        "group": "g",
        "state": str(state),
    } | {name.replace("_", "-"): value for name, value in changes.items()}
    return subprocess.run(
        [sys.executable, "-m", "dlq_orchestrator", *(f"--{name}={value}" for name, value in options.items())],
        env=os.environ | {"DLQ_ORCHESTRATOR_TOKEN": token},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_what_keeps_it_from_starting_is_said(stream, tmp_path):
    elsewhere = tmp_path / "other"
    for refused, says in [
        (start(stream, stream.service.state), "is in use by another orchestrator"),
        (
            start(stream, elsewhere, dlq_topic="nowhere"),
            "there is no topic nowhere: create it, or correct --dlq-topic",
        ),
        (start(stream, elsewhere, bootstrap_servers="127.0.0.1:9"), "no Kafka broker answers at 127.0.0.1:9"),
        (start(stream, elsewhere, port=str(stream.service.port)), "choose another --port"),
        (start(stream, elsewhere, token=""), "DLQ_ORCHESTRATOR_TOKEN must hold the bearer token"),
    ]:
        assert refused.returncode == 1
        assert says in refused.stderr
        assert "Traceback" not in refused.stderr


def test_it_prints_one_line_and_ends_well_on_sigterm(stream, tmp_path):
    stream.service.stop()
    program = subprocess.Popen(
        [
            *(sys.executable, "-m", "dlq_orchestrator", "--bootstrap-servers", stream.bootstrap),
            *(
                "--origin-topic",
                stream.origin,
                "--dlq-topic",
                stream.dlq,
                "--group",
                f"{stream.service.group}-2",
            ),
            *("--state", str(tmp_path / "other")),
        ],
        env=os.environ | {"DLQ_ORCHESTRATOR_TOKEN": "t"},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert program.stdout is not None
        url = program.stdout.readline().removeprefix("ready ").strip()
        with HttpOrchestrator(url, "t") as client:
            assert client.capabilities()
        program.send_signal(signal.SIGTERM)
        rest, _ = program.communicate(timeout=20)
        assert (rest, program.returncode) == ("", 0)
    finally:
        program.kill()
