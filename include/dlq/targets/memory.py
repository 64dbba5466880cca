"""The twin of a Kafka target in this process's memory, for tests that need no broker.

Outputs and a job's cursor become visible together or not at all, opening a job's writer fences the one before, a
consuming group has positions and may dead-letter what it can't process. It ends with the process.
"""

from __future__ import annotations

import threading
import time
import zlib
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from types import TracebackType
from typing import ClassVar, Self

from dlq.entry import Headers, Record
from dlq.errors import Fenced, NotFound, Refused, TargetError
from dlq.ports import Delivered, Output, Sender, Unproducible
from dlq.sources.memory import MemoryLog


class MemoryTopics:
    """What a broker keeps of its topics' writers and readers. Several clients share it by name."""

    _shared: ClassVar[dict[str, MemoryTopics]] = {}

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.topics: dict[str, MemoryLog] = {}
        self.compacted: set[str] = set()
        self.cursors: dict[str, tuple[int, str]] = {}
        """Each job's committed cursor and its metadata."""
        self.positions: dict[str, dict[int, int]] = {}
        """The consuming group's position by topic and partition; a topic nobody consumes has none."""
        self.unproducible: Callable[[Output], str | None] = lambda _output: None
        """Why an output can never be sent, None where it can."""
        self.live: Callable[[], object] = lambda: None
        """Runs whenever somebody asks for the group's positions: a consumer that keeps up."""
        self._writers: dict[str, MemoryWriter] = {}

    @classmethod
    def shared(cls, name: str) -> MemoryTopics:
        return cls._shared.setdefault(name, cls())

    def create(self, name: str, partitions: int = 1) -> MemoryLog:
        """Make a topic; one that is there is left as it is."""
        with self.lock:
            return self.topics.setdefault(name, MemoryLog(name, partitions))

    def topic(self, name: str) -> MemoryLog:
        """
        :raises NotFound: when it doesn't exist.
        """
        found = self.topics.get(name)
        if found is None:
            raise NotFound(f"target.allow: topic {name!r} does not exist; create it or name the right one")
        return found

    def take_over(self, job: str, writer: MemoryWriter) -> None:
        """Make ``writer`` the job's: an older one is fenced, what it had not committed is aborted."""
        with self.lock:
            before = self._writers.get(job)
            self._writers[job] = writer
            if before is not None:
                before.abandon()

    def time_out(self) -> None:
        """Abort what ended writers left open, as a broker does after ``transaction.timeout.ms``."""
        with self.lock:
            for writer in self._writers.values():
                if writer.spent:
                    writer.abandon()

    def writes(self, job: str, writer: MemoryWriter) -> bool:
        return self._writers.get(job) is writer

    def records(self, name: str) -> list[Record]:
        """What a read_committed consumer would read of a topic, by partition."""
        log = self.topic(name)
        return [r for part in range(log.partitions) for r in log.read(part, *log.marks(part))]

    def consume(
        self,
        name: str,
        dlq: MemoryLog | None = None,
        fails: Callable[[Record], bool] = lambda _record: False,
        *,
        most: int | None = None,
        failure: Callable[[Record, str], Headers] | None = None,
    ) -> int:
        """Be the consuming group: read on from its positions, dead-letter into ``dlq`` what ``fails``, then commit.

        :param most: how many records to read at most.
        :param failure: the headers a dead letter gets, from the record and its topic (default: the orchestrator's).
        :return: how many were read.
        """
        log = self.topic(name)
        read = 0
        with self.lock:
            positions = self.positions.setdefault(name, {})
            for part in range(log.partitions):
                low, high = log.marks(part)
                position = max(positions.get(part, low), low)
                for record in log.read(part, position, high):
                    if most is not None and read >= most:
                        high = record.pos or 0
                        break
                    read += 1
                    if fails(record):
                        assert dlq is not None, "a consumer that fails needs a queue to dead-letter into"
                        headers = (failure or dead_letter)(record, name)
                        dlq.append(
                            _placed(record.key, None, dlq.partitions, 0), record.key, record.value, headers
                        )
                positions[part] = high
        return read


def dead_letter(
    record: Record, topic: str, *, error_type: str = "TransientNetwork", group: str = "workers"
) -> Headers:
    """A failed record's headers as the reference orchestrator dead-letters it: its own, then the failure's."""
    own = tuple(h for h in record.headers if not h[0].startswith("wf-"))
    said = {
        "wf-error-type": error_type,
        "wf-error-message": "HTTP 503 from upstream",
        "wf-component": "payments.charge",
        "wf-origin-topic": topic,
        "wf-origin-partition": str(record.part),
        "wf-origin-offset": record.place,
        "wf-consumer-group": group,
    }
    return (*own, *((name, value.encode()) for name, value in said.items()))


