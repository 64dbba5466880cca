"""The twin of a dead-letter topic in this process's memory, for tests that need no broker.

It keeps what the Kafka adapter promises: partitions, offsets with gaps, transactions that hold readers back, retention
that moves the log's start, a group's commits with metadata. It ends with the process, so nothing that is killed can be
tried on it.
"""

from __future__ import annotations

import json
import threading
import time
import uuid
from bisect import bisect_left, insort
from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import datetime
from typing import ClassVar, Literal, Self

from dlq.entry import Headers, Record
from dlq.errors import Refused, SourceError
from dlq.ports import Batch, Depth, Echo, Range

Start = Literal["earliest", "latest"] | datetime


def _pos(record: Record) -> int:
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
        return min((_pos(records[0]) for records in self.open.values()), default=self.end)

    def since(self, offset: int, before: int) -> list[Record]:
        low = bisect_left(self.records, offset, key=_pos)
        return self.records[low : bisect_left(self.records, before, key=_pos)]


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
            return _pos(record)

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
                    insort(here.records, record, key=_pos)

    def expire(self, part: int, before: int) -> None:
        """Retention deletes what lies before an offset."""
        with self.lock:
            here = self._parts[part]
            here.start = max(here.start, min(before, here.end))
            del here.records[: bisect_left(here.records, here.start, key=_pos)]

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


class MemoryDlq:
    """The source adapter: one client of a :class:`MemoryLog`.

    :param start: where a first intake begins.
    """

    has_log = True

    def __init__(self, log: MemoryLog, start: Start = "earliest") -> None:
        self.log = log
        self.uri = f"memory:{log.name}/{log.id}"
        self._start = start
        self._memory = ""

    @classmethod
    def shared(cls, name: str, start: Start = "earliest") -> Self:
        """A client of the topic that all of this process know by ``name``."""
        return cls(MemoryLog.shared(name), start)

    def _marks(self, parts: Sequence[int] | None = None) -> dict[int, tuple[int, int]]:
        every = range(self.log.partitions)
        return {p: self.log.marks(p) for p in every if parts is None or p in parts}

    def depth(self, positions: Mapping[int, int]) -> Depth:
        by_part = {
            p: max(0, high - max(positions.get(p, low), low)) for p, (low, high) in self._marks().items()
        }
        return Depth(sum(by_part.values()), by_part)

    def retention_ms(self) -> int | None:
        return self.log.retention_ms

    def check(self, positions: Mapping[int, int], ledger_id: str, epoch: int) -> list[str]:
        self._memory = _metadata(ledger_id, epoch)
        name = self.log.name
        for part, (_, high) in self._marks(list(positions)).items():
            if positions[part] > high:
                raise Refused(
                    f"{name}/{part} ends at {high}, before our position {positions[part]}: it was truncated"
                )
        findings = []
        echoes = self.echoes()
        for part, echo in sorted(echoes.items()):
            if echo.ledger not in (None, ledger_id):
                raise Refused(f"{name}/{part}: the group was committed by another ledger ({echo.ledger})")
            held = positions.get(part)
            if echo.epoch > epoch or held is None or echo.position > held:
                raise Refused(
                    f"{name}/{part}: the group stands at {echo.position}, the ledger at {held}: "
                    "the ledger is older than the world"
                )
            if echo.position < held:
                findings.append(
                    f"{name}/{part}: the group's offset {echo.position} is behind the ledger's {held}; "
                    "the ledger's holds"
                )
        if gone := positions.keys() - echoes.keys():
            findings.append(
                f"{name}: the group's offset is gone for {len(gone)} partition(s); the ledger's position holds"
            )
        return findings

    def echoes(self) -> dict[int, Echo]:
        with self.log.lock:
            return {part: _echo(offset, metadata) for part, (offset, metadata) in self.log.commits.items()}

    def remember(self, positions: Mapping[int, int], ledger_id: str, epoch: int) -> None:
        self.log.tell(positions, _metadata(ledger_id, epoch))

    def first(self) -> dict[int, tuple[int, int]]:
        return {part: (self._begin(part, low, high), high) for part, (low, high) in self._marks().items()}

    def _begin(self, part: int, low: int, high: int) -> int:
        if self._start == "earliest":
            return low
        if self._start == "latest":
            return high
        since = int(self._start.timestamp() * 1000)
        return next((_pos(r) for r in self.log.read(part, low, high) if (r.timestamp_ms or 0) >= since), high)

    def open_pass(
        self, positions: Mapping[int, int], parts: Sequence[int] | None = None, *, glance: bool = False
    ) -> MemoryPass:
        return MemoryPass(self.log, positions, self._marks(parts), self._memory)

    def originals(self, topic: str, places: Collection[tuple[int, int]]) -> Mapping[tuple[int, int], Record]:
        from dlq.targets.memory import MemoryTopics  # it has the topics, and is made of logs

        log = MemoryTopics.shared(self.log.name).topics.get(topic)
        if log is None:
            return {}
        known = [(p, pos) for p, pos in places if p < log.partitions and pos >= log.marks(p)[0]]
        return {at: record for at in known for record in log.read(at[0], at[1], at[1] + 1)}

    def reread(self, spans: Sequence[Range]) -> Iterator[list[tuple[int, str, int]]]:
        """Batches of (part, place, pos) that the log holds in ``spans`` now."""
        for span in spans:
            start = max(span.from_pos, self.log.marks(span.part)[0])
            yield [(r.part, r.place, _pos(r)) for r in self.log.read(span.part, start, span.to_pos)]

    def close(self) -> None:
        """Nothing is held open."""


