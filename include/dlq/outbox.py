"""What a job sends: its plan's lines with the archived bytes, sums checked, earlier hops' headers replaced by ours."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import msgspec
import pyarrow as pa

from dlq.archive import STORED, Rows
from dlq.drain import Drain
from dlq.entry import Headers
from dlq.errors import ArchiveError
from dlq.ledger import jobs as ledger
from dlq.ledger.jobs import Item, Job
from dlq.ports import Output

MAX_BYTES = 8 << 20
"""A transaction's bytes: an open one stalls every read_committed consumer of the target (RULES, Kafka 10)."""

_PAGE = 1_000  # records made at once, where transactions are smaller
_LINES = 4_000  # of the plan, read at once
_TABLES = 64 << 20  # bytes of segments kept: a plan in order of intake reads each once


class Chunk(msgspec.Struct, frozen=True):
    """A transaction's lines and their outputs. Where some are broken in the archive, those and nothing else."""

    items: list[Item]
    outputs: list[Output]
    broken: list[Item]


class Outbox:
    """Gives a job's next records in order. What waits for disks is in :meth:`read_ahead`; the rest only computes."""

    def __init__(self, drain: Drain, job: Job, state: str = "planned") -> None:
        self._drain = drain
        self._state = state
        self._job = job
        self._handed_back = job.kind == "hand_back"
        # An SQS message has ten attributes, and one group that reads it.
        self._tagged = not self._handed_back and drain.target.transactional
        self._survives = drain.config.envelopes.survives
        self._tables: OrderedDict[int, pa.Table | None] = OrderedDict()
        self._files: dict[int, tuple[str, str]] = {}  # each segment's uri and sum
        self._same: Headers = (("dlq-drain", drain.id.encode()), ("dlq-job", job.id.encode()))
        self.forget()

    def forget(self) -> None:
        """The plan's lines have changed: what was read ahead is read again."""
        self._expected = (-1, -1)  # what is given next: ordinals from, until
        self._lines: list[Item] = []
        self._read_to = 0
        self._block = 0  # so many of them can be made into outputs now
        self._items: list[Item] = []
        self._outputs: list[Output] = []
        self._at = 0  # up to where of these was given

    def next(self, first: int, until: int, records: int) -> Chunk:
        """The next lines from ordinal ``first`` on: at most ``records``, and :data:`MAX_BYTES` but for a single one."""
        if (first, until) != self._expected:
            self.forget()
            self._expected, self._read_to = (first, until), first
        if self._at == len(self._items) and not self._block:
            self.read_ahead(records)
        if self._at == len(self._items) and (broken := self._make()):
            self.forget()
            return Chunk([], [], broken)
        some = slice(self._at, self._at + records)
        chunk = Chunk(self._items[some], self._outputs[some], [])
        self._at += len(chunk.items)
        if chunk.items:
            self._expected = (chunk.items[-1].ordinal + 1, until)
        return chunk

    def read_ahead(self, records: int) -> None:
        """Read the lines after those given last, and the segments that the next of them lie in."""
        until = self._expected[1]
        if self._block:
            return
        page = records * max(1, _PAGE // records)
        if len(self._lines) < page and self._read_to < until:
            with self._drain.ledger.read() as tx:
                most = max(page, _LINES)
                lines = ledger.items(tx, self._job.id, self._read_to, until, most, self._state)
                unknown = {line.segment for line in lines} - self._files.keys()
                self._files.update(ledger.segment_uris(tx, unknown))
            self._read_to = lines[-1].ordinal + 1 if lines else until
            self._lines += lines
        self._block = self._open(self._lines[:page])

    def _open(self, lines: Sequence[Item]) -> int:
        """Have the segments of as many ``lines`` in memory as fit; returns how many."""
        size, wanted = 0, set[int]()
        for number, line in enumerate(lines):
            size += line.size
            if number and size > MAX_BYTES:
                return number
            if line.segment in wanted:
                continue
            if line.segment not in self._tables:
                self._tables[line.segment] = self._table(*self._files[line.segment])
                for old in [n for n in self._tables if n not in wanted and n != line.segment]:
                    if self._held() <= _TABLES:
                        break
                    del self._tables[old]
                if wanted and self._held() > _TABLES:
                    del self._tables[line.segment]
                    return number
            wanted.add(line.segment)
        return len(lines)

    def _held(self) -> int:
        return sum(table.nbytes for table in self._tables.values() if table is not None)

    def _table(self, uri: str, sha256: str) -> pa.Table | None:
        """The segment; None where it is missing or no longer what was written, headers too.

        :raises ArchiveError: when the archive itself is away: that says nothing of what is in it.
        """
        try:
            return self._drain.archive.verified(uri, sha256, STORED)[0]
        except ArchiveError as error:
            if not self._drain.archive.there():
                raise
            self._drain.note("archive", str(error), level="error")
            return None

    def _make(self) -> list[Item]:
        """Make outputs of the block; returns its lines that aren't in the archive as they were taken."""
        items = self._lines[: self._block]
        del self._lines[: self._block]
        self._block = 0
        by_segment: dict[int, list[int]] = {}
        for number, item in enumerate(items):
            by_segment.setdefault(item.segment, []).append(number)
        outputs: list[Output | None] = [None] * len(items)
        for segment, numbers in by_segment.items():
            table = self._tables[segment]
            if table is not None:
                here = [number for number in numbers if items[number].row_no < len(table)]
                self._fill(outputs, items, here, table)
        self._items, self._at = items, 0
        self._outputs = [output for output in outputs if output is not None]
        return [item for item, output in zip(items, outputs, strict=True) if output is None]

    def _fill(
        self, outputs: list[Output | None], items: Sequence[Item], numbers: Sequence[int], table: pa.Table
    ) -> None:
        rows = Rows(table, [items[n].row_no for n in numbers], None if self._handed_back else self._survives)
        same = self._same
        for row, number in enumerate(numbers):
            item = items[number]
            if rows.payload_sha(row) != item.payload_sha:
                continue
            stored = rows[row]
            if self._handed_back:
                part: int | None = stored.part
            else:
                part = _origin_partition(item.origin) if stored.key is None else None
            headers = (
                *stored.headers,
                *self._meant_for(item.origin),
                *same,
                ("dlq-ordinal", b"%d" % item.ordinal),
                ("dlq-entry", item.ref.encode()),
                ("dlq-key", item.idem_key.encode()),
                ("dlq-retry-count", b"%d" % (item.attempts + 1)),
                ("dlq-original-timestamp", b"%d" % (stored.timestamp_ms or 0)),
            )
            outputs[number] = Output(
                item.ordinal,
                stored.key,
                stored.value,
                headers,
                stored.timestamp_ms,
                part,
                stored.types,
                stored.system,
                item.correlation_id,
            )

    def _meant_for(self, origin: str | None) -> Headers:
        """The consumer group that failed: the others that read the topic can pass the replay over."""
        group = origin.partition("@")[2] if origin is not None and self._tagged else ""
        return (("dlq-group", group.encode()),) if group else ()


def _origin_partition(origin: str | None) -> int | None:
    """The partition in ``topic/partition/offset@group``; a topic holds no slash."""
    parts = origin.split("/", 2) if origin else []
    return int(parts[1]) if len(parts) == 3 and parts[1].isdigit() else None
