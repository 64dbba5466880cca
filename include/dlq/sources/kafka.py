"""A dead-letter topic: read by assignment from the ledger's positions to a cut-off, the log its witness."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from operator import methodcaller

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition
from confluent_kafka.admin import AclOperation

from dlq import kafka
from dlq.config import KafkaSource
from dlq.entry import Headers, Record
from dlq.errors import ConfigError, DlqError, Refused, SourceError
from dlq.ports import Batch, Connections, Depth, Echo, Range

_headers = methodcaller("headers")
"""The client returns headers and an exception at once where a name is no UTF-8. A plain call in a loop that Python has
specialized doesn't look, and the exception comes out of whatever is called next; this way of calling it looks."""

_SLICE_S = 0.1  # consume() waits for its full count or this long
_ORIGINALS_S = 20.0  # for the originals that a batch points to
_ORIGINALS_BYTES = 64 << 20
_NEAR = 100  # offsets: reading over them costs less than asking again
_PROBE = 16  # records of the first slice, before their size is known: 16 MiB at the broker's usual largest
_STANDS_S = 60.0  # a transaction that is open for less is a producer at work


class KafkaDlq:
    """The source adapter for a Kafka topic.

    :param queue: the queue's name; offsets are kept under the group ``dlq-drain.<queue>``, an echo of the ledger.
    """

    has_log = True

    def __init__(self, queue: str, config: KafkaSource, connections: Connections) -> None:
        self._connection = connections(config.connection)
        self._topic = config.topic
        self._start = config.start
        self._queue = queue
        self._group = f"dlq-drain.{queue}"
        self._admin = kafka.admin(self._connection)
        cluster = kafka.cluster_id(self._admin)
        topic_id, self._parts = kafka.topic(self._admin, config.topic, "source.topic")
        self.uri = f"kafka:{cluster}/{topic_id}"
        self._consumer = kafka.consumer(self._connection, self._group)
        self._memory: str = ""

    def depth(self, positions: Mapping[int, int]) -> Depth:
        marks = kafka.watermarks(self._consumer, self._topic, self._parts)
        by_part = {p: max(0, high - max(positions.get(p, low), low)) for p, (low, high) in marks.items()}
        return Depth(sum(by_part.values()), by_part)

    def retention_ms(self) -> int | None:
        """By ``retention.ms``; a whole segment goes at once, when the newest record in it is that old."""
        try:
            settings = kafka.settings(self._admin, self._topic)
        except (KafkaException, TimeoutError):
            return None  # DESCRIBE_CONFIGS is not needed to drain a topic
        kept = settings.get("retention.ms") or "-1"
        deletes = "delete" in (settings.get("cleanup.policy") or "")
        return int(kept) if deletes and kept.isdigit() else None

    def check(self, positions: Mapping[int, int], ledger_id: str, epoch: int) -> list[str]:
        self._memory = _metadata(ledger_id, epoch)
        if kafka.lacking(self._admin, self._topic, AclOperation.READ):
            raise ConfigError(f"source.topic: {self._topic!r} may not be read; grant READ on it")
        marks = kafka.watermarks(self._consumer, self._topic, self._parts)
        for part, position in positions.items():
            if part in marks and position > marks[part][1]:
                raise Refused(
                    f"{self._topic}/{part} ends at {marks[part][1]}, before our position {position}: it was truncated. "
                    f"Find out what was lost, then `dlq ledger adopt-source {self._queue}` starts it anew by "
                    "source.start"
                )
        findings = []
        echoes = self.echoes()
        for part, echo in echoes.items():
            offset = echo.position
            if echo.ledger not in (None, ledger_id):
                raise Refused(
                    f"{self._topic}/{part}: group {self._group} was committed by another ledger "
                    f"({echo.ledger}). Two ledgers on one "
                    f"queue would replay twice: use that one, or run `dlq ledger rebuild {self._queue}` on this one"
                )
            if echo.epoch > epoch or offset > positions.get(part, -1):
                raise Refused(
                    f"{self._topic}/{part}: group {self._group} stands at {offset}, the ledger at "
                    f"{positions.get(part, 'nothing')}: the ledger "
                    f"is older than the world (restored or lost). Run `dlq ledger rebuild {self._queue}`"
                )
            if offset < positions.get(part, offset):
                findings.append(
                    f"{self._topic}/{part}: the group's offset {offset} is behind the ledger's "
                    f"{positions[part]}; the ledger's holds"
                )
        if missing := positions.keys() - echoes.keys():
            findings.append(
                f"{self._topic}: the group's offset is gone for {len(missing)} partition(s); the ledger's "
                "position holds"
            )
        return [*findings, *self._open_transactions()]

    def remember(self, positions: Mapping[int, int], ledger_id: str, epoch: int) -> None:
        try:
            self._consumer.commit(
                offsets=kafka.positions(positions, self._topic, _metadata(ledger_id, epoch)),
                asynchronous=False,
            )
        except KafkaException as error:
            raise SourceError(
                f"{self._topic}: offsets can't be committed: {kafka.reason(error)}; run it again"
            ) from error

    def echoes(self) -> dict[int, Echo]:
        committed = kafka.committed(self._consumer, self._topic, self._parts)
        return {part: _echo(offset, metadata) for part, (offset, metadata) in committed.items()}

    def _open_transactions(self) -> list[str]:
        """Records behind an open transaction can't be read yet: a finding, not depth, once the first is old.

        The broker tells a client nothing of a transaction's age; the time of its first record is what there is.
        """
        raw = kafka.consumer(
            self._connection, f"{self._group}.witness", **{"isolation.level": "read_uncommitted"}
        )
        try:
            ends = kafka.watermarks(raw, self._topic, self._parts)
            # asked for later, so that what a growing queue has gained meanwhile looks like no transaction
            stable = kafka.watermarks(self._consumer, self._topic, self._parts)
            held = {part: end - stable[part][1] for part, (_, end) in ends.items() if end > stable[part][1]}
            raw.assign([TopicPartition(self._topic, part, stable[part][1]) for part in held])
            ages: dict[int, float] = {}
            until = time.monotonic() + kafka.TIMEOUT_S
            while held.keys() - ages.keys() and time.monotonic() < until:
                for message in raw.consume(_PROBE, timeout=_SLICE_S):
                    age = 0.0 if message.error() else time.time() - message.timestamp()[1] / 1000
                    ages.setdefault(message.partition() or 0, age)
        except KafkaException as error:
            raise SourceError(f"{self._topic}: can't be read: {kafka.reason(error)}") from error
        finally:
            raw.close()
        return [
            f"{self._topic}/{part}: an open transaction holds at most {held[part]} record(s) back, the first of them "
            f"{age:.0f} s old; they are taken once its producer ends it. If it stands longer than the broker's "
            "transaction.max.timeout.ms (15 min by default) it hangs: find it with `kafka-transactions.sh "
            "find-hanging` and abort it"
            for part, age in sorted(ages.items())
            if age >= _STANDS_S
        ]

    def open_pass(
        self, positions: Mapping[int, int], parts: Sequence[int] | None = None, *, glance: bool = False
    ) -> KafkaPass:
        wanted = [p for p in self._parts if parts is None or p in parts]
        marks = kafka.watermarks(self._consumer, self._topic, wanted)
        starts = {p: positions.get(p, marks[p][0]) for p in wanted}
        return KafkaPass(self._consumer, self._topic, starts, marks, self._memory)

    def first(self) -> dict[int, tuple[int, int]]:
        marks = kafka.watermarks(self._consumer, self._topic, self._parts)
        return {part: (self._begin(part, low, high), high) for part, (low, high) in marks.items()}

    def _begin(self, part: int, low: int, high: int) -> int:
        if self._start == "earliest":
            return low
        if self._start == "latest":
            return high
        moment_ms = int(self._start.timestamp() * 1000)
        return kafka.offsets_at(self._consumer, self._topic, [part], moment_ms).get(part, high)

    def peek(self, _most: int, _seconds: float) -> list[Record]:
        raise NotImplementedError("it has a log: a pass that acknowledges nothing leaves no trace")

    def originals(self, topic: str, places: Collection[tuple[int, int]]) -> Mapping[tuple[int, int], Record]:
        """Neighbours are read at once, read committed; at most :data:`_ORIGINALS_S` and :data:`_ORIGINALS_BYTES`."""
        found: dict[tuple[int, int], Record] = {}
        wanted, deadline, size = set(places), time.monotonic() + _ORIGINALS_S, 0
        client = kafka.consumer(self._connection, f"{self._group}.witness")
        try:
            _, parts = kafka.topic(self._admin, topic, "source.originals")
            marks = kafka.watermarks(client, topic, sorted({p for p, _ in wanted} & set(parts)))
            for part, first, last in _runs(sorted(at for at in wanted if at[0] in marks)):
                low, high = max(first, marks[part][0]), min(last + 1, marks[part][1])
                if low >= high:
                    continue
                reading = KafkaPass(client, topic, {part: low}, {part: (low, high)}, None)
                while (batch := reading.read(1_000, 8 << 20, 1.0)) is not None:
                    for record in batch.records:
                        at = (part, record.pos or 0)
                        if at in wanted:
                            found[at] = record
                            size += len(record.key or b"") + len(record.value or b"")
                    if time.monotonic() >= deadline or size >= _ORIGINALS_BYTES:
                        return found
        except DlqError:
            pass  # it is not there, or not ours to read: its dead letters stay pointers
        finally:
            client.close()
        return found

    def reread(self, spans: Sequence[Range]) -> Iterator[list[tuple[int, str, int]]]:
        """Batches of (part, place, pos) that the log holds in ``spans`` now."""
        witness = kafka.consumer(self._connection, f"{self._group}.witness")
        try:
            marks = kafka.watermarks(witness, self._topic, sorted({s.part for s in spans}))
            starts = {s.part: max(s.from_pos, marks[s.part][0]) for s in spans}
            ends = {s.part: (starts[s.part], s.to_pos) for s in spans}
            reading = KafkaPass(witness, self._topic, starts, ends, None)
            while (batch := reading.read(10_000, 64 << 20, 5.0)) is not None:
                yield [(r.part, r.place, r.pos or 0) for r in batch.records]
        finally:
            witness.close()

    def close(self) -> None:
        self._consumer.close()