class MemoryPass:
    """One reading, up to where each partition ended when it was opened."""

    def __init__(
        self, log: MemoryLog, positions: Mapping[int, int], marks: Mapping[int, tuple[int, int]], memory: str
    ) -> None:
        self.starts: Mapping[int, int] = {p: positions.get(p, low) for p, (low, _) in marks.items()}
        self.cutoffs: Mapping[int, int] = {p: max(high, self.starts[p]) for p, (_, high) in marks.items()}
        self._log = log
        self._memory = memory
        self._next = dict(self.starts)
        self._vanished = {p: low - self.starts[p] for p, (low, _) in marks.items() if low > self.starts[p]}
        self._closed = False

    def read(self, max_entries: int, max_bytes: int, max_seconds: float) -> Batch | None:
        if self._closed:
            raise SourceError(f"{self._log.name}: this pass is closed")
        left = [p for p in self._next if self._next[p] < self.cutoffs[p]]
        if not left:
            return None
        records: list[Record] = []
        ranges: list[Range] = []
        size = 0
        for part in left:
            if len(records) >= max_entries or size >= max_bytes:
                break
            begun = self._next[part]
            vanished = self._vanished.pop(part, 0)
            reached = self.cutoffs[part]
            for record in self._log.read(part, begun + vanished, reached):
                if len(records) >= max_entries or size >= max_bytes:
                    reached = _pos(record)
                    break
                records.append(record)
                size += len(record.key or b"") + len(record.value or b"") + 64
                size += sum(len(content or b"") for _, content in record.headers)
            self._next[part] = reached
            ranges.append(Range(part, begun, reached, 0, vanished))
        return Batch(records, ranges)

    def acknowledge(self, batch: Batch) -> None:
        self._commit({r.part: r.to_pos for r in batch.ranges})

    def echo(self) -> None:
        self._commit(self._next)

    def _commit(self, positions: Mapping[int, int]) -> None:
        self._log.tell(positions, self._memory)

    def close(self) -> None:
        self._closed = True


def _metadata(ledger_id: str, epoch: int) -> str:
    return json.dumps({"ledger": ledger_id, "epoch": epoch})


def _echo(offset: int, metadata: str) -> Echo:
    found = json.loads(metadata or "{}")
    return Echo(offset, found.get("ledger"), found.get("epoch", 0))
