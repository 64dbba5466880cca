"""A queue to drain on a real broker, its target's consumer, worker processes to kill, and the accounts to hold
against each other.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sqlite3
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from operator import methodcaller
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from confluent_kafka import (
    Consumer,
    ConsumerGroupTopicPartitions,
    KafkaError,
    KafkaException,
    Producer,
    TopicPartition,
)
from confluent_kafka.admin import AdminClient, NewPartitions
from sqlalchemy import text
from tests.forks import FORKS
from tests.integration import worker

from dlq.archive import Archive, Rows
from dlq.config import OrchestratorRef, QueueConfig
from dlq.drain import Drain, drain_id
from dlq.entry import payload_sha
from dlq.errors import QueueBusy
from dlq.intake import take_custody
from dlq.ledger import Ledger, lease
from dlq.opening import open_drain
from dlq.orchestrator_http import HttpOrchestrator
from dlq.ports import Connection, Connections
from dlq.replay import drain_remaining, replay_batches, replay_canary
from dlq.triage import categorize
from dlq_demo.broker import Broker, create_topic
from dlq_demo.orchestrator import ReferenceOrchestrator

TRANSIENT = ("TransientNetwork", "RateLimit", "PluginTimeout")
"""Error types the taxonomy retries; the others wait for a fix or a person."""
OTHERS = ("QuotaExceeded", "MemoryQuotaExceeded", "ScopeViolation", "DataCorruption", "PluginError")

SENT = "('replayed', 'confirmed', 'returned', 'handed_back')"


class Seen(NamedTuple):
    """A record as a fresh consumer saw it; ``headers`` None where the client can't represent a name."""

    part: int
    offset: int
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes | None], ...] | None
    timestamp: int

    def header(self, name: str) -> str | None:
        found = dict(self.headers or ()).get(name)
        return None if found is None else found.decode("utf-8", "replace")


def _kafka(bootstrap: str) -> dict[str, Any]:
    """A Connection to a broker, its fields as JSON has them."""
    return {"conn_type": "kafka", "extra": {"bootstrap.servers": bootstrap}}


def wait_until(condition: Callable[[], Any], what: str, *, seconds: float = 30.0) -> Any:
    """Poll ``condition`` until it is true and return it."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {seconds:.0f} s"
        time.sleep(0.02)
    return found


def failure(
    number: int,
    error_type: str,
    *,
    topic: str = "elsewhere",
    part: int = 0,
    offset: int | None = None,
    **extra: bytes,
) -> list[tuple[str, bytes | None]]:
    """What the orchestrator writes onto the ``number``-th dead letter, after the failed record's own headers."""
    return [
        ("tenant", b"t%d" % (number % 7)),
        ("correlation-id", b"c-%d" % number),
        ("dedupe-key", b"d-%d" % number),
        (
            "traceparent",
            b"00-%s-00f067aa0ba902b7-01" % uuid.uuid5(uuid.NAMESPACE_OID, str(number)).hex.encode(),
        ),
        ("retry-count", b"0"),
        ("wf-error-type", error_type.encode()),
        ("wf-error-message", b"HTTP 503 from upstream" if error_type in TRANSIENT else b"it broke"),
        ("wf-component", b"payments.charge"),
        ("wf-stage", b"charge"),
        ("wf-attempts", b"3"),
        ("wf-failed-at", b"%d" % (time.time() * 1000)),
        ("wf-origin-topic", topic.encode()),
        ("wf-origin-partition", b"%d" % part),
        ("wf-origin-offset", b"%d" % (1_000_000 + number if offset is None else offset)),
        ("wf-origin-timestamp", b"%d" % (time.time() * 1000)),
        ("wf-consumer-group", b"orders-workers"),
        ("wf-stack-trace", b"Traceback (most recent call last): ..."),
        *((name.replace("_", "-"), value) for name, value in extra.items()),
    ]


