"""What every dead-letter queue with a log promises: one suite, run on a real broker and on the in-memory twin."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any, NamedTuple

import pytest
from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewPartitions

from dlq.config import KafkaSource
from dlq.entry import Headers, Record
from dlq.errors import Refused, SourceError
from dlq.memory import MemoryLog
from dlq.ports import Batch, Connection, Pass, Range, Source
from dlq.sources.kafka import KafkaDlq
from dlq.sources.memory import MemoryDlq, Start
from dlq_demo.broker import Broker, create_topic

LEDGER = "the-ledger"


class Letter(NamedTuple):
    """What a test writes into the queue."""

    key: bytes | None = None
    value: bytes | None = b"v"
    headers: Headers = ()
    timestamp_ms: int | None = None


class Queue(ABC):
    """A dead-letter queue as others write to it, read it and change it."""

    @abstractmethod
    def client(self, start: Start = "earliest") -> Source: ...

    @abstractmethod
    def put(self, part: int, *letters: Letter) -> list[int]:
        """Write; returns the offsets."""

    @abstractmethod
    def hold(self, part: int, letter: Letter) -> Callable[[bool], None]:
        """Write within a transaction; the answer ends it: True commits, False aborts."""

    @abstractmethod
    def expire(self, part: int, before: int) -> None: ...

    @abstractmethod
    def committed(self) -> dict[int, tuple[int, str]]:
        """Offset and metadata by partition of the drain's group."""

    @abstractmethod
    def commit(self, part: int, offset: int, metadata: str) -> None: ...

    @abstractmethod
    def forget(self) -> None:
        """Delete the group's offsets."""

    @abstractmethod
    def recreate(self) -> None: ...

    @abstractmethod
    def widen(self, partitions: int) -> None: ...

    @abstractmethod
    def depth_elsewhere(self) -> int:
        """The depth as a client in another process has it."""


def run(program: str, *arguments: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=60, check=True
    )
    return int(done.stdout)


class MemoryQueue(Queue):
    def __init__(self, partitions: int) -> None:
        self._log = MemoryLog.shared(f"dlq-{uuid.uuid4().hex}", partitions)

    def client(self, start: Start = "earliest") -> Source:
        return MemoryDlq.shared(self._log.name, start)

    def put(self, part: int, *letters: Letter) -> list[int]:
        return [
            self._log.append(part, n.key, n.value, n.headers, timestamp_ms=n.timestamp_ms) for n in letters
        ]

    def hold(self, part: int, letter: Letter) -> Callable[[bool], None]:
        number = self._log.begin()
        self._log.append(part, letter.key, letter.value, letter.headers, transaction=number)
        return lambda keep: self._log.commit(number) if keep else self._log.abort(number)

    def expire(self, part: int, before: int) -> None:
        self._log.expire(part, before)

    def committed(self) -> dict[int, tuple[int, str]]:
        return dict(self._log.commits)

    def commit(self, part: int, offset: int, metadata: str) -> None:
        self._log.commits[part] = (offset, metadata)

    def forget(self) -> None:
        self._log.commits.clear()

    def recreate(self) -> None:
        self._log.recreate()

    def widen(self, partitions: int) -> None:
        self._log.widen(partitions)

    def depth_elsewhere(self) -> int:
        program = """
import sys
from dlq.sources.memory import MemoryDlq
print(MemoryDlq.shared(sys.argv[1]).depth({}).entries)
"""
        return run(program, self._log.name)


