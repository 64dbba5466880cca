"""What every transactional replay target promises: one suite, run on a real broker and on the in-memory twin."""

from __future__ import annotations

import os
import time
import uuid
from abc import ABC, abstractmethod

import pytest
from confluent_kafka import Consumer, TopicPartition
from confluent_kafka.admin import AdminClient

from dlq.config import KafkaTarget
from dlq.entry import Headers, Record
from dlq.errors import ConfigError, Fenced, Refused, TargetError
from dlq.memory import MemoryTopics
from dlq.ports import Connection, Output, Target, Unproducible
from dlq.targets.kafka import KafkaReplay
from dlq.targets.memory import MemoryReplay
from dlq_demo.broker import Broker, create_topic

ABOUT = '{"ledger": "l", "plan": "p"}'
LARGEST = 100_000
"""Bytes of a record that a topic made by :meth:`Topics.create` takes, about."""


def output(
    ordinal: int,
    *,
    job: str,
    key: bytes | None = b"k",
    value: bytes | None = b"v",
    more: Headers = (),
    **how: int | None,
) -> Output:
    ours: Headers = (("dlq-job", job.encode()), ("dlq-ordinal", b"%d" % ordinal))
    return Output(ordinal, key, value, (*more, *ours), how.get("timestamp_ms"), how.get("origin_part"))


class Topics(ABC):
    """The target's topics as others see them."""

    group = "workers"

    @abstractmethod
    def create(self, *, partitions: int = 1, compacted: bool = False) -> str: ...

    @abstractmethod
    def client(self, topic: str, *, group: bool = True) -> Target: ...

    @abstractmethod
    def records(self, topic: str) -> list[Record]:
        """What a read_committed consumer sees, by partition."""

    @abstractmethod
    def consume(self, topic: str, most: int) -> None:
        """The consuming group reads ``most`` offsets more of each partition and commits."""

    @abstractmethod
    def forget(self, job: str) -> None:
        """Delete the cursor of a job."""


class InMemory(Topics):
    def __init__(self) -> None:
        self._name = uuid.uuid4().hex
        self._topics = MemoryTopics.shared(self._name)
        self._topics.unproducible = lambda o: (
            "too_large_for_the_target" if len(o.value or b"") > LARGEST else None
        )

    def create(self, *, partitions: int = 1, compacted: bool = False) -> str:
        name = f"t-{uuid.uuid4().hex[:8]}"
        self._topics.create(name, partitions)
        if compacted:
            self._topics.compacted.add(name)
        return name

    def client(self, topic: str, *, group: bool = True) -> Target:
        return MemoryReplay.shared(self._name, [topic])

    def records(self, topic: str) -> list[Record]:
        return self._topics.records(topic)

    def consume(self, topic: str, most: int) -> None:
        log, positions = self._topics.topic(topic), self._topics.positions.setdefault(topic, {})
        for part in range(log.partitions):
            positions[part] = min(log.marks(part)[1], positions.get(part, 0) + most)

    def forget(self, job: str) -> None:
        del self._topics.cursors[job]


class OnKafka(Topics):
    def __init__(self, bootstrap: str) -> None:
        self._bootstrap = bootstrap
        self._settings = {"bootstrap.servers": bootstrap}
        self.group = f"workers-{uuid.uuid4().hex[:8]}"
        self._admin = AdminClient(self._settings)
        self._partitions: dict[str, int] = {}

    def create(self, *, partitions: int = 1, compacted: bool = False) -> str:
        name = f"t-{uuid.uuid4().hex[:8]}"
        config = {"max.message.bytes": str(LARGEST), **({"cleanup.policy": "compact"} if compacted else {})}
        create_topic(self._bootstrap, name, partitions, config)
        self._partitions[name] = partitions
        return name

    def client(self, topic: str, *, group: bool = True) -> Target:
        config = KafkaTarget(
            kind="kafka", connection="k", allow=(topic,), group=self.group if group else None
        )
        return KafkaReplay(config, lambda name: Connection(name, "kafka", extra=self._settings))

    def _consumer(self, group: str) -> Consumer:
        settings = {"group.id": group, "isolation.level": "read_committed", "enable.partition.eof": True}
        return Consumer(
            {**self._settings, **settings, "enable.auto.commit": False, "auto.offset.reset": "earliest"}
        )

    def records(self, topic: str) -> list[Record]:
        consumer = self._consumer(uuid.uuid4().hex)
        found, left = [], set(range(self._partitions[topic]))
        consumer.assign([TopicPartition(topic, p, 0) for p in sorted(left)])
        deadline = time.monotonic() + 20
        while left:
            assert time.monotonic() < deadline
            for message in consumer.consume(100, 0.1):
                part = message.partition()
                if message.error():
                    left.discard(part)
                    continue
                headers: Headers = tuple(message.headers() or ())  # type: ignore[arg-type]
                stamp = message.timestamp()[1]
                found.append(
                    Record(
                        part,
                        str(message.offset()),
                        message.offset(),
                        message.key(),
                        message.value(),
                        headers,
                        stamp,
                    )
                )
        consumer.close()
        return sorted(found, key=lambda r: (r.part, r.pos))

    def consume(self, topic: str, most: int) -> None:
        consumer = self._consumer(self.group)
        parts = [TopicPartition(topic, p) for p in range(self._partitions[topic])]
        now = {p.partition: max(p.offset, 0) for p in consumer.committed(parts, 10)}
        ahead = []
        for part in parts:
            end = consumer.get_watermark_offsets(part, 10, cached=False)[1]
            ahead.append(TopicPartition(topic, part.partition, min(end, now[part.partition] + most)))
        consumer.commit(offsets=ahead, asynchronous=False)
        consumer.close()

    def forget(self, job: str) -> None:
        group = f"dlq-drain.{job}"
        self._admin.delete_consumer_groups([group])[group].result(10)