class Rig:
    """One queue: DLQ and origin topics, ledger and archive of its own, under names nobody else uses.

    :param limits: of the queue's file; ``target`` too.
    :param tuning: of worker processes and of drains opened here: ``batch`` (entries an intake batch),
    ``records`` (a transaction).
    """

    def __init__(
        self,
        bootstrap: str,
        folder: Path,
        *,
        parts: int = 3,
        limits: Mapping[str, Any] | None = None,
        target: Mapping[str, Any] | None = None,
        outcome: Mapping[str, Any] | None = None,
        dlq_config: Mapping[str, str] | None = None,
        origin_config: Mapping[str, str] | None = None,
        tuning: Mapping[str, Any] | None = None,
    ) -> None:
        self.bootstrap = bootstrap
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.queue = f"q{uuid.uuid4().hex[:10]}"
        self.dlq, self.origin, self.group = (
            f"{self.queue}.dlq",
            f"{self.queue}.orders",
            f"{self.queue}.workers",
        )
        self.tuning = {"lease_s": 300.0, "grace_s": 0.0, "batch": 5_000, "records": 1_000, **(tuning or {})}
        create_topic(bootstrap, self.dlq, parts, {"max.message.bytes": "8388608", **(dlq_config or {})})
        create_topic(bootstrap, self.origin, parts, origin_config)
        self.data = {
            "name": self.queue,
            "source": {"kind": "kafka", "connection": "kafka", "topic": self.dlq, "start": "earliest"},
            "target": {
                "kind": "kafka",
                "connection": "kafka",
                "allow": [self.origin],
                "group": self.group,
                **(target or {}),
            },
            "limits": {"dr": 1_000_000, **(limits or {})},
            "outcome": {"grace": "30ms", "deadline": "20s", **(outcome or {})},
            "ledger": f"sqlite:///{folder}/ledger.db",
            "archive": str(folder / "archive"),
            "report": str(folder / "report"),
        }
        self.connection_data = {"kafka": _kafka(bootstrap)}
        self._begin()

    def _begin(self) -> None:
        """Make the ledger; nothing runs yet."""
        self.config = QueueConfig.model_validate(self.data)
        Ledger.create(self.config.ledger)
        self._admin: AdminClient | None = None
        self._drains: list[Drain] = []
        self._workers: list[Worker] = []
        self._consumers: list[TargetConsumer] = []
        self._number = 0

    # Ends

    def close(self) -> None:
        for process in self._workers:
            process.kill()
        for consumer in self._consumers:
            consumer.stop()
        for drain in self._drains:
            drain.close()

    @property
    def connections(self) -> Connections:
        return lambda name: Connection(name, **self.connection_data[name])

    # Dead letters

    def letters(self, count: int, *, kinds: Sequence[str] = TRANSIENT, keys: int | None = None) -> None:
        """Dead-letter ``count`` more records: keyed ``k<n>`` (of ``keys`` keys in order), kinds in turn."""
        records = []
        for _ in range(count):
            n = self._number
            self._number += 1
            key = b"k%d" % (n if keys is None else n % keys)
            value = json.dumps({"order": n, "filler": "x" * (n % 200)}).encode()
            records.append((key, value, failure(n, kinds[n % len(kinds)], topic=self.origin)))
        self.produce(self.dlq, records)

    @property
    def dead_lettered(self) -> int:
        """How many :meth:`letters` were sent."""
        return self._number

    def produce(
        self,
        topic: str,
        records: Iterable[tuple[bytes | None, bytes | None, Sequence[tuple[str, bytes | None]]]],
        **settings: Any,
    ) -> list[tuple[int, int]]:
        """Send records of (key, value, headers); returns where each went."""
        config = {
            "bootstrap.servers": self.bootstrap,
            "linger.ms": 5,
            "message.max.bytes": 16 << 20,
            "partitioner": "murmur2_random",
        }
        producer = Producer(config)
        places: dict[int, tuple[int, int]] = {}

        def report(number: int) -> Callable[[KafkaError | None, Any], None]:
            def delivered(error: KafkaError | None, message: Any) -> None:
                assert error is None, f"the test's own record {number} was refused: {error}"
                places[number] = (message.partition(), message.offset())

            return delivered

        sent = 0
        for number, (key, value, headers) in enumerate(records):
            producer.produce(
                topic, value=value, key=key, headers=list(headers), on_delivery=report(number), **settings
            )
            sent += 1
            producer.poll(0)
        assert producer.flush(30) == 0
        return [places[n] for n in range(sent)]

    def another_topic(self, name: str, config: Mapping[str, str] | None = None) -> str:
        topic = f"{self.queue}.{name}"
        create_topic(self.bootstrap, topic, 1, config)
        return topic

    def admin(self) -> AdminClient:
        """Kept: a client that is dropped takes its unfinished calls along."""
        if self._admin is None:
            self._admin = AdminClient({"bootstrap.servers": self.bootstrap})
        return self._admin

    def add_partitions(self, topic: str, count: int) -> None:
        """Grow a topic to ``count`` partitions, and wait until clients see them led."""
        admin = self.admin()
        admin.create_partitions([NewPartitions(topic, count)])[topic].result(10)
        wait_until(
            lambda: (
                [
                    p.leader >= 0
                    for p in admin.list_topics(topic, timeout=10).topics[topic].partitions.values()
                ]
                == [True] * count
            ),
            f"{count} partitions of {topic}",
        )

    def committed(self, group: str, topic: str) -> dict[int, int]:
        asked = ConsumerGroupTopicPartitions(group, [TopicPartition(topic, p) for p in self.ends(topic)])
        found = self.admin().list_consumer_group_offsets([asked])[group].result(10).topic_partitions
        return {p.partition: p.offset for p in found if p.offset >= 0}

    def commit(self, group: str, topic: str, offsets: Mapping[int, int]) -> None:
        asked = ConsumerGroupTopicPartitions(group, [TopicPartition(topic, p, o) for p, o in offsets.items()])
        self.admin().alter_consumer_group_offsets([asked])[group].result(10)

    def delete_groups(self, *groups: str) -> None:
        for future in self.admin().delete_consumer_groups(list(groups)).values():
            future.result(10)

    def ends(self, topic: str, isolation: str = "read_committed") -> dict[int, int]:
        """The end of each partition; at read_committed, open transactions and what is behind them left out."""
        client = Consumer(
            {"bootstrap.servers": self.bootstrap, "group.id": "fresh", "isolation.level": isolation}
        )
        try:
            parts = client.list_topics(topic, timeout=10).topics[topic].partitions
            return {p: client.get_watermark_offsets(TopicPartition(topic, p), timeout=10)[1] for p in parts}
        finally:
            client.close()

    def delete_records(self, topic: str, upto: Mapping[int, int]) -> None:
        for future in (
            self.admin().delete_records([TopicPartition(topic, p, o) for p, o in upto.items()]).values()
        ):
            future.result(10)

    def delete_topic(self, topic: str) -> None:
        admin = self.admin()
        admin.delete_topics([topic])[topic].result(10)
        wait_until(lambda: topic not in admin.list_topics(timeout=10).topics, f"{topic} is deleted")

    # The ledger's file

    @property
    def _ledger_file(self) -> Path:
        return self.folder / "ledger.db"

    def back_up_ledger(self) -> Path:
        """A copy, as a backup of a live database makes it."""
        copy = self.folder / f"backup-{uuid.uuid4().hex}.db"
        with closing(sqlite3.connect(self._ledger_file)) as live, closing(sqlite3.connect(copy)) as kept:
            live.backup(kept)
        return copy

    def restore_ledger(self, backup: Path) -> None:
        self.lose_ledger()
        shutil.copyfile(backup, self._ledger_file)

    def lose_ledger(self) -> None:
        for drain in self._drains:
            drain.close()
        self._drains.clear()
        for suffix in ("", "-wal", "-shm"):
            self._ledger_file.with_name(f"ledger.db{suffix}").unlink(missing_ok=True)

    # Drains in this process

    def open(self, run: str = "r1", **how: Any) -> Drain:
        """Open a drain here, waiting out the lease of a killed one."""
        lease.GRACE_S = self.tuning["grace_s"]
        deadline = time.monotonic() + 30
        while True:
            try:
                drain = open_drain(
                    self.config,
                    run_id=run,
                    connections=self.connections,
                    lease_s=self.tuning["lease_s"],
                    **how,
                )
                break
            except QueueBusy:
                if self.tuning["lease_s"] > 30 or time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
        self._drains.append(drain)
        return drain

    def attach(self, run: str = "r1") -> Drain:
        drain = Drain.attach(drain_id(self.queue, run), config=self.config, connections=self.connections)
        self._drains.append(drain)
        return drain

    def release(self, drain: Drain) -> None:
        lease.release(drain.ledger, drain.queue, drain.id, drain.epoch, "green")
        drain.close()
        self._drains.remove(drain)

    def expire_lease(self) -> None:
        """As if the holder's lease had ended long ago."""
        self.write(
            "UPDATE queue SET lease_until = '2020-01-01T00:00:00.000+00:00' WHERE name = :q", q=self.queue
        )

    def begin(self) -> None:
        """The queue's first intake, while it is empty: what comes later needs no decision of a person."""
        drain = self.open("set-up")
        take_custody(drain, 30)
        self.release(drain)

    def replay(self, drain: Drain, seconds: float = 60) -> list[dict[str, Any]]:
        """Categorize and replay what is ready: canary, then the batches; returns what each job did."""
        categorize(drain)
        first = replay_canary(drain, "retry_transient", seconds)
        return [replay_batches(drain, job, seconds) for job in first["jobs"]]

    def drain(self, run: str, seconds: float = 60) -> Drain:
        """A whole drain in this process, still open when this returns."""
        drain = self.open(run)
        take_custody(drain, seconds)
        self.replay(drain, seconds)
        drain_remaining(drain, seconds)
        return drain

    # The target's side

    def consumer(self, **how: Any) -> TargetConsumer:
        """Start the target's consumer; see :class:`TargetConsumer`."""
        consumer = TargetConsumer(self, **how)
        self._consumers.append(consumer)
        consumer.start()
        return consumer

    # Worker processes

    def worker(
        self, *steps: str, die: str | None = None, stop: str | Sequence[str] = (), **tuning: Any
    ) -> Worker:
        """A process of its own that does ``steps`` in turn; see :mod:`tests.integration.worker`."""
        spec = {
            "config": self.config.model_dump(mode="json"),
            "connections": self.connection_data,
            **self.tuning,
            **tuning,
            "die": die,
            "stop": [stop] if isinstance(stop, str) else list(stop),
        }
        process = Worker(self.folder / f"worker-{len(self._workers)}", spec, steps)
        self._workers.append(process)
        return process

    # Accounts

    def sql(self, statement: str, **values: Any) -> list[Any]:
        ledger = Ledger.open(self.config.ledger)
        try:
            with ledger.read() as tx:
                return list(tx.execute(text(statement), values).all())
        finally:
            ledger.close()

    def write(self, statement: str, **values: Any) -> None:
        ledger = Ledger.open(self.config.ledger)
        try:
            with ledger.write(self.queue, None) as tx:
                tx.execute(text(statement), values)
        finally:
            ledger.close()

    def notes(self, drain: Drain) -> str:
        """What a drain said in its timeline."""
        return "\n".join(
            r.text for r in self.sql("SELECT text FROM event WHERE drain = :d ORDER BY id", d=drain.id)
        )

    def count(self, where: str = "TRUE") -> int:
        return int(self.sql(f"SELECT COUNT(*) FROM entry WHERE {where}")[0][0])

    def states(self) -> dict[str, int]:
        """How many entries are in each state; of open ones with each reason (``open:reason``)."""
        rows = self.sql(
            "SELECT CASE WHEN state = 'open' THEN 'open:' || reason ELSE state END, COUNT(*) FROM entry GROUP BY 1"
        )
        return {str(state): int(n) for state, n in rows}

    def log(self, topic: str, isolation: str = "read_committed") -> list[Seen]:
        return read_all(self.bootstrap, topic, isolation)

    def effects(self, *, when: str = "") -> list[Seen]:
        """The replays on the origin as a read_committed consumer counts them; prints what a read_uncommitted
        one would.
        """
        committed = [s for s in self.log(self.origin) if s.header("dlq-entry")]
        uncommitted = [s for s in self.log(self.origin, "read_uncommitted") if s.header("dlq-entry")]
        distinct = len({s.header("dlq-entry") for s in uncommitted})
        print(
            f"{when or self.queue}: effects of {len({s.header('dlq-entry') for s in committed})} entries: "
            f"{len(committed)} at read_committed, "
            f"{len(uncommitted)} (of {distinct} entries) at read_uncommitted"
        )
        return committed

    # What must hold whatever was killed

    def check_custody(self) -> None:
        """Each record of the DLQ is exactly one row, its bytes are in the archive, and the ranges chain
        without a gap.
        """
        log = {(s.part, str(s.offset)): s for s in self.log(self.dlq)}
        rows = self.sql(
            "SELECT e.part, e.place, e.payload_sha, s.uri, e.row_no FROM entry e JOIN segment s ON s.id = "
            "e.segment ORDER BY s.uri"
        )
        places = Counter((r.part, r.place) for r in rows)
        assert not [p for p, n in places.items() if n > 1], "a place has two rows"
        assert set(places) == set(log), (
            f"{len(set(log) - set(places))} records have no row, {len(set(places) - set(log))} rows no record"
        )
        archive, uri, segment = Archive(self.config.archive, self.queue), "", None
        for row in rows:
            if row.uri != uri:
                uri, segment = row.uri, Rows(archive.read(row.uri))
            assert segment is not None
            stored, seen = segment[row.row_no], log[row.part, row.place]
            assert (stored.key, stored.value, stored.headers, stored.timestamp_ms) == (
                seen.key,
                seen.value,
                seen.headers or (),
                seen.timestamp,
            )
            assert payload_sha(stored.key, stored.value) == row.payload_sha
        self.check_chain()

    def check_chain(self) -> None:
        gaps = self.sql(
            "SELECT part, round, from_pos, prev FROM (SELECT part, round, from_pos, LAG(to_pos) OVER "
            "(PARTITION BY source, part ORDER BY round) "
            "AS prev FROM intake) r WHERE prev IS NOT NULL AND from_pos <> prev"
        )
        assert gaps == [], f"the chain of ranges has a gap or an overlap: {gaps}"

    def check_effects(self, *, when: str = "") -> list[Seen]:
        """What is settled as sent is on the target exactly once at read_committed, nothing else is, and each
        has its own bytes.
        """
        seen = self.effects(when=when)
        on_target = Counter((s.header("dlq-job"), int(s.header("dlq-ordinal") or -1)) for s in seen)
        settled = self.sql(
            "SELECT je.job, je.ordinal, je.idem_key, src.uri || '/' || e.part || '/' || e.place AS ref, e.part "
            "AS p, e.place AS o, d.part, d.pos "
            "FROM entry e JOIN job_entry je ON je.entry = e.id AND je.job = e.job JOIN source src ON src.id = e.source "
            f"LEFT JOIN delivery d ON d.job = je.job AND d.ordinal = je.ordinal WHERE e.state IN {SENT}"
        )
        expected = Counter((r.job, r.ordinal) for r in settled)
        doubled = [k for k, n in on_target.items() if n > 1]
        assert not doubled, f"{len(doubled)} ordinals are on the target more than once: {doubled[:5]}"
        assert on_target == expected, (
            f"on the target, not settled: {len(on_target - expected)}; settled, not on the target: "
            f"{len(expected - on_target)}"
        )
        assert max(Counter(s.header("dlq-entry") for s in seen).values(), default=1) == 1, (
            "an entry had its effect twice"
        )
        assert max(Counter(s.header("dlq-key") for s in seen).values(), default=1) == 1, (
            "a key was used twice"
        )
        dead = {(s.part, str(s.offset)): s for s in self.log(self.dlq)}
        by_place = {(s.header("dlq-job"), int(s.header("dlq-ordinal") or -1)): s for s in seen}
        for row in settled:
            sent, letter = by_place[row.job, row.ordinal], dead.get((row.p, row.o))
            assert (sent.header("dlq-entry"), sent.header("dlq-key")) == (row.ref, row.idem_key)
            assert (row.part, row.pos) == (sent.part, sent.offset), f"{row.ref} is not where the ledger says"
            if letter is not None:  # retention may have taken it since
                assert (sent.key, sent.value) == (letter.key, letter.value)
                assert _own(sent) == _own(letter)
        return seen

    def check_nothing_pending(self) -> None:
        assert self.count("state IN ('planned', 'sending')") == 0
        assert self.sql("SELECT id FROM job WHERE state NOT IN ('closed')") == []
        assert self.count("state = 'open' AND reason = 'new'") == 0