class KafkaQueue(Queue):
    def __init__(self, bootstrap: str, partitions: int) -> None:
        self._settings = {"bootstrap.servers": bootstrap}
        self._bootstrap = bootstrap
        self._partitions = partitions
        self._queue = f"q{uuid.uuid4().hex[:8]}"
        self._topic = f"{self._queue}.dlq"
        self._group = f"dlq-drain.{self._queue}"
        self._admin = AdminClient(self._settings)
        self._producer = Producer({**self._settings, "linger.ms": 0})
        self._clients: list[Source] = []
        create_topic(bootstrap, self._topic, partitions)

    def close(self) -> None:
        for client in self._clients:
            client.close()

    def client(self, start: Start = "earliest") -> Source:
        config = KafkaSource(kind="kafka", connection="kafka", topic=self._topic, start=start)
        made = KafkaDlq(self._queue, config, lambda name: Connection(name, "kafka", extra=self._settings))
        self._clients.append(made)
        return made

    def put(self, part: int, *letters: Letter) -> list[int]:
        offsets: list[int] = []
        for letter in letters:
            self._produce(self._producer, part, letter, offsets)
        assert self._producer.flush(10) == 0
        return offsets

    def _produce(self, producer: Producer, part: int, letter: Letter, offsets: list[int]) -> None:
        def delivered(error: Any, message: Any) -> None:
            assert error is None, error
            offsets.append(message.offset())

        stamp = {} if letter.timestamp_ms is None else {"timestamp": letter.timestamp_ms}
        producer.produce(
            self._topic,
            key=letter.key,
            value=letter.value,
            headers=list(letter.headers),
            partition=part,
            on_delivery=delivered,
            **stamp,
        )

    def hold(self, part: int, letter: Letter) -> Callable[[bool], None]:
        producer = Producer({**self._settings, "transactional.id": uuid.uuid4().hex, "linger.ms": 0})
        producer.init_transactions(10)
        producer.begin_transaction()
        offsets: list[int] = []
        self._produce(producer, part, letter, offsets)
        assert producer.flush(10) == 0

        def end(keep: bool) -> None:
            if keep:
                producer.commit_transaction(10)
            else:
                producer.abort_transaction(10)
            self._wait_for_marker(part, offsets[0] + 2)

        return end

    def _wait_for_marker(self, part: int, end: int) -> None:
        """The coordinator answers before the transaction's marker is in the partition."""
        consumer = Consumer({**self._settings, "group.id": self._group, "isolation.level": "read_committed"})
        deadline = time.monotonic() + 10
        try:
            while (
                consumer.get_watermark_offsets(TopicPartition(self._topic, part), 10, cached=False)[1] < end
            ):
                assert time.monotonic() < deadline
                time.sleep(0.01)
        finally:
            consumer.close()

    def expire(self, part: int, before: int) -> None:
        for done in self._admin.delete_records([TopicPartition(self._topic, part, before)]).values():
            done.result(10)

    def _consumer(self) -> Consumer:
        return Consumer({**self._settings, "group.id": self._group})

    def committed(self) -> dict[int, tuple[int, str]]:
        consumer = self._consumer()
        try:
            found = consumer.committed([TopicPartition(self._topic, p) for p in range(self._partitions)], 10)
        finally:
            consumer.close()
        return {p.partition: (p.offset, p.metadata or "") for p in found if p.offset >= 0}

    def commit(self, part: int, offset: int, metadata: str) -> None:
        consumer = self._consumer()
        try:
            consumer.commit(
                offsets=[TopicPartition(self._topic, part, offset, metadata=metadata)], asynchronous=False
            )
        finally:
            consumer.close()

    def forget(self) -> None:
        self._admin.delete_consumer_groups([self._group])[self._group].result(10)

    def recreate(self) -> None:
        self._admin.delete_topics([self._topic])[self._topic].result(10)
        deadline = time.monotonic() + 10
        while self._topic in self._admin.list_topics(timeout=10).topics:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        create_topic(self._bootstrap, self._topic, self._partitions)

    def widen(self, partitions: int) -> None:
        self._partitions = partitions
        self._admin.create_partitions([NewPartitions(self._topic, partitions)])[self._topic].result(10)
        deadline = time.monotonic() + 10
        while True:
            seen = self._admin.list_topics(self._topic, timeout=10).topics[self._topic].partitions.values()
            if len(seen) == partitions and all(p.leader >= 0 for p in seen):
                return
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def depth_elsewhere(self) -> int:
        program = """
import sys
from dlq.config import KafkaSource
from dlq.ports import Connection
from dlq.sources.kafka import KafkaDlq
config = KafkaSource(kind="kafka", connection="k", topic=sys.argv[1], start="earliest")
client = KafkaDlq("q", config, lambda name: Connection(name, "kafka", extra={"bootstrap.servers": sys.argv[2]}))
print(client.depth({}).entries)
"""
        return run(program, self._topic, self._bootstrap)


