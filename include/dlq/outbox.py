"""What a job sends: its plan's lines with the archived bytes, sums checked, headers of earlier hops replaced
by ours.
"""

from __future__ import annotations

from collections import OrderedDict

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

_SEGMENTS = 8  # decoded segments kept: a plan in order of intake reads each once


class Outbox:
    """Reads a job's next records. One that can't be read as it was taken is left out, and said so first."""

    def __init__(self, drain: Drain, job: Job) -> None:
        self._drain = drain
        self._job = job
        self._segments: OrderedDict[int, Rows | None] = OrderedDict()
        self._same: Headers = (("dlq-drain", drain.id.encode()), ("dlq-job", job.id.encode()))

    def next(self, first: int, until: int, records: int) -> tuple[list[Item], list[Output], list[Item]]:
        """The next lines from ordinal ``first`` on, their outputs, and those whose archived bytes are broken.

        At most ``records`` of them, and no more than :data:`MAX_BYTES` but for a single one.
        """
        with self._drain.ledger.read() as tx:
            items = ledger.items(tx, self._job.id, first, until, records)
            missing = [s for s in dict.fromkeys(i.segment for i in items) if s not in self._segments]
            uris = ledger.segment_uris(tx, missing)
        for segment in missing:
            self._segments[segment] = self._read(uris[segment][0])
        outputs: list[Output] = []
        broken: list[Item] = []
        size = 0
        for item in items:
            rows = self._segments[item.segment]
            if rows is None or item.row_no >= len(rows) or rows.payload_sha(item.row_no) != item.payload_sha:
                broken.append(item)
                continue
            stored = rows[item.row_no]
            size += len(stored.key or b"") + len(stored.value or b"")
            if outputs and size > MAX_BYTES:
                break
            outputs.append(self._output(item, stored))
        while len(self._segments) > _SEGMENTS:
            self._segments.popitem(last=False)
        sent = {o.ordinal for o in outputs}
        return [i for i in items if i.ordinal in sent], outputs, broken

    def _read(self, uri: str) -> Rows | None:
        try:
            return Rows(self._drain.archive.read(uri))
        except ArchiveError as error:
            self._drain.note("archive", str(error), level="error")
            return None

    def _output(self, item: Item, stored: Stored) -> Output:
        handed_back = self._job.kind == "hand_back"
        kept = stored.headers if handed_back else envelopes.strip(stored.headers)
        part = stored.part if handed_back else None
        if part is None and stored.key is None:
            part = _origin_partition(item.origin)
        headers = (
            *kept,
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