class TargetConsumer(threading.Thread):
    """The program behind the origin topic: reads it at read_committed under the queue's group, and counts effects.

    :param fails: says which records fail; they are dead-lettered before the position passes them.
    :param keeps: what a dead letter keeps: ``headers`` (all of the failed record's, ours too, as the orchestrator does)
        or ``place`` (only where it failed).
    """

    def __init__(
        self, rig: Rig, *, fails: Callable[[Seen], bool] = lambda _: False, keeps: str = "headers"
    ) -> None:
        super().__init__(daemon=True, name="target-consumer")
        self._rig = rig
        self._fails = fails
        self._keeps = keeps
        self._over = threading.Event()
        self.effects: Counter[str] = Counter()
        self.failed: list[Seen] = []
        self.error: BaseException | None = None
        self._ready = threading.Event()

    def start(self) -> None:
        super().start()
        assert self._ready.wait(30), "the target's consumer did not start"

    def stop(self) -> None:
        self._over.set()
        self.join(30)
        assert self.error is None, self.error

    def run(self) -> None:
        try:
            self._consume()
        except BaseException as error:
            self.error = error
            self._ready.set()
            raise

    def _consume(self) -> None:
        rig = self._rig
        client = Consumer(
            {
                "bootstrap.servers": rig.bootstrap,
                "group.id": rig.group,
                "isolation.level": "read_committed",
                "auto.offset.reset": "earliest",
                "enable.auto.commit": False,
                "log_level": 0,
            }
        )
        parts = client.list_topics(rig.origin, timeout=10).topics[rig.origin].partitions
        asked = client.committed([TopicPartition(rig.origin, p) for p in parts], timeout=10)
        fresh = [TopicPartition(rig.origin, p.partition, 0) for p in asked if p.offset < 0]
        if fresh:  # a group without a position looks as if nobody consumed the topic
            client.commit(offsets=fresh, asynchronous=False)
        client.subscribe([rig.origin])
        self._ready.set()
        while not self._over.is_set():
            batch = [_seen(m) for m in client.consume(500, timeout=0.02) if m.error() is None]
            if not batch:
                continue
            failed = [s for s in batch if self._fails(s)]
            if failed:
                rig.produce(rig.dlq, [self._dead_letter(s) for s in failed])
                self.failed.extend(failed)
            self.effects.update(s.header("dlq-entry") for s in batch if s.header("dlq-entry"))
            ends = {s.part: s.offset + 1 for s in batch}
            while not self._over.is_set():
                try:
                    client.commit(
                        offsets=[TopicPartition(rig.origin, p, o) for p, o in ends.items()],
                        asynchronous=False,
                    )
                    break
                except KafkaException:  # the broker may be the one that is killed
                    time.sleep(0.1)
        client.close()

    def _dead_letter(self, seen: Seen) -> tuple[bytes | None, bytes | None, list[tuple[str, bytes | None]]]:
        own = (
            [h for h in seen.headers or () if not h[0].startswith("wf-")] if self._keeps == "headers" else []
        )
        wrote = [
            h
            for h in failure(
                0, "TransientNetwork", topic=self._rig.origin, part=seen.part, offset=seen.offset
            )
            if h[0].startswith("wf-")
        ]
        return seen.key, seen.value, [*own, *wrote]