def whole(reading: Pass, *, entries: int = 1_000, size: int = 1 << 20) -> tuple[list[Record], list[Batch]]:
    """Read a pass to its cut-off; returns the records and the batches they came in."""
    batches: list[Batch] = []
    deadline = time.monotonic() + 20
    while (batch := reading.read(entries, size, 2.0)) is not None:
        assert time.monotonic() < deadline, "the cut-off was never reached"
        batches.append(batch)
    return [r for b in batches for r in b.records], batches


def memory(epoch: int = 1, ledger: str = LEDGER) -> str:
    return json.dumps({"ledger": ledger, "epoch": epoch})


class SourceContract:
    @pytest.fixture
    def queue(self) -> Any:
        raise NotImplementedError

    # Reading

    def test_a_record_comes_back_byte_for_byte(self, queue: Queue) -> None:
        letters = [
            Letter(b"k", b"value", (("a", b"1"), ("b", b""), ("a", b"2"), ("n", None)), 1_700_000_000_123),
            Letter(None, None),
            Letter(b"", b""),
            Letter(b"\xff\x00\xfe", b"\x80\x81\x00", (("bytes", b"\xff\xfe\x00"), ("schön", "ü".encode()))),
            Letter(b"big", b"x" * 900_000),
        ]
        offsets = queue.put(0, *letters)
        with_pass = queue.client().open_pass({})
        records, _ = whole(with_pass)
        assert [(r.key, r.value, r.headers, r.flaw) for r in records] == [
            (n.key, n.value, n.headers, None) for n in letters
        ]
        assert [(r.part, r.pos, r.place) for r in records] == [(0, o, str(o)) for o in offsets]
        assert records[0].timestamp_ms == 1_700_000_000_123
        assert all(r.timestamp_ms is not None and r.timestamp_ms > 1_700_000_000_123 for r in records[1:])

    def test_an_empty_queue_is_at_its_end_at_once(self, queue: Queue) -> None:
        reading = queue.client().open_pass({})
        assert dict(reading.starts) == dict(reading.cutoffs) == {0: 0, 1: 0}
        assert reading.read(10, 1000, 2.0) is None

    def test_a_pass_ends_at_the_cutoff_taken_when_it_was_opened(self, queue: Queue) -> None:
        first = queue.put(0, Letter(value=b"1"), Letter(value=b"2"))
        reading = queue.client().open_pass({})
        queue.put(0, Letter(value=b"too late"))
        records, batches = whole(reading)
        assert [r.pos for r in records] == first
        assert reading.cutoffs[0] == batches[-1].ranges[0].to_pos == first[-1] + 1

    def test_the_ranges_of_the_batches_are_a_chain_over_every_offset(self, queue: Queue) -> None:
        queue.put(0, *[Letter()] * 3)
        queue.hold(0, Letter(value=b"aborted"))(False)
        queue.put(0, *[Letter()] * 4)
        queue.hold(0, Letter(value=b"committed"))(True)
        queue.put(1, *[Letter()] * 2)
        queue.hold(1, Letter(value=b"aborted"))(False)
        reading = queue.client().open_pass({})
        records, batches = whole(reading, entries=2)
        assert b"aborted" not in [r.value for r in records]
        assert [r.pos for r in records if r.part == 0] == [0, 1, 2, 5, 6, 7, 8, 9]
        at = dict(reading.starts)
        for span in [s for b in batches for s in b.ranges]:
            assert span.from_pos == at[span.part] < span.to_pos
            at[span.part] = span.to_pos
        assert at == dict(reading.cutoffs) == {0: 11, 1: 4}
        for batch in batches:
            spans = {s.part: s for s in batch.ranges}
            assert all(spans[r.part].from_pos <= (r.pos or 0) < spans[r.part].to_pos for r in batch.records)

    def test_a_pass_goes_on_from_the_positions_it_is_given(self, queue: Queue) -> None:
        queue.put(0, *[Letter()] * 5)
        queue.put(1, *[Letter()] * 5)
        records, _ = whole(queue.client().open_pass({0: 3, 1: 5}))
        assert [(r.part, r.pos) for r in records] == [(0, 3), (0, 4)]

    def test_a_pass_reads_only_the_partitions_it_is_asked_for(self, queue: Queue) -> None:
        queue.put(0, Letter())
        queue.put(1, Letter())
        reading = queue.client().open_pass({}, [1])
        assert {r.part for r in whole(reading)[0]} == {1} == set(reading.starts) == set(reading.cutoffs)

    def test_a_batch_holds_no_more_entries_than_asked_for(self, queue: Queue) -> None:
        queue.put(0, *[Letter()] * 25)
        queue.put(1, *[Letter()] * 25)
        records, batches = whole(queue.client().open_pass({}), entries=7)
        assert len(records) == 50
        assert max(len(b.records) for b in batches) <= 7

    @pytest.mark.parametrize("fat", ["value", "headers"])
    def test_a_batch_is_bounded_in_bytes(self, queue: Queue, fat: str) -> None:
        big = b"x" * 50_000
        queue.put(0, *[Letter(value=big) if fat == "value" else Letter(headers=(("stack", big),))] * 40)
        records, batches = whole(queue.client().open_pass({}), size=1_000_000)
        assert len(records) == 40
        sizes = [
            sum(len(r.value or b"") + sum(len(v or b"") for _, v in r.headers) for r in b.records)
            for b in batches
        ]
        assert max(sizes) <= 1_000_000 + len(big)

    def test_an_open_transaction_is_neither_depth_nor_read(self, queue: Queue) -> None:
        queue.put(0, Letter(value=b"before"))
        end = queue.hold(0, Letter(value=b"in doubt"))
        queue.put(0, Letter(value=b"after"))
        source = queue.client()
        assert source.depth({}).entries == 1
        reading = source.open_pass({})
        assert [r.value for r in whole(reading)[0]] == [b"before"]
        reading.close()
        end(True)
        later = source.open_pass({0: reading.cutoffs[0]})
        assert [r.value for r in whole(later)[0]] == [b"in doubt", b"after"]

    def test_what_retention_took_unread_is_counted_and_the_range_still_chains(self, queue: Queue) -> None:
        queue.put(0, *[Letter()] * 10)
        queue.expire(0, 6)
        reading = queue.client().open_pass({0: 2})
        records, batches = whole(reading)
        assert [r.pos for r in records] == [6, 7, 8, 9]
        spans = [s for b in batches for s in b.ranges]
        assert (spans[0].from_pos, spans[-1].to_pos) == (2, 10)
        assert sum(s.vanished for s in spans) == 4

    def test_a_partition_that_retention_emptied_still_moves_on(self, queue: Queue) -> None:
        queue.put(0, *[Letter()] * 5)
        queue.expire(0, 5)
        records, batches = whole(queue.client().open_pass({0: 1}))
        assert records == []
        spans = [s for b in batches for s in b.ranges]
        assert [(s.from_pos, s.to_pos, s.vanished) for s in spans] == [(1, 5, 4)]

    def test_a_partition_added_since_begins_at_its_log_start(self, queue: Queue) -> None:
        queue.widen(3)
        queue.put(2, *[Letter()] * 3)
        queue.expire(2, 1)
        reading = queue.client().open_pass({0: 0, 1: 0})
        assert reading.starts[2] == 1
        assert [(r.part, r.pos) for r in whole(reading)[0]] == [(2, 1), (2, 2)]

    def test_one_client_opens_pass_after_pass(self, queue: Queue) -> None:
        source = queue.client()
        positions = {0: 0, 1: 0}
        for number in range(3):
            queue.put(0, Letter(value=b"%d" % number))
            reading = source.open_pass(positions)
            assert [r.value for r in whole(reading)[0]] == [b"%d" % number]
            positions = dict(reading.cutoffs)
            reading.close()

    # The first intake

    def test_a_first_intake_begins_where_the_file_says(self, queue: Queue) -> None:
        queue.put(0, *[Letter(timestamp_ms=1_600_000_000_000 + n * 1000) for n in range(4)])
        queue.expire(0, 1)
        assert queue.client("earliest").first() == {0: (1, 4), 1: (0, 0)}
        assert queue.client("latest").first() == {0: (4, 4), 1: (0, 0)}
        moment = datetime.fromtimestamp(1_600_000_002, UTC)
        assert queue.client(moment).first() == {0: (2, 4), 1: (0, 0)}
        assert queue.client(datetime(2100, 1, 1, tzinfo=UTC)).first() == {0: (4, 4), 1: (0, 0)}

    # Telling the queue

    def test_a_batch_in_custody_is_told_with_the_ledgers_id_and_epoch(self, queue: Queue) -> None:
        queue.put(0, *[Letter()] * 4)
        source = queue.client()
        source.check({}, LEDGER, 7)
        reading = source.open_pass({})
        _, batches = whole(reading)
        for batch in [*batches, batches[-1]]:  # telling it twice changes nothing
            reading.acknowledge(batch)
        offset, metadata = queue.committed()[0]
        assert offset == 4
        assert json.loads(metadata) == {"ledger": LEDGER, "epoch": 7}

    def test_an_echo_repeats_every_position_also_of_an_empty_partition(self, queue: Queue) -> None:
        queue.put(0, *[Letter()] * 3)
        source = queue.client()
        source.check({0: 2, 1: 0}, LEDGER, 1)
        source.open_pass({0: 2, 1: 0}).echo()
        assert {p: offset for p, (offset, _) in queue.committed().items()} == {0: 2, 1: 0}

    def test_reading_alone_tells_the_queue_nothing(self, queue: Queue) -> None:
        queue.put(0, *[Letter()] * 3)
        source = queue.client()
        whole(source.open_pass({}))
        list(source.reread([Range(0, 0, 3)]))
        assert queue.committed() == {}

    # Its memory of us, held against the ledger's (law 10)

    def test_the_first_sight_of_a_queue_is_no_finding(self, queue: Queue) -> None:
        queue.put(0, Letter())
        assert queue.client().check({}, LEDGER, 1) == []

    def test_equal_memories_are_no_finding(self, queue: Queue) -> None:
        queue.put(0, *[Letter()] * 3)
        queue.commit(0, 3, memory(1))
        queue.commit(1, 0, memory(1))
        assert queue.client().check({0: 3, 1: 0}, LEDGER, 2) == []

    def test_an_offset_behind_or_gone_is_a_finding_and_the_ledgers_holds(self, queue: Queue) -> None:
        queue.put(0, *[Letter()] * 3)
        queue.commit(0, 1, memory(1))
        queue.commit(1, 0, memory(1))
        found = queue.client().check({0: 3, 1: 0}, LEDGER, 2)
        assert len(found) == 1
        assert "behind" in found[0]
        queue.forget()
        found = queue.client().check({0: 3, 1: 0}, LEDGER, 2)
        assert len(found) == 1
        assert "gone for 2" in found[0]

    def test_an_offset_ahead_means_an_older_ledger(self, queue: Queue) -> None:
        queue.put(0, *[Letter()] * 5)
        queue.commit(0, 4, memory(1))
        for positions in ({0: 3, 1: 0}, {}):
            with pytest.raises(Refused, match="older than the world"):
                queue.client().check(positions, LEDGER, 2)

    def test_a_newer_epoch_means_an_older_ledger(self, queue: Queue) -> None:
        queue.put(0, *[Letter()] * 5)
        queue.commit(0, 3, memory(9))
        with pytest.raises(Refused, match="older than the world"):
            queue.client().check({0: 3, 1: 0}, LEDGER, 8)

    def test_another_ledger_on_the_queue_is_refused(self, queue: Queue) -> None:
        queue.put(0, *[Letter()] * 5)
        queue.commit(0, 3, memory(1, ledger="another"))
        with pytest.raises(Refused, match="another"):
            queue.client().check({0: 3, 1: 0}, LEDGER, 2)

    def test_a_truncated_topic_is_refused(self, queue: Queue) -> None:
        queue.put(0, Letter())
        with pytest.raises(Refused, match="truncated"):
            queue.client().check({0: 2, 1: 0}, LEDGER, 2)

    def test_a_recreated_topic_is_another_source(self, queue: Queue) -> None:
        before = queue.client().uri
        assert queue.client().uri == before
        queue.recreate()
        assert queue.client().uri != before

    # Depth and the witness

    def test_depth_counts_what_lies_beyond_the_positions(self, queue: Queue) -> None:
        queue.put(0, *[Letter()] * 5)
        queue.put(1, *[Letter()] * 3)
        queue.expire(1, 2)
        source = queue.client()
        assert source.depth({}).by_part == {0: 5, 1: 1}
        assert source.depth({0: 4, 1: 1}).by_part == {0: 1, 1: 1}
        assert source.depth({0: 5, 1: 3}).entries == 0

    def test_the_log_is_read_again_as_a_witness(self, queue: Queue) -> None:
        queue.put(0, *[Letter()] * 4)
        queue.hold(0, Letter())(False)
        queue.put(0, *[Letter()] * 2)
        queue.put(1, Letter())
        source = queue.client()
        batches = source.reread([Range(0, 1, 7), Range(1, 0, 1)])
        again = sorted(row for batch in batches for row in batch)
        assert again == [
            (0, "1", 1),
            (0, "2", 2),
            (0, "3", 3),
            (0, "6", 6),
            (1, "0", 0),
        ]
        assert list(source.reread([])) == []

    def test_a_witness_sees_only_what_retention_left(self, queue: Queue) -> None:
        queue.put(0, *[Letter()] * 4)
        queue.expire(0, 3)
        assert [row for batch in queue.client().reread([Range(0, 0, 4)]) for row in batch] == [(0, "3", 3)]

    def test_retention_that_overtakes_a_pass_ends_it(self, queue: Queue) -> None:
        queue.put(0, *[Letter()] * 10)
        source = queue.client()
        reading = source.open_pass({0: 0, 1: 0})
        queue.expire(0, 10)
        # Kafka may have been asked before the log moved, and give what it had: then all of it, in one chain.
        try:
            records, batches = whole(reading)
        except SourceError:
            return
        assert len(records) in (0, 10)
        assert [(s.from_pos, s.to_pos) for b in batches for s in b.ranges] == [(0, 10)]

    def test_every_process_sees_the_same_queue(self, queue: Queue) -> None:
        queue.put(0, *[Letter()] * 3)
        assert queue.depth_elsewhere() == 3


class TestMemoryDlq(SourceContract):
    @pytest.fixture
    def queue(self) -> Queue:
        return MemoryQueue(2)

    @pytest.mark.xfail(
        strict=True, reason="it ends with its process: what is to be killed is tried on a broker"
    )
    def test_every_process_sees_the_same_queue(self, queue: Queue) -> None:
        super().test_every_process_sees_the_same_queue(queue)


class TestKafkaDlq(SourceContract):
    @pytest.fixture
    def queue(self, broker: Broker) -> Iterator[Queue]:
        made = KafkaQueue(broker.bootstrap, 2)
        yield made
        made.close()