def delivered(target: Target, topic: str) -> list[tuple[str, int, int, int]]:
    return sorted(row for page in target.delivered(topic, {}) for row in page)


def sent(topics: Topics, topic: str) -> list[int]:
    """Ordinals of what a consumer sees, in its order."""
    return [int(dict(r.headers)["dlq-ordinal"] or b"") for r in topics.records(topic)]


class TargetContract:
    @pytest.fixture
    def topics(self) -> Topics:
        raise NotImplementedError

    @pytest.fixture
    def job(self) -> str:
        return f"q-{uuid.uuid4().hex[:12]}.1"

    # The cursor

    def test_a_target_knows_nothing_of_a_job_that_never_ran(self, topics: Topics, job: str) -> None:
        topic = topics.create()
        with topics.client(topic).writer(job, topic, ABOUT) as writer:
            assert writer.cursor() is None

    def test_a_cursor_is_kept_without_any_output(self, topics: Topics, job: str) -> None:
        topic = topics.create()
        with topics.client(topic).writer(job, topic, ABOUT) as writer:
            assert writer.send([], 0) == []
            assert writer.cursor() == 0
        with topics.client(topic).writer(job, topic, ABOUT) as writer:
            assert writer.cursor() == 0
        assert topics.records(topic) == []

    def test_outputs_and_cursor_are_there_together(self, topics: Topics, job: str) -> None:
        topic = topics.create(partitions=3)
        target = topics.client(topic)
        with target.writer(job, topic, ABOUT) as writer:
            done = writer.send([output(n, job=job, key=b"k%d" % n) for n in range(5)], 5)
            assert writer.cursor() == 5
        assert sorted(d.ordinal for d in done) == [0, 1, 2, 3, 4]
        assert sorted((job, d.ordinal, d.part, d.pos) for d in done) == delivered(target, topic)
        assert sorted(sent(topics, topic)) == [0, 1, 2, 3, 4]

    def test_many_transactions_follow_each_other(self, topics: Topics, job: str) -> None:
        topic = topics.create()
        target = topics.client(topic)
        with target.writer(job, topic, ABOUT) as writer:
            for n in range(10):
                writer.send([output(n, job=job)], n + 1)
            assert writer.cursor() == 10
        assert sent(topics, topic) == list(range(10))

    def test_a_cursor_may_pass_an_ordinal_that_was_left_out(self, topics: Topics, job: str) -> None:
        topic = topics.create()
        with topics.client(topic).writer(job, topic, ABOUT) as writer:
            writer.send([output(0, job=job), output(2, job=job)], 4)
            assert writer.cursor() == 4
        assert sent(topics, topic) == [0, 2]

    def test_a_forgotten_cursor_is_none_again(self, topics: Topics, job: str) -> None:
        topic = topics.create()
        with topics.client(topic).writer(job, topic, ABOUT) as writer:
            writer.send([output(0, job=job)], 1)
        topics.forget(job)
        with topics.client(topic).writer(job, topic, ABOUT) as writer:
            assert writer.cursor() is None

    def test_the_cursor_of_another_ledgers_job_of_that_name_is_refused(
        self, topics: Topics, job: str
    ) -> None:
        topic = topics.create()
        with topics.client(topic).writer(job, topic, ABOUT) as writer:
            writer.send([output(0, job=job)], 1)
        with (
            topics.client(topic).writer(job, topic, '{"ledger": "another"}') as writer,
            pytest.raises(Refused),
        ):
            writer.cursor()

    # All or nothing

    def test_what_was_produced_and_not_committed_is_never_seen(self, topics: Topics, job: str) -> None:
        topic = topics.create()
        with topics.client(topic).writer(job, topic, ABOUT) as writer:
            writer.send([output(0, job=job)], 1)
            writer.produce([output(1, job=job)])
        with topics.client(topic).writer(job, topic, ABOUT) as again:  # as a retry after the crash
            assert again.cursor() == 1
            again.send([output(1, job=job), output(2, job=job)], 3)
        assert sent(topics, topic) == [0, 1, 2]

    def test_an_open_transaction_does_not_show_in_the_ends(self, topics: Topics, job: str) -> None:
        topic = topics.create()
        target = topics.client(topic)
        with target.writer(job, topic, ABOUT) as writer:
            writer.send([output(0, job=job)], 1)
            before = target.ends(topic)[0]
            writer.produce([output(1, job=job)])
            writer.flush()
            assert target.ends(topic)[0] == before
            writer.commit(2)
        assert target.ends(topic)[0] > before

    # Fencing

    def test_opening_a_writer_fences_the_one_before(self, topics: Topics, job: str) -> None:
        topic = topics.create()
        with topics.client(topic).writer(job, topic, ABOUT) as old:
            old.send([output(0, job=job)], 1)
            with topics.client(topic).writer(job, topic, ABOUT) as new:
                assert new.cursor() == 1
                with pytest.raises(Fenced):
                    old.send([output(1, job=job)], 2)
                new.send([output(1, job=job)], 2)
                assert new.cursor() == 2
        assert sent(topics, topic) == [0, 1]

    def test_a_writer_that_sleeps_between_producing_and_committing_is_fenced(
        self, topics: Topics, job: str
    ) -> None:
        topic = topics.create()
        with topics.client(topic).writer(job, topic, ABOUT) as old:
            old.produce([output(0, job=job), output(1, job=job)])
            with topics.client(topic).writer(job, topic, ABOUT) as new:
                assert new.cursor() is None
                new.send([output(0, job=job)], 1)
                with pytest.raises(Fenced):  # noqa: PT012  (which of the two notices is the client's affair)
                    old.flush()
                    old.commit(2)
                assert new.cursor() == 1
        assert sent(topics, topic) == [0]

    def test_writers_of_two_jobs_go_side_by_side(self, topics: Topics) -> None:
        topic = topics.create()
        one, two = (f"q-{uuid.uuid4().hex[:12]}.{n}" for n in (1, 2))
        with (
            topics.client(topic).writer(one, topic, ABOUT) as first,
            topics.client(topic).writer(two, topic, ABOUT) as second,
        ):
            first.produce([output(0, job=one)])
            second.send([output(0, job=two)], 1)
            first.flush()
            first.commit(1)
            assert (first.cursor(), second.cursor()) == (1, 1)
        assert sorted(j for j, _, _, _ in delivered(topics.client(topic), topic)) == sorted([one, two])

    # What can't be sent

    def test_an_output_that_can_never_be_sent_takes_its_batch_with_it(self, topics: Topics, job: str) -> None:
        topic = topics.create()
        batch = [output(0, job=job), output(1, job=job, value=os.urandom(2 * LARGEST)), output(2, job=job)]
        with topics.client(topic).writer(job, topic, ABOUT) as writer:
            writer.send([], 0)
            with pytest.raises(Unproducible) as caught:
                writer.send(batch, 3)
        assert caught.value.reason == "too_large_for_the_target"
        assert caught.value.ordinal in (0, 1, 2), "any of the batch may be named"
        assert topics.records(topic) == []
        with topics.client(topic).writer(job, topic, ABOUT) as writer:
            assert writer.cursor() == 0
            with pytest.raises(Unproducible) as caught:
                writer.send(batch[1:2], 2)
            assert caught.value.ordinal == 1, "alone it is known"
        with topics.client(topic).writer(job, topic, ABOUT) as writer:
            writer.send([batch[0], batch[2]], 3)
            assert writer.cursor() == 3
        assert sent(topics, topic) == [0, 2]

    # Bytes, order, place

    def test_a_record_arrives_byte_for_byte(self, topics: Topics, job: str) -> None:
        topic = topics.create()
        stamp = int(time.time() * 1000) - 60_000
        outputs = [
            output(
                0,
                job=job,
                key=b"\xff\x00",
                value=b"\x80\x00\xfe",
                more=(("a", b"1"), ("n", None), ("a", b"")),
            ),
            output(1, job=job, key=None, value=None),
            output(2, job=job, key=b"", value=b"", timestamp_ms=stamp),
        ]
        with topics.client(topic).writer(job, topic, ABOUT) as writer:
            writer.send(outputs, 3)
        seen = topics.records(topic)
        assert [(r.key, r.value, r.headers) for r in seen] == [(o.key, o.value, o.headers) for o in outputs]
        assert seen[2].timestamp_ms == stamp

    def test_order_within_a_key_is_the_order_of_the_ordinals(self, topics: Topics, job: str) -> None:
        topic = topics.create(partitions=4)
        with topics.client(topic).writer(job, topic, ABOUT) as writer:
            for start in range(0, 60, 20):
                batch = [output(n, job=job, key=b"k%d" % (n % 7)) for n in range(start, start + 20)]
                writer.send(batch, start + 20)
        by_key: dict[bytes | None, list[tuple[int, int]]] = {}
        for record in topics.records(topic):
            by_key.setdefault(record.key, []).append(
                (record.part, int(dict(record.headers)["dlq-ordinal"] or b""))
            )
        assert len(by_key) == 7
        for key, seen in by_key.items():
            assert len({part for part, _ in seen}) == 1, f"{key!r} lies in several partitions"
            assert [n for _, n in seen] == sorted(n for _, n in seen)

    def test_a_record_without_a_key_goes_to_its_first_partition_where_there_is_one(
        self, topics: Topics, job: str
    ) -> None:
        topic = topics.create(partitions=3)
        outputs = [output(n, job=job, key=None, origin_part=n % 3) for n in range(6)]
        outputs.append(output(6, job=job, key=None, origin_part=77))
        with topics.client(topic).writer(job, topic, ABOUT) as writer:
            done = writer.send(outputs, 7)
        assert [d.part for d in sorted(done, key=lambda d: d.ordinal)][:6] == [0, 1, 2, 0, 1, 2]

    # The witness, the group, the rest

    def test_only_our_records_from_the_start_on_are_witnessed(self, topics: Topics, job: str) -> None:
        topic = topics.create()
        target = topics.client(topic)
        with target.writer(job, topic, ABOUT) as writer:
            writer.send([output(0, job=job)], 1)
            start = target.ends(topic)
            stranger = Output(1, b"k", b"v", (("dlq-job", b"x"), ("dlq-ordinal", b"not a number")), None)
            nobody = Output(2, b"k", b"v", (), None)
            writer.send([stranger, nobody, output(3, job=job)], 4)
        found = [row for page in target.delivered(topic, start) for row in page]
        assert [(j, n) for j, n, _, _ in found] == [(job, 3)]

    def test_a_topic_nobody_consumes_has_no_progress(self, topics: Topics, job: str) -> None:
        topic = topics.create()
        assert topics.client(topic).progress(topic) is None
        assert topics.client(topic).lag(topic) is None

    def test_progress_is_the_groups_committed_position(self, topics: Topics, job: str) -> None:
        topic = topics.create(partitions=2)
        target = topics.client(topic)
        with target.writer(job, topic, ABOUT) as writer:
            done = writer.send([output(n, job=job, key=None, origin_part=n % 2) for n in range(6)], 6)
        topics.consume(topic, 2)
        places = {(d.part, d.pos) for d in done}
        position = target.progress(topic)
        assert position is not None
        assert {
            p: sum(1 for part, pos in places if part == p and pos is not None and pos < position[p])
            for p in (0, 1)
        } == {0: 2, 1: 2}
        assert target.lag(topic) in (2, 4), (
            "what is not consumed, and the transaction's markers where there are any"
        )

    def test_how_much_the_topics_grew(self, topics: Topics, job: str) -> None:
        topic = topics.create()
        target = topics.client(topic)
        with target.writer(job, topic, ABOUT) as writer:
            writer.send([output(n, job=job) for n in range(4)], 4)
        assert 4 <= target.grown(3600) <= 5, "at most: a transaction's marker may count"
        assert target.grown(-60) == 0

    def test_a_compacted_topic_is_a_problem_before_anything_is_sent(self, topics: Topics) -> None:
        assert topics.client(topics.create()).preflight() == []
        (problem,) = topics.client(topics.create(compacted=True)).preflight()
        assert "compacted" in problem

    def test_a_topic_that_does_not_exist_is_a_configuration_error(self, topics: Topics) -> None:
        with pytest.raises(ConfigError, match=r"target\.allow"):
            topics.client("no-such-topic").preflight()

    def test_a_spent_writer_says_that_it_is_of_no_more_use(self, topics: Topics, job: str) -> None:
        topic = topics.create()
        with topics.client(topic).writer(job, topic, ABOUT) as writer:
            writer.send([], 0)
            with pytest.raises(Unproducible):
                writer.send([output(0, job=job, value=os.urandom(2 * LARGEST))], 1)
            with topics.client(topic).writer(job, topic, ABOUT):
                with pytest.raises((Fenced, TargetError)):
                    writer.send([output(0, job=job)], 1)
        assert topics.records(topic) == []


class TestMemoryReplay(TargetContract):
    @pytest.fixture
    def topics(self) -> Topics:
        return InMemory()


class TestKafkaReplay(TargetContract):
    @pytest.fixture
    def topics(self, broker: Broker) -> Topics:
        return OnKafka(broker.bootstrap)