class OrchestratedRig(Rig):
    """A rig whose queue has an orchestrator; start and stop its ``service``.

    :param options: more of the orchestrator's command line.
    """

    def __init__(self, broker: Broker, folder: Path, *options: str) -> None:
        super().__init__(broker.bootstrap, folder / "rig")
        self.service = ReferenceOrchestrator(
            broker.bootstrap,
            origin=self.origin,
            dlq=self.dlq,
            folder=folder / "orchestrator",
            group=self.group,
            options=options,
        )
        self.client = HttpOrchestrator(self.service.url, self.service.token)
        self.config = self.config.model_copy(
            update={"orchestrator": OrchestratorRef(connection="orchestrator")}
        )

    @property
    def connections(self) -> Connections:
        kafka = super().connections
        ours = Connection("orchestrator", "http", host=self.service.url, password=self.service.token)
        return lambda name: ours if name == "orchestrator" else kafka(name)


class Worker:
    """A process that works on the queue step by step; see :mod:`tests.integration.worker`."""

    def __init__(self, folder: Path, spec: Mapping[str, Any], steps: Sequence[str]) -> None:
        folder.mkdir()
        self.folder = folder
        (folder / "spec.json").write_text(json.dumps({**spec, "steps": steps}))
        for name in ("out", "err"):
            (folder / name).touch()
        self._process = FORKS.Process(target=worker.run, args=(str(folder),), daemon=True)
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def events(self) -> list[dict[str, Any]]:
        """What it has said so far: a line each step that it ended."""
        lines = (self.folder / "out").read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def said(self, step: str) -> dict[str, Any] | None:
        return next((e for e in self.events if e["step"] == step), None)

    def wait_said(self, step: str, seconds: float = 60) -> dict[str, Any]:
        def heard() -> dict[str, Any] | None:
            assert self._process.is_alive() or self.said(step), (
                f"worker ended ({self._process.exitcode}) before {step}: {self.words()}"
            )
            return self.said(step)

        return wait_until(heard, f"worker's step {step}", seconds=seconds)

    def wait(self, seconds: float = 120) -> int:
        """Wait for its end; returns 0, or the negative signal that killed it, or 3 after an error it has said."""
        self._process.join(seconds)
        if self._process.exitcode is None:
            os.kill(self.pid, signal.SIGUSR1)
            self._process.join(1)
            stacks = (self.folder / "err").read_text()[-30000:]
            raise AssertionError(f"worker did not end within {seconds:.0f} s: {self.events[-3:]}\n{stacks}")
        return self._process.exitcode

    def kill_after(self, seconds: float) -> None:
        """SIGKILL it in ``seconds`` if it has not ended by then."""
        self._process.join(seconds)
        self.kill()

    def expect_done(self, seconds: float = 120) -> None:
        code = self.wait(seconds)
        assert code == 0, f"worker ended with {code}: {self.words()}"

    def expect_killed(self, seconds: float = 120) -> None:
        code = self.wait(seconds)
        assert code == -signal.SIGKILL, (
            f"worker should have died at its crash point, it ended with {code}: {self.words()}"
        )

    def expect_fenced(self, seconds: float = 60, *, or_done: bool = False) -> None:
        """``or_done``: it may also find that nothing is left for it to do."""
        code = self.wait(seconds)
        if or_done and code == 0:
            return
        said = self.said("error")
        assert code == 3, f"worker should have been fenced, it ended with {code}: {self.words()}"
        assert said is not None, "it said nothing"
        assert said["fenced"], self.words()

    @property
    def ended(self) -> bool:
        return not self._process.is_alive()

    @property
    def stopped(self) -> bool:
        with suppress(psutil.NoSuchProcess):
            return bool(psutil.Process(self.pid).status() == psutil.STATUS_STOPPED)
        return False

    def wait_stopped(self, seconds: float = 60) -> None:
        """Wait until it has stopped itself (SIGSTOP) at its crash point."""

        def stopped() -> bool:
            assert not self.ended, (
                f"worker ended ({self._process.exitcode}) before its crash point: {self.words()}"
            )
            return self.stopped

        wait_until(stopped, "worker stopped at its crash point", seconds=seconds)

    def wake(self) -> None:
        os.kill(self.pid, signal.SIGCONT)
        wait_until(lambda: self.ended or not self.stopped, "worker woke")

    def kill(self) -> None:
        self._process.kill()
        self._process.join()

    def words(self) -> str:
        err = (self.folder / "err").read_text().splitlines()
        return "\n".join([*(json.dumps(e) for e in self.events[-3:]), *err[-12:]])


