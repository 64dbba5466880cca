"""The twin of a dead-letter topic in this process's memory, for tests that need no broker.

It keeps what the Kafka adapter promises: partitions, offsets with gaps, transactions that hold readers back, retention
that moves the log's start, a group's commits with metadata. It ends with the process, so nothing that is killed can be
tried on it.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Literal, Self

from dlq.entry import Record
from dlq.errors import Refused, SourceError
from dlq.memory import MemoryLog, MemoryTopics, offset_of
from dlq.ports import Batch, Depth, Echo, Range

Start = Literal["earliest", "latest"] | datetime


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
        return next(
            (offset_of(r) for r in self.log.read(part, low, high) if (r.timestamp_ms or 0) >= since), high
        )

    def open_pass(
        self, positions: Mapping[int, int], parts: Sequence[int] | None = None, *, glance: bool = False
    ) -> MemoryPass:
        return MemoryPass(self.log, positions, self._marks(parts), self._memory)

    def peek(self, _most: int, _seconds: float) -> list[Record]:
        raise NotImplementedError("it has a log: a pass that acknowledges nothing leaves no trace")

    def originals(self, topic: str, places: Collection[tuple[int, int]]) -> Mapping[tuple[int, int], Record]:
        log = MemoryTopics.shared(self.log.name).topics.get(topic)
        if log is None:
            return {}
        known = [(p, pos) for p, pos in places if p < log.partitions and pos >= log.marks(p)[0]]
        return {at: record for at in known for record in log.read(at[0], at[1], at[1] + 1)}

    def reread(self, spans: Sequence[Range]) -> Iterator[list[tuple[int, str, int]]]:
        """Batches of (part, place, pos) that the log holds in ``spans`` now."""
        for span in spans:
            start = max(span.from_pos, self.log.marks(span.part)[0])
            yield [(r.part, r.place, offset_of(r)) for r in self.log.read(span.part, start, span.to_pos)]

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
                    reached = offset_of(record)
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
