"""Replay to Kafka topics: outputs and the job's cursor in one transaction."""

from __future__ import annotations

import threading
import time
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from confluent_kafka import (
    Consumer,
    ConsumerGroupTopicPartitions,
    KafkaError,
    KafkaException,
    Message,
    Producer,
    TopicPartition,
)
from confluent_kafka.admin import AclOperation

from dlq import kafka
from dlq.config import KafkaTarget
from dlq.errors import Fenced, Refused, SourceError, TargetError
from dlq.ports import Connection, Connections, Delivered, Output, Range, Unproducible
from dlq.sources.kafka import KafkaPass
from dlq.targets.transacted import Transacted

_TRANSACTION_MS = 15_000
"""An open transaction stalls every read_committed consumer of the target: the broker ends a dead one after this."""

_GROUPS = 100  # looked at, at most
_ASK_S = 10.0  # for a group's offsets, asked again and again
_SLICE_S = 0.1
_CALL_S = 5.0
_COMMIT_WITHIN_S = _TRANSACTION_MS / 1000 + 2 * _CALL_S
"""A commit that takes longer has hung: send_offsets_to_transaction has no time-out once the group's coordinator is away
(librdkafka issue 5456), and the broker has ended the transaction by then."""
"""A transactional call without a time-out of its own may never return once its broker was gone; it is made again."""

_PRODUCER_FENCED = 90  # the broker's code; the client has no name for it
_FENCED = {KafkaError._FENCED, KafkaError._FATAL, KafkaError.INVALID_PRODUCER_EPOCH, _PRODUCER_FENCED}
# A transactional producer's fatal error is another writer's init. It must never open itself again: two would
# evict each other.
_SET_UP = {
    KafkaError.INVALID_TRANSACTION_TIMEOUT: f"let the broker's transaction.max.timeout.ms be {_TRANSACTION_MS} or more",
    KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED: "grant WRITE on transactional ids with prefix dlq-drain.",
    KafkaError.CLUSTER_AUTHORIZATION_FAILED: "grant IDEMPOTENT_WRITE on the cluster",
    KafkaError.GROUP_AUTHORIZATION_FAILED: "grant READ on groups with prefix dlq-drain.",
    KafkaError.TOPIC_AUTHORIZATION_FAILED: "grant READ and WRITE on it",
    KafkaError.UNSUPPORTED_VERSION: "a broker of Kafka 2.5 or later is needed",
    KafkaError._UNSUPPORTED_FEATURE: "a broker of Kafka 2.5 or later is needed",
}
"""Fatal to the client as well, but by how the cluster is set up: what to do."""
_NO_FAILURE = {KafkaError._PURGE_QUEUE, KafkaError._PURGE_INFLIGHT}
_NEVER = {
    KafkaError.MSG_SIZE_TOO_LARGE: "too_large_for_the_target",
    KafkaError.RECORD_LIST_TOO_LARGE: "too_large_for_the_target",
    KafkaError.INVALID_TIMESTAMP: "timestamp_refused_by_the_target",
    KafkaError.INVALID_RECORD: "record_refused_by_the_target",
    KafkaError.INVALID_MSG: "record_refused_by_the_target",
    KafkaError._INVALID_DIFFERENT_RECORD: "record_refused_by_the_target",  # one beside it in the batch is
}
"""What no retry can heal, by the broker's error code: the entry stays open with the reason."""

SETTINGS = {
    "transaction.timeout.ms": _TRANSACTION_MS,
    "retry.backoff.ms": 5,  # a commit that meets the one before waits this long, not 100 ms
    "retry.backoff.max.ms": 20,
    "linger.ms": 5,
    "queue.buffering.max.messages": 100_000,
    "queue.buffering.max.kbytes": 65_536,
}


@dataclass(frozen=True)
class _Topic:
    """What the broker says of a target topic."""

    partitions: int
    compacted: bool
    oldest_ms: int | None
    """How old a record's own timestamp may be, ms; None: any."""