def finish(
    rig: Rig,
    steps: Sequence[str],
    kills: Sequence[Mapping[str, Any]],
    *,
    new_drain: Callable[[int], bool],
    before: Callable[[], None] | None = None,
    seconds: float = 60,
) -> int:
    """Run ``steps`` in worker processes, killing one after the other as ``kills`` says; the last one is left alone.

    Each restart goes on as the same drain (attach), or, where ``new_drain(n)`` says so, as a new run that waits for the
    dead one's lease to end. ``before`` is called before each start that is to be killed. Returns how many were
    killed at work.
    """
    run, opened, killed = 0, False, 0
    for n, kill in enumerate([*kills, {}]):
        if opened and new_drain(n):
            run, opened = run + 1, False
        if before is not None and kill:
            before()
        begin = f"attach:run{run}" if opened else f"open:run{run}"
        process = rig.worker(begin, *steps, die=kill.get("die"))
        if (after := kill.get("after_s")) is not None:
            process.kill_after(after)
        code = process.wait(seconds)
        opened = opened or process.said(begin) is not None
        killed += code == -signal.SIGKILL
        if code == 0 and kill:
            print(f"worker {n} ({begin}) got through before its kill: {kill}")
        assert code in (0, -signal.SIGKILL), (
            f"worker {n} ({begin}, {kill}) ended with {code}: {process.words()}"
        )
    return killed