def _runs(places: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    """Partition, first and last offset of sorted places that lie near enough to be read at once."""
    run: tuple[int, int, int] | None = None
    for part, offset in places:
        if run is not None and run[0] == part and offset - run[2] <= _NEAR:
            run = (part, run[1], offset)
            continue
        if run is not None:
            yield run
        run = (part, offset, offset)
    if run is not None:
        yield run


class KafkaPass:
    """One reading of the topic up to the offsets at which it ended when the pass was opened.

    :param memory: metadata for the commits; None commits nothing (a witness, a look).
    """

    def __init__(
        self,
        client: Consumer,
        topic: str,
        starts: Mapping[int, int],
        marks: Mapping[int, tuple[int, int]],
        memory: str | None,
    ) -> None:
        self.starts = dict(starts)
        self.cutoffs = {p: max(marks[p][1], starts[p]) for p in starts}
        self._client = client
        self._topic = topic
        self._memory = memory
        self._next = dict(starts)
        self._vanished = {p: max(0, marks[p][0] - starts[p]) for p in starts}
        self._largest = 0
        self._error: KafkaError | None = None
        self._reading = {p for p in starts if self._next[p] < self.cutoffs[p]}
        client.assign([TopicPartition(topic, p, max(starts[p], marks[p][0])) for p in sorted(self._reading)])

    def read(self, max_entries: int, max_bytes: int, max_seconds: float) -> Batch | None:
        if self._error is not None:
            raise SourceError(
                f"{self._topic}: reading stopped: {self._error.str()}; what was read before is in custody"
            )
        if not self._reading:
            return None
        begun = dict(self._next)
        epochs: dict[int, int | None] = {}
        records: list[Record] = []
        size, until = 0, time.monotonic() + max_seconds
        while (
            self._reading
            and self._error is None  # type: ignore[redundant-expr]  # a record may set it
            and len(records) < max_entries
            and size < max_bytes
            and time.monotonic() < until
        ):
            room = max_entries - len(records)
            count = min(room, (max_bytes - size) // self._largest + 1) if self._largest else min(room, _PROBE)
            for message in self._consume(count):
                size += self._take(message, records, epochs)
        ranges = [
            Range(p, begun[p], self._next[p], epochs.get(p), self._vanished.pop(p, 0))
            for p in begun
            if self._next[p] > begun[p]
        ]
        return Batch(records, ranges)

    def _consume(self, count: int) -> list[Message]:
        try:
            return list(self._client.consume(count, timeout=_SLICE_S))
        except KafkaException as error:
            raise SourceError(f"{self._topic}: can't be read: {kafka.reason(error)}") from error

    def _take(self, message: Message, records: list[Record], epochs: dict[int, int | None]) -> int:
        part, offset = message.partition(), message.offset()
        error = message.error()
        if error is not None:
            if error.code() == KafkaError._PARTITION_EOF:
                if part in self._reading and offset is not None:
                    self._reach(part, offset)
            else:
                # The client would move on past a corrupt batch: only the end of a partition is no error.
                self._error = self._error or error
            return 0
        if part not in self._reading or self._error is not None or offset is None:
            return 0
        if offset >= self.cutoffs[part]:
            self._reach(part, self.cutoffs[part])
            return 0
        key, value = message.key(), message.value()
        flaw = None
        try:
            headers: Headers = tuple(_headers(message) or ())
        except (UnicodeDecodeError, KafkaException, SystemError):
            headers, flaw = (), "unrepresentable_headers"
        kind, timestamp = message.timestamp()
        records.append(
            Record(part, str(offset), offset, key, value, headers, timestamp if kind else None, flaw)
        )
        self._next[part] = offset + 1
        epochs[part] = message.leader_epoch()
        if offset + 1 >= self.cutoffs[part]:
            self._reach(part, offset + 1)
        length = len(key or b"") + len(value or b"") + 64
        for _, content in headers:  # stack traces travel here
            if content:
                length += len(content)
        if length > self._largest:
            self._largest = length
        return length

    def _reach(self, part: int, position: int) -> None:
        self._next[part] = max(self._next[part], position)
        if position >= self.cutoffs[part]:
            self._reading.discard(part)
            self._client.incremental_unassign([TopicPartition(self._topic, part)])

    def acknowledge(self, batch: Batch) -> None:
        self._commit({r.part: r.to_pos for r in batch.ranges})

    def echo(self) -> None:
        """Commit every partition's position, also of an empty one: the broker forgets an offset nobody commits."""
        self._commit(self._next)

    def _commit(self, positions: Mapping[int, int]) -> None:
        if self._memory is None or not positions:
            return
        try:
            self._client.commit(
                offsets=kafka.positions(positions, self._topic, self._memory), asynchronous=False
            )
        except KafkaException as error:
            raise SourceError(
                f"{self._topic}: offsets can't be committed: {kafka.reason(error)}; the ledger's position holds"
            ) from error

    def close(self) -> None:
        self._client.unassign()


def _metadata(ledger_id: str, epoch: int) -> str:
    return json.dumps({"ledger": ledger_id, "epoch": epoch})


def _echo(offset: int, metadata: str | None) -> Echo:
    try:
        found = json.loads(metadata or "{}")
        return Echo(offset, found.get("ledger"), int(found.get("epoch", 0)))
    except (ValueError, TypeError, AttributeError):  # not ours: somebody committed by hand
        return Echo(offset, None, 0)
