"""A broker in this process's memory, for tests that need none: what its source and its target share.

It ends with the process, so nothing that is killed can be tried on it.
"""

from __future__ import annotations

import threading
import time
import uuid
import zlib
from bisect import bisect_left, insort
from collections.abc import Callable, Mapping
from typing import ClassVar, Protocol

from dlq.entry import Headers, Record
from dlq.errors import NotFound, SourceError
from dlq.ports import Output


class _Writer(Protocol):
    """A job's writer, as the broker sees it."""

    spent: bool

    def abandon(self) -> None: ...


def offset_of(record: Record) -> int:
    """A record's offset; here each has one."""
    return record.pos or 0


class _Partition:
    __slots__ = ("end", "open", "records", "start")

    def __init__(self) -> None:
        self.records: list[Record] = []  # committed, by offset
        self.start = 0
        self.end = 0
        self.open: dict[int, list[Record]] = {}  # by transaction

    @property
    def stable(self) -> int:
        """The last stable offset: before the first record of an open transaction."""
        return min((offset_of(records[0]) for records in self.open.values()), default=self.end)

    def since(self, offset: int, before: int) -> list[Record]:
        low = bisect_left(self.records, offset, key=offset_of)
        return self.records[low : bisect_left(self.records, before, key=offset_of)]


class MemoryLog:
    """A topic. Several clients share it by name, as they would share a broker's."""

    _shared: ClassVar[dict[str, MemoryLog]] = {}

    def __init__(self, name: str, partitions: int = 1) -> None:
        self.name = name
        self.lock = threading.RLock()
        self.commits: dict[int, tuple[int, str]] = {}
        """What the drain's group committed: offset and metadata by partition."""
        self.retention_ms: int | None = None
        """How long after its timestamp a record is kept, by what :meth:`expire` would be called for."""
        self._transactions = 0
        self._make(partitions)

    @classmethod
    def shared(cls, name: str, partitions: int = 1) -> MemoryLog:
        """The topic of that name, made with ``partitions`` at its first sight."""
        return cls._shared.setdefault(name, cls(name, partitions))

    def _make(self, partitions: int) -> None:
        self.id = uuid.uuid4().hex
        self._parts = [_Partition() for _ in range(partitions)]

    def recreate(self, partitions: int | None = None) -> None:
        """Delete the topic and make it again: another id, empty, no offsets of any group."""
        with self.lock:
            self._make(partitions or len(self._parts))
            self.commits.clear()

    def widen(self, partitions: int) -> None:
        """Add partitions up to ``partitions``."""
        with self.lock:
            self._parts.extend(_Partition() for _ in range(partitions - len(self._parts)))

    @property
    def partitions(self) -> int:
        return len(self._parts)

    def append(
        self,
        part: int,
        key: bytes | None,
        value: bytes | None,
        headers: Headers = (),
        *,
        timestamp_ms: int | None = None,
        flaw: str | None = None,
        transaction: int | None = None,
    ) -> int:
        """Write a record; returns its offset. Within a transaction nobody reads it before :meth:`commit`."""
        with self.lock:
            here = self._parts[part]
            stamp = int(time.time() * 1000) if timestamp_ms is None else timestamp_ms
            record = Record(part, str(here.end), here.end, key, value, headers, stamp, flaw)
            if transaction is None:
                here.records.append(record)
            else:
                here.open.setdefault(transaction, []).append(record)
            here.end += 1
            return offset_of(record)

    def begin(self) -> int:
        """Begin a transaction; returns its number."""
        with self.lock:
            self._transactions += 1
            return self._transactions

    def commit(self, transaction: int) -> None:
        """Let everybody read what the transaction wrote; its marker takes an offset in each partition it touched."""
        self._end(transaction, keep=True)

    def abort(self, transaction: int) -> None:
        """Let nobody ever read it: its offsets, and its marker's, are a gap."""
        self._end(transaction, keep=False)

    def _end(self, transaction: int, *, keep: bool) -> None:
        with self.lock:
            for here in self._parts:
                written = here.open.pop(transaction, None)
                if written is None:
                    continue
                here.end += 1
                for record in written if keep else ():
                    insort(here.records, record, key=offset_of)

    def expire(self, part: int, before: int) -> None:
        """Retention deletes what lies before an offset."""
        with self.lock:
            here = self._parts[part]
            here.start = max(here.start, min(before, here.end))
            del here.records[: bisect_left(here.records, here.start, key=offset_of)]

    def tell(self, positions: Mapping[int, int], metadata: str) -> None:
        """Commit the group's offsets."""
        with self.lock:
            self.commits.update({part: (offset, metadata) for part, offset in positions.items()})

    def marks(self, part: int) -> tuple[int, int]:
        """The log's start and the last stable offset."""
        with self.lock:
            return self._parts[part].start, self._parts[part].stable

    def read(self, part: int, offset: int, before: int) -> list[Record]:
        """The committed records of ``offset`` ≤ n < ``before``.

        :raises SourceError: when retention has taken ``offset``.
        """
        with self.lock:
            here = self._parts[part]
            if offset < here.start:
                raise SourceError(
                    f"{self.name}/{part}: offset {offset} is out of range, the log starts at {here.start}"
                )
            return here.since(offset, min(before, here.stable))


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
        self._writers: dict[str, _Writer] = {}

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

    def take_over(self, job: str, writer: _Writer) -> None:
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

    def writes(self, job: str, writer: _Writer) -> bool:
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
                            placed(record.key, None, dlq.partitions, 0), record.key, record.value, headers
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


def placed(key: bytes | None, origin_part: int | None, partitions: int, number: int) -> int:
    """The partition a record goes to: its key's, else the one it came from, else in turn."""
    if key is not None:
        return zlib.crc32(key) % partitions
    return origin_part if origin_part is not None and origin_part < partitions else number % partitions