def random_kills(
    choose: random.Random, count: int, points: Sequence[str], *, most: int = 4, seconds: float = 1.5
) -> list[dict[str, Any]]:
    """Kills at crash points (at most the ``most``-th time there) and, a third of them, at moments."""
    return [
        {"after_s": round(choose.uniform(0.05, seconds), 3)}
        if choose.random() < 0.33
        else {"die": f"{choose.choice(points)}:{choose.randint(1, most)}"}
        for _ in range(count)
    ]


def seeded(name: str, default: int) -> random.Random:
    """Randomness that can be had again: the seed is printed, and ``DLQ_TEST_SEED`` sets it."""
    seed = int(os.environ.get("DLQ_TEST_SEED") or default)
    print(f"{name}: DLQ_TEST_SEED={seed}")
    return random.Random(seed)


def read_all(
    bootstrap: str, topic: str, isolation: str = "read_committed", *, seconds: float = 60
) -> list[Seen]:
    """Everything a fresh consumer finds in a topic, from its beginning to the end it has now."""
    client = Consumer(
        {
            "bootstrap.servers": bootstrap,
            "group.id": f"fresh-{uuid.uuid4().hex}",
            "isolation.level": isolation,
            "auto.offset.reset": "earliest",
            "enable.auto.commit": False,
            "enable.partition.eof": True,
        }
    )
    try:
        parts = list(client.list_topics(topic, timeout=10).topics[topic].partitions)
        client.assign([TopicPartition(topic, p, 0) for p in parts])
        left, found, deadline = set(parts), [], time.monotonic() + seconds
        while left:
            assert time.monotonic() < deadline, f"{topic} can't be read to its end"
            for message in client.consume(2_000, timeout=0.1):
                error = message.error()
                if error is None:
                    found.append(_seen(message))
                elif error.code() == KafkaError._PARTITION_EOF:
                    left.discard(message.partition())
                else:
                    raise AssertionError(f"{topic}: {error}")
        return found
    finally:
        client.close()


_headers = methodcaller("headers")  # notices an exception that comes with a result; see dlq.sources.kafka


def _own(seen: Seen) -> list[tuple[str, bytes | None]]:
    """A record's headers but for those of failures and replays."""
    return [h for h in seen.headers or () if not h[0].startswith(("wf-", "dlq-"))]


def _seen(message: Any) -> Seen:
    try:
        headers: tuple[tuple[str, bytes | None], ...] | None = tuple(_headers(message) or ())
    except (UnicodeDecodeError, SystemError):
        headers = None
    return Seen(
        message.partition(), message.offset(), message.key(), message.value(), headers, message.timestamp()[1]
    )


def rigs(bootstrap: str, folder: Path) -> Iterator[Callable[..., Rig]]:
    """For a fixture: makes rigs on a broker and closes them all."""
    made: list[Rig] = []

    def make(**how: Any) -> Rig:
        rig = Rig(bootstrap, folder / f"rig{len(made)}", **how)
        made.append(rig)
        return rig

    yield make
    for rig in made:
        rig.close()