class MemoryReplay:
    """The target adapter: one client of :class:`MemoryTopics`."""

    transactional = True

    def __init__(
        self, topics: MemoryTopics, allow: Sequence[str] = ("memory",), *, allow_compacted: bool = False
    ) -> None:
        self.topics = topics
        self._allow = allow
        self._allow_compacted = allow_compacted

    @classmethod
    def shared(cls, name: str, allow: Sequence[str] = ("memory",), *, allow_compacted: bool = False) -> Self:
        """A client of the topics that all of this process know by ``name``."""
        return cls(MemoryTopics.shared(name), allow, allow_compacted=allow_compacted)

    def preflight(self) -> list[str]:
        return [
            f"topic {name!r} is compacted, a replayed old value would replace a newer one for good"
            for name in self._allow
            if self.topics.topic(name).name in self.topics.compacted and not self._allow_compacted
        ]

    def findings(self) -> list[str]:
        return []

    def ends(self, topic: str) -> dict[int, int]:
        log = self.topics.topic(topic)
        return {part: log.marks(part)[1] for part in range(log.partitions)}

    def writer(self, job: str, topic: str, metadata: str) -> MemoryWriter:
        return MemoryWriter(self.topics, job, self.topics.topic(topic), metadata)

    def delivered(self, topic: str, start: Mapping[int, int]) -> Iterator[list[tuple[str, int, int, int]]]:
        """Batches of (job, ordinal, part, pos) of the records with our headers."""
        log = self.topics.topic(topic)
        for part in range(log.partitions):
            low, high = log.marks(part)
            yield [
                (job.decode("utf-8", "replace"), int(ordinal), part, record.pos or 0)
                for record in log.read(part, max(start.get(part, low), low), high)
                if (job := _last(record, "dlq-job")) is not None
                and (ordinal := _last(record, "dlq-ordinal")) is not None
                and ordinal.isdigit()
            ]

    def sender(self, topic: str) -> Sender:
        raise NotImplementedError("replays go by a transactional writer")

    def digested(self, _topic: str) -> float | None:
        return None

    def progress(self, topic: str) -> dict[int, int] | None:
        self.topics.live()
        with self.topics.lock:
            return dict(self.topics.positions.get(topic, {})) or None

    def compacted(self, topic: str) -> bool:
        return self._allow_compacted and topic in self.topics.compacted

    def newest(
        self, topic: str, since: Mapping[int, int], keys: Container[bytes]
    ) -> tuple[dict[tuple[int, bytes], int], dict[int, int]]:
        log = self.topics.topic(topic)
        found: dict[tuple[int, bytes], int] = {}
        ends = {}
        for part, start in since.items():
            low, ends[part] = log.marks(part)
            for record in log.read(part, max(start, low), ends[part]):
                if record.key is not None and record.key in keys:
                    found[part, record.key] = record.pos or 0
        return found, ends

    def grown(self, seconds: float) -> int:
        since = int((time.time() - seconds) * 1000)
        return sum((r.timestamp_ms or 0) >= since for name in self._allow for r in self.topics.records(name))

    def close(self) -> None:
        """Nothing is held open."""


class MemoryWriter:
    """A job's writer. After a refused output it is of no more use, like a Kafka producer after an abort."""

    def __init__(self, topics: MemoryTopics, job: str, log: MemoryLog, metadata: str) -> None:
        self._topics = topics
        self._job = job
        self._log = log
        self._metadata = metadata
        self._transaction: int | None = None
        self._outputs: Sequence[Output] = ()
        self._placed: list[Delivered] = []
        self.spent = False

    def __enter__(self) -> Self:
        self._topics.take_over(self._job, self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """What is not committed stays in doubt until the next writer, as a dead producer's does."""
        self.spent = True

    def abandon(self) -> None:
        """Abort what is open."""
        if self._transaction is not None:
            self._log.abort(self._transaction)
            self._transaction = None

    def cursor(self) -> int | None:
        with self._topics.lock:
            found = self._topics.cursors.get(self._job)
        if found is None:
            return None
        if found[1] != self._metadata:
            raise Refused(f"cursor of {self._job}: it was committed for another ledger or plan ({found[1]})")
        return found[0]

    def send(self, outputs: Sequence[Output], cursor: int) -> list[Delivered]:
        self.produce(outputs)
        delivered = self.flush()
        self.commit(cursor)
        return delivered

    def produce(self, outputs: Sequence[Output]) -> None:
        with self._topics.lock:
            self._ours()
            transaction = self._transaction = self._log.begin()
            self._outputs, self._placed = outputs, []
            for output in outputs:
                part = _placed(output.key, output.origin_part, self._log.partitions, output.ordinal)
                pos = self._log.append(
                    part,
                    output.key,
                    output.value,
                    output.headers,
                    timestamp_ms=output.timestamp_ms,
                    transaction=transaction,
                )
                self._placed.append(Delivered(output.ordinal, part, pos))

    def flush(self) -> list[Delivered]:
        with self._topics.lock:
            self._ours()
            refused = next(
                (why for output in self._outputs if (why := self._topics.unproducible(output))), None
            )
            if refused is not None:
                self.abandon()
                self.spent = True
                # As with a broker's batch, any of its records may be the culprit: only a lone one is known to be.
                raise Unproducible(self._outputs[0].ordinal, refused)
            return self._placed

    def commit(self, cursor: int) -> None:
        with self._topics.lock:
            self._ours()
            assert self._transaction is not None, "produce begins a transaction, commit ends it"
            self._log.commit(self._transaction)
            self._transaction = None
            self._topics.cursors[self._job] = (cursor, self._metadata)

    def _ours(self) -> None:
        if not self._topics.writes(self._job, self):
            raise Fenced(f"{self._job}: another writer of this job took over; this one stops")
        if self.spent:
            raise TargetError(f"{self._job}: this writer ended; open another and read the cursor")


def _placed(key: bytes | None, origin_part: int | None, partitions: int, number: int) -> int:
    if key is not None:
        return zlib.crc32(key) % partitions
    return origin_part if origin_part is not None and origin_part < partitions else number % partitions


def _last(record: Record, name: str) -> bytes | None:
    return next((value for header, value in reversed(record.headers) if header == name), None)
