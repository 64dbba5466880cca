"""What a job sends: its plan's lines with the archived bytes, sums checked, earlier hops' headers replaced by ours."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import groupby

import pyarrow as pa

from dlq import envelopes
from dlq.archive import Rows, Stored
from dlq.drain import Drain
from dlq.entry import Headers
from dlq.errors import ArchiveError
from dlq.ledger import jobs as ledger
from dlq.ledger.jobs import Item, Job
from dlq.ports import Output

MAX_BYTES = 8 << 20
"""A transaction's bytes: an open one stalls every read_committed consumer of the target (RULES, Kafka 10)."""

_PAGE = 1_000  # lines read at once, where transactions are smaller
_SEGMENTS = 4  # kept: a plan in order of intake reads each once
_COLUMNS = ("part", "pos", "key", "value", "headers", "timestamp_ms")


class Outbox:
    """Reads a job's next records. One that can't be read as it was taken is left out, and said so first."""

    def __init__(self, drain: Drain, job: Job) -> None:
        self._drain = drain
        self._job = job
        self._handed_back = job.kind == "hand_back"
        self._segments: OrderedDict[int, pa.Table | None] = OrderedDict()
        self._same: Headers = (("dlq-drain", drain.id.encode()), ("dlq-job", job.id.encode()))
        self._items: list[Item] = []  # a page read ahead, and its outputs
        self._outputs: list[Output] = []
        self._at = 0  # up to where of it was given out
        self._expected = (0, 0)  # what it answers: ordinals from, until

    def next(self, first: int, until: int, records: int) -> tuple[list[Item], list[Output], list[Item]]:
        """The next lines from ordinal ``first`` on, their outputs, and those whose archived bytes are broken.

        At most ``records`` of them, and no more than :data:`MAX_BYTES` but for a single one. Where some are broken
        nothing else is given: they are to be left out first.
        """
        if (first, until) != self._expected or self._at == len(self._items):
            broken = self._read(first, until, records * max(1, _PAGE // records))
            if broken:
                self.forget()
                return [], [], broken
        some = slice(self._at, self._at + records)
        items, outputs = self._items[some], self._outputs[some]
        self._at += len(items)
        self._expected = (items[-1].ordinal + 1 if items else first, until)
        return items, outputs, []

    def forget(self) -> None:
        """The plan's lines have changed: what was read ahead is read again."""
        self._items, self._outputs, self._at = [], [], 0

    def _read(self, first: int, until: int, most: int) -> list[Item]:
        """Read a page ahead; returns those of it that are broken."""
        self.forget()
        with self._drain.ledger.read() as tx:
            lines = ledger.items(tx, self._job.id, first, until, most)
            uris = ledger.segment_uris(tx, dict.fromkeys(line.segment for line in lines))
        broken: list[Item] = []
        size = 0
        for segment, group in groupby(lines, lambda line: line.segment):
            some = list(group)
            for item, stored in zip(some, self._stored(segment, some, uris), strict=True):
                if stored is None:
                    broken.append(item)
                    continue
                size += len(stored.key or b"") + len(stored.value or b"")
                if self._items and size > MAX_BYTES:
                    return broken
                self._items.append(item)
                self._outputs.append(self._output(item, stored))
        return broken

    def _stored(
        self, segment: int, items: Sequence[Item], uris: Mapping[int, tuple[str, str]]
    ) -> list[Stored | None]:
        """The archived records of a segment's items, None for one that is not as it was taken."""
        if segment not in self._segments:
            self._segments[segment] = self._table(uris[segment][0])
            if len(self._segments) > _SEGMENTS:
                self._segments.popitem(last=False)
        table = self._segments[segment]
        if table is None:
            return [None] * len(items)
        there = [item.row_no for item in items if item.row_no < len(table)]
        rows = Rows(table, there, None if self._handed_back else envelopes.survives)
        found = {row_no: number for number, row_no in enumerate(there)}
        return [
            rows[number]
            if (number := found.get(item.row_no)) is not None and rows.payload_sha(number) == item.payload_sha
            else None
            for item in items
        ]

    def _table(self, uri: str) -> pa.Table | None:
        try:
            return self._drain.archive.read(uri, _COLUMNS)
        except ArchiveError as error:
            self._drain.note("archive", str(error), level="error")
            return None

    def _output(self, item: Item, stored: Stored) -> Output:
        part = stored.part if self._handed_back else None
        if part is None and stored.key is None:
            part = _origin_partition(item.origin)
        headers = (
            *stored.headers,
            *self._same,
            ("dlq-ordinal", b"%d" % item.ordinal),
            ("dlq-entry", item.ref.encode()),
            ("dlq-key", item.idem_key.encode()),
            ("dlq-retry-count", b"%d" % (item.attempts + 1)),
            ("dlq-original-timestamp", b"%d" % (stored.timestamp_ms or 0)),
        )
        return Output(item.ordinal, stored.key, stored.value, headers, stored.timestamp_ms, part)


def _origin_partition(origin: str | None) -> int | None:
    """The partition in ``topic/partition/offset@group``; a topic holds no slash."""
    parts = origin.split("/", 2) if origin else []
    return int(parts[1]) if len(parts) == 3 and parts[1].isdigit() else None
