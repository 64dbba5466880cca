"""The twin of a Kafka target in this process's memory, for tests that need no broker.

Outputs and a job's cursor become visible together or not at all, opening a job's writer fences the one before, a
consuming group has positions and may dead-letter what it can't process. It ends with the process.
"""

from __future__ import annotations

import time
from collections.abc import Container, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Self

from dlq.entry import Record
from dlq.errors import Fenced, Refused, TargetError
from dlq.memory import MemoryLog, MemoryTopics, placed
from dlq.ports import Delivered, Output, Unproducible
from dlq.targets.transacted import Transacted


class MemoryReplay(Transacted):
    """The target adapter: one client of :class:`MemoryTopics`."""

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

    def findings(self, _source: str) -> list[str]:
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
                part = placed(output.key, output.origin_part, self._log.partitions, output.ordinal)
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


def _last(record: Record, name: str) -> bytes | None:
    return next((value for header, value in reversed(record.headers) if header == name), None)