class KafkaReplay(Transacted):
    """The target adapter for Kafka topics: those in ``target.allow``."""

    def __init__(self, config: KafkaTarget, connections: Connections) -> None:
        self._config = config
        self._connection = connections(config.connection)
        self._admin = kafka.admin(self._connection)
        self._topics: dict[str, _Topic] = {}
        self._onlooker: Consumer | None = None

    def preflight(self) -> list[str]:
        problems = []
        for name in self._config.allow:
            if lacking := kafka.lacking(self._admin, name, AclOperation.READ, AclOperation.WRITE):
                problems.append(f"topic {name!r}: grant {' and '.join(lacking)} on it")
            if self._topic(name).compacted and not self._config.allow_compacted:
                problems.append(
                    f"topic {name!r} is compacted, a replayed old value would replace a newer one for good; "
                    "set target.allow_compacted: true if that is right"
                )
        try:
            with KafkaWriter(
                self._connection,
                self._config,
                "preflight",
                self._config.allow[0],
                self._topic(self._config.allow[0]),
                "",
            ) as probe:
                probe.cursor()
        except Fenced:
            pass  # by another queue's drain, that looks at this moment too: transactions can be made
        except TargetError as error:
            problems.append(f"no transaction can be made: {error}")
        return problems

    def findings(self, _source: str) -> list[str]:
        """Replaying to a topic reaches every group that reads it, also those that had succeeded."""
        try:
            listed = self._admin.list_consumer_groups(request_timeout=kafka.TIMEOUT_S).result(kafka.TIMEOUT_S)
            groups = sorted(g.group_id for g in listed.valid if not g.group_id.startswith("dlq-drain."))
            asked = {
                group: self._admin.list_consumer_group_offsets([ConsumerGroupTopicPartitions(group)])[group]
                for group in groups[:_GROUPS]
            }
            read = {
                group: {p.topic for p in future.result(kafka.TIMEOUT_S).topic_partitions}
                for group, future in asked.items()
            }
        except (KafkaException, TimeoutError) as error:
            return [f"who else reads the targets is not known: {kafka.reason(error)}"]
        found = []
        for name in self._config.allow:
            readers = [group for group, topics in read.items() if name in topics]
            if len(readers) > 1:
                found.append(
                    f"topic {name!r} is read by {len(readers)} groups ({', '.join(readers[:5])}): a replay "
                    "reaches all of them; a retry topic of the group that failed would reach one: name it in "
                    "target.topics, by group"
                )
        return found

    def _topic(self, name: str) -> _Topic:
        if name not in self._topics:
            _, parts = kafka.topic(self._admin, name, "target.allow")
            try:
                value = kafka.settings(self._admin, name)
            except (KafkaException, TimeoutError) as error:
                raise TargetError(
                    f"topic {name!r}: its configuration can't be read: {kafka.reason(error)}; grant DESCRIBE_CONFIGS"
                ) from error
            bounds = [
                bound
                for bound in (
                    int(value.get("retention.ms") or -1) // 2,
                    int(value.get("message.timestamp.before.max.ms") or -1),
                )
                if bound > 0
            ]
            self._topics[name] = _Topic(
                len(parts), "compact" in str(value.get("cleanup.policy")), min(bounds, default=None)
            )
        return self._topics[name]

    def ends(self, topic: str) -> dict[int, int]:
        return {part: high for part, (_, high) in self._marks(topic).items()}

    def _marks(self, topic: str) -> dict[int, tuple[int, int]]:
        client = kafka.consumer(self._connection, "dlq-drain.witness")
        try:
            return kafka.watermarks(client, topic, list(range(self._topic(topic).partitions)))
        finally:
            client.close()

    def grown(self, seconds: float) -> int:
        since = int((time.time() - seconds) * 1000)
        client = kafka.consumer(self._connection, "dlq-drain.witness")
        total = 0
        try:
            for name in self._config.allow:
                marks = kafka.watermarks(client, name, list(range(self._topic(name).partitions)))
                then = kafka.offsets_at(client, name, marks, since)
                total += sum(marks[part][1] - offset for part, offset in then.items())
        except SourceError as error:
            raise TargetError(f"target topics can't be counted: {error}") from error
        finally:
            client.close()
        return total

    def writer(self, job: str, topic: str, metadata: str) -> KafkaWriter:
        return KafkaWriter(self._connection, self._config, job, topic, self._topic(topic), metadata)

    def delivered(self, topic: str, start: Mapping[int, int]) -> Iterator[list[tuple[str, int, int, int]]]:
        """Batches of (job, ordinal, part, pos) of the records with our headers, read committed, from ``start``
        to now.
        """
        client = kafka.consumer(self._connection, "dlq-drain.witness")
        try:
            marks = kafka.watermarks(client, topic, list(range(self._topic(topic).partitions)))
            spans = [Range(p, max(start.get(p, low), low), high) for p, (low, high) in marks.items()]
            reading = KafkaPass(
                client,
                topic,
                {s.part: s.from_pos for s in spans},
                {s.part: (s.from_pos, s.to_pos) for s in spans},
                None,
            )
            while (batch := reading.read(10_000, 64 << 20, 5.0)) is not None:
                yield [
                    ours
                    for record in batch.records
                    if (ours := _ours(record.headers, record.part, record.pos or 0)) is not None
                ]
        except SourceError as error:
            raise TargetError(
                f"target {topic!r} can't be read as a witness: {error}; grant READ on it"
            ) from error
        finally:
            client.close()

    def compacted(self, topic: str) -> bool:
        return self._config.allow_compacted and self._topic(topic).compacted

    def newest(
        self, topic: str, since: Mapping[int, int], keys: Container[bytes]
    ) -> tuple[dict[tuple[int, bytes], int], dict[int, int]]:
        client = kafka.consumer(self._connection, "dlq-drain.witness")
        try:
            marks = kafka.watermarks(
                client, topic, [p for p in range(self._topic(topic).partitions) if p in since]
            )
            starts = {part: min(max(since[part], low), high) for part, (low, high) in marks.items()}
            reading = KafkaPass(
                client, topic, starts, {part: (starts[part], high) for part, (_, high) in marks.items()}, None
            )
            found: dict[tuple[int, bytes], int] = {}
            while (batch := reading.read(10_000, 64 << 20, 5.0)) is not None:
                for record in batch.records:
                    if record.key is not None and record.key in keys:
                        found[record.part, record.key] = record.pos or 0
            return found, dict(reading.cutoffs)
        except SourceError as error:
            raise TargetError(
                f"target {topic!r} can't be read for newer records: {error}; grant READ on it"
            ) from error
        finally:
            client.close()

    def progress(self, topic: str) -> dict[int, int] | None:
        if self._config.group is None:
            return None
        if self._onlooker is None:
            # Never a member of the group. An admin client would not find a coordinator again that was restarted.
            self._onlooker = kafka.consumer(self._connection, self._config.group)
        try:
            found = kafka.committed(self._onlooker, topic, list(range(self._topic(topic).partitions)))
        except SourceError as error:
            raise TargetError(
                f"group {self._config.group!r}: {error}; is the broker up? It takes DESCRIBE on the group"
            ) from error
        return {part: offset for part, (offset, _) in found.items()} or None

    def close(self) -> None:
        self._topics.clear()
        if self._onlooker is not None:
            self._onlooker.close()
            self._onlooker = None


def _ours(headers: Any, part: int, pos: int) -> tuple[str, int, int, int] | None:
    job = ordinal = None
    for name, value in headers:
        if name == "dlq-job":
            job = value
        elif name == "dlq-ordinal":
            ordinal = value
    # The topic is anybody's to write: no ordinal of ours is as long as to be no number of a database.
    if job is None or ordinal is None or not ordinal.isdigit() or len(ordinal) >= 18:
        return None
    return job.decode("utf-8", "replace"), int(ordinal), part, pos


class KafkaWriter:
    """A job's producer. Its transactional id is the job's, so opening it fences an older one; its cursor is an offset
    of the job's own group on the target's first partition, committed in the same transaction as the outputs.

    After any abort, time-out or doubt it is of no more use: open another and read the cursor (librdkafka's late end of
    a transaction could end the next one).
    """

    def __init__(
        self, connection: Connection, config: KafkaTarget, job: str, topic: str, about: _Topic, metadata: str
    ) -> None:
        self._connection = connection
        self._topic = topic
        self._about = about
        self._group = f"dlq-drain.{job}"
        self._metadata = metadata
        self._settings = kafka.producer_config(
            connection,
            **SETTINGS,
            **{
                "transactional.id": self._group,
                "partitioner": config.partitioner,
                "message.max.bytes": 64 << 20,
            },
        )
        self._failed: list[tuple[int, KafkaError]] = []
        self._sent: list[Delivered] = []
        self._hung = False

    def __enter__(self) -> Self:
        self._producer = Producer(self._settings, logger=kafka.QUIET)
        self._call(self._producer.init_transactions, kafka.TIMEOUT_S)
        self._reader = kafka.consumer(self._connection, self._group)
        self._membership = self._reader.consumer_group_metadata()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._reader.close()
        if self._hung:
            return  # its thread keeps the client; whatever it still says is fenced by the next writer's init
        self._producer.purge()
        with suppress(KafkaException, SystemError):  # see _serve
            self._producer.flush(0)

    def cursor(self) -> int | None:
        try:
            found = kafka.committed(self._reader, self._topic, [0])
        except SourceError as error:
            raise TargetError(f"cursor of {self._group}: {error}") from error
        if 0 not in found:
            return None
        offset, metadata = found[0]
        if metadata != self._metadata:
            raise Refused(
                f"cursor of {self._group}: it was committed for another ledger or plan ({metadata or 'not said'}); "
                "a new drain, whose jobs have other names, goes on"
            )
        return offset

    def send(self, outputs: Sequence[Output], cursor: int) -> list[Delivered]:
        self.produce(outputs)
        delivered = self.flush()
        self.commit(cursor)
        return delivered

    def produce(self, outputs: Sequence[Output]) -> None:
        """Begin a transaction and hand ``outputs`` to the client."""
        self._failed, self._sent = [], []
        self._call(self._producer.begin_transaction)
        oldest = None if self._about.oldest_ms is None else int(time.time() * 1000) - self._about.oldest_ms
        produce, topic = self._producer.produce, self._topic
        for output in outputs:
            place: dict[str, Any] = {}
            if (
                output.key is None
                and output.origin_part is not None
                and output.origin_part < self._about.partitions
            ):
                place["partition"] = output.origin_part
            stamp = output.timestamp_ms
            if stamp is not None and stamp > 0 and (oldest is None or stamp >= oldest):
                place["timestamp"] = stamp
            report = _Report(self, output.ordinal)
            while True:
                try:
                    produce(
                        topic,
                        value=output.value,
                        key=output.key,
                        headers=list(output.headers),
                        on_delivery=report,
                        **place,
                    )
                    break
                except BufferError:
                    with suppress(KafkaException, SystemError):  # see _serve
                        self._producer.poll(0.05)
                except KafkaException as error:
                    self._abort()
                    self._raise(error.args[0], output.ordinal, alone=True)

    def flush(self) -> list[Delivered]:
        # Reports need the interpreter, one by one: served while another thread computes, each would wait its turn.
        self._serve(_TRANSACTION_MS / 1000)
        if self._failed:
            self._abort()
            ordinal, error = self._failed[0]
            self._raise(error, ordinal, alone=len(self._failed) == 1)
        return self._sent

    def commit(self, cursor: int) -> None:
        """:raises TargetError: also when the client hangs: the thread that waits for it is given up."""
        fault: list[BaseException] = []

        def call() -> None:
            try:
                self._commit(cursor)
            except BaseException as error:  # noqa: BLE001 - raised where the commit is waited for
                fault.append(error)

        caller = threading.Thread(target=call, name="dlq-commit", daemon=True)
        caller.start()
        caller.join(_COMMIT_WITHIN_S)
        if caller.is_alive():
            self._hung = True
            raise TargetError(f"{self._topic}: the client hangs in a commit; the cursor says where to go on")
        if fault:
            raise fault[0]

    def _commit(self, cursor: int) -> None:
        offsets = [TopicPartition(self._topic, 0, cursor, metadata=self._metadata)]
        until = time.monotonic() + _TRANSACTION_MS / 1000
        send_offsets = self._producer.send_offsets_to_transaction
        self._call(send_offsets, offsets, self._membership, _CALL_S, deadline=until)
        self._call(self._producer.commit_transaction, _CALL_S, deadline=until)

    def _serve(self, seconds: float) -> None:
        """Wait for delivery reports, until one says that the transaction is lost: the client sends nothing more of it.

        The client raises its fatal error (another writer's init) out of any call that serves reports, from inside one
        as a SystemError; the transactional call that follows says what it is.
        """
        until = time.monotonic() + seconds
        with suppress(KafkaException, SystemError):
            while self._producer.flush(_SLICE_S) and not self._failed and time.monotonic() < until:
                pass

    def _call(self, call: Any, *arguments: Any, deadline: float | None = None) -> None:
        """A transactional call, again while the client says that it may be: a commit that timed out is
        committed again.
        """
        until = deadline if deadline is not None else time.monotonic() + kafka.TIMEOUT_S
        while True:
            try:
                call(*arguments)
                return
            except SystemError:  # see _serve: asked again, the client says which fault it is
                if time.monotonic() >= until:
                    raise TargetError(
                        f"{self._topic}: the client broke; the cursor says where to go on"
                    ) from None
            except KafkaException as error:
                fault = error.args[0]
                if fault.code() in _SET_UP:
                    raise TargetError(f"{self._topic}: {fault.str()}; {_SET_UP[fault.code()]}") from error
                if fault.code() in _FENCED or fault.fatal():
                    raise Fenced(
                        f"{self._group}: another writer of this job took over; this one stops"
                    ) from None
                if fault.retriable() and time.monotonic() < until:
                    continue
                if fault.txn_requires_abort():
                    self._abort()
                raise TargetError(
                    f"{self._topic}: {getattr(call, '__name__', 'transaction')}: {fault.str()}; the cursor "
                    "says where to go on"
                ) from error

    def _abort(self) -> None:
        # where it fails the broker ends it by its time-out, or the next writer's init does
        with suppress(KafkaException, SystemError):
            self._producer.purge()
            self._producer.abort_transaction(10.0)

    def _raise(self, fault: KafkaError, ordinal: int, *, alone: bool) -> None:
        """Say what became of the aborted transaction: a record can spoil the whole batch it travels in, so only a lone
        one is known to be the culprit; who sends halves the batch until it is alone."""
        if fault.code() in _NEVER:
            raise Unproducible(ordinal, _NEVER[fault.code()], certain=alone) from None
        if fault.code() in _FENCED or fault.fatal():
            raise Fenced(f"{self._group}: another writer of this job took over; this one stops")
        raise TargetError(
            f"{self._topic}: ordinal {ordinal} was not delivered: {fault.str()}; the cursor says where to go on"
        )


class _Report:
    """A delivery report's receiver."""

    __slots__ = ("_ordinal", "_writer")

    def __init__(self, writer: KafkaWriter, ordinal: int) -> None:
        self._writer = writer
        self._ordinal = ordinal

    def __call__(self, error: KafkaError | None, message: Message) -> None:
        if error is None:
            self._writer._sent.append(Delivered(self._ordinal, message.partition(), message.offset()))
        elif error.code() not in _NO_FAILURE:
            self._writer._failed.append((self._ordinal, error))
