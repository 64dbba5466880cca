"""Take into custody: bytes to the archive, rows to the ledger, and only then is the queue told."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from typing import Any

import msgspec
from sqlalchemy import Connection

from dlq import clock, mark
from dlq.archive import segment_table
from dlq.config import OrchestratorTarget, QueueConfig, SqsSource, SqsTarget
from dlq.dedupe import DedupeKeys
from dlq.destination import Destination
from dlq.drain import Drain
from dlq.entry import Group, Record, Understood, payload_sha
from dlq.envelopes import pointer
from dlq.errors import Overtaken
from dlq.grouping.classify import Classifier
from dlq.ledger import custody
from dlq.ports import Batch, Pass
from dlq.regroup import regrouping

MAX_ENTRIES, MAX_BYTES, MAX_SECONDS = 5_000, 16 << 20, 2.0
"""A batch's bounds (DESIGN §6): what is in memory and what a crash reads again."""

Progress = Callable[[int, int], None]
"""Called with (done, of about)."""


@dataclass
class Taken:
    """What an intake did: entries new in custody, seen again, and lost to retention unread (at most)."""

    taken: int = 0
    again: int = 0
    returns: int = 0
    vanished_max: int = 0
    seconds: float = 0.0
    reached: bool = False
    cutoffs: dict[int, int] = field(default_factory=dict)

    def __str__(self) -> str:
        parts = [f"{self.taken} taken into custody in {self.seconds:.1f} s"]
        if self.returns:
            parts.append(f"{self.returns} of them returns of replays")
        if self.again:
            parts.append(f"{self.again} seen again")
        if self.vanished_max:
            parts.append(f"at most {self.vanished_max} vanished by retention before they could be read")
        if not self.reached:
            parts.append("the time was up before the cut-off")
        return ", ".join(parts)


@dataclass(slots=True)
class _Prepared:
    batch: Batch
    understood: list[Understood]
    groups: list[Group]


class Intake:
    """One pass over the source. Reading and decoding run beside the writing of the batch before."""

    def __init__(self, drain: Drain, parts: Sequence[int] | None = None) -> None:
        self._drain = drain
        self._parts = parts
        self._classifier = Classifier.load(drain.config, regrouping(drain))
        self._keys = DedupeKeys(drain.config, drain.connections)
        self._known: dict[Group, int] = {}
        self._destination = Destination(drain.config)
        self._keyed = drain.config.target.ordering == "per_key"
        self._fetched_from = _originals(drain.config)
        self._first_until: dict[int, int] = {}
        self._starts: Mapping[int, int] = {}
        self._spans: dict[int, tuple[int, int]] = {}

    def run(self, deadline_s: float, progress: Progress | None = None, *, glance: bool = False) -> Taken:
        """Read to the cut-off or the deadline.

        :param glance: only see what has come (:meth:`dlq.ports.Source.open_pass`).
        :raises Fenced: when another process takes this queue.
        """
        done = Taken()
        began = time.monotonic()
        row, reading, rounds = self._open(glance)
        self._starts = reading.starts
        try:
            done.cutoffs = dict(reading.cutoffs)
            reading.echo()
            total = sum(max(0, reading.cutoffs[p] - s) for p, s in reading.starts.items())
            with ThreadPoolExecutor(1, thread_name_prefix="dlq-custody") as pool:
                pending: Future[None] | None = None
                while time.monotonic() - began < deadline_s:
                    batch = reading.read(MAX_ENTRIES, MAX_BYTES, MAX_SECONDS)
                    prepared = (
                        self._prepare(batch)
                        if batch is not None and (batch.records or batch.ranges)
                        else None
                    )
                    if pending is not None:
                        pending.result()
                        if progress is not None:
                            progress(done.taken + done.again, total)
                        pending = None
                    if batch is None:
                        done.reached = True
                        break
                    if prepared is not None:
                        pending = pool.submit(self._commit, reading, row, rounds, prepared, done)
                if pending is not None:
                    pending.result()
        finally:
            reading.close()
            self._keys.close()
        done.seconds = time.monotonic() - began
        return done

    @cached_property
    def _kept_ms(self) -> int | None:
        return self._drain.source.retention_ms()

    def _open(self, glance: bool) -> tuple[int, Pass, dict[int, int]]:
        """A pass from where the ledger is, with its ranges; again where another process moved on meanwhile."""
        drain = self._drain
        while True:
            row, positions = self._positions()
            reading = drain.source.open_pass(positions, self._parts, glance=glance)
            try:
                with drain.ledger.write(drain.queue, drain.epoch, alone=True) as tx:
                    rounds = custody.open_ranges(tx, row, drain.id, reading.starts, reading.cutoffs)
                    self._first_until = custody.first_until(tx, row)
                    self._spans = custody.sent_spans(tx)
            except Overtaken:
                reading.close()
            except BaseException:
                reading.close()
                raise
            else:
                return row, reading, rounds

    def _positions(self) -> tuple[int, dict[int, int]]:
        """The source's row and positions; a first intake writes its beginning down for every partition at once."""
        drain = self._drain
        with drain.ledger.write(drain.queue, drain.epoch) as tx:
            row = custody.source_id(tx, drain.queue, drain.source.uri)
            positions = custody.positions(tx, row)
        if not positions:
            first = drain.source.first()
            with drain.ledger.write(drain.queue, drain.epoch, alone=True) as tx:
                if not custody.positions(tx, row):
                    custody.begin(tx, row, drain.id, first)
                positions = custody.positions(tx, row)
        return row, positions

    def _prepare(self, batch: Batch) -> _Prepared:
        understood: list[Understood] = []
        groups: list[Group] = []
        pointers: list[int] = []
        classify = self._classifier.classify
        for number, record in enumerate(batch.records):
            what, group = classify(record)
            if what.pointer is not None and record.flaw is None:
                record.flaw = "pointer"
                pointers.append(number)
            self._keys.fill(record, what)
            understood.append(what)
            groups.append(group)
        prepared = _Prepared(batch, understood, groups)
        if pointers:
            self._complete(prepared, pointers)
        return prepared

    def _complete(self, prepared: _Prepared, pointers: Sequence[int]) -> None:
        """Put the originals in the place of dead letters that only point to them, where they can still be read.

        The failure's headers come after the original's own, so that the record is understood as before; the place and
        the timestamp stay the dead letter's.
        """
        by_topic: dict[str, dict[int, tuple[int, int]]] = {}
        for number in pointers:
            where = pointer.place(prepared.understood[number].pointer or "")
            if where is not None and where[0] in self._fetched_from:
                by_topic.setdefault(where[0], {})[number] = where[1:]
        records = prepared.batch.records
        for topic, places in by_topic.items():
            found = self._drain.source.originals(topic, set(places.values()))
            for number, place in places.items():
                original, letter = found.get(place), records[number]
                if original is None or original.flaw is not None:
                    continue
                whole = msgspec.structs.replace(
                    letter,
                    key=original.key,
                    value=original.value,
                    headers=(*original.headers, *letter.headers),
                    flaw=None,
                )
                what, group = self._classifier.classify(whole)
                if what.pointer is None:
                    self._keys.fill(whole, what)
                    records[number] = whole
                    prepared.understood[number], prepared.groups[number] = what, group

    def _commit(
        self, reading: Pass, source: int, rounds: dict[int, int], prepared: _Prepared, done: Taken
    ) -> None:
        """Segment, then rows and position in one transaction, then the queue: a crash between any two repeats
        safely.
        """
        drain, batch = self._drain, prepared.batch
        custody.group_ids(drain.ledger, drain.queue, drain.epoch, prepared.groups, self._known)
        written = None
        if batch.records:
            table = segment_table(batch.records, prepared.understood, prepared.groups)
            about = {
                "queue": drain.queue,
                "source": drain.source.uri,
                "drain": drain.id,
                "epoch": drain.epoch,
                "ledger": drain.ledger.id,
                "ranges": [[r.part, r.from_pos, r.to_pos] for r in batch.ranges],
            }
            written = drain.archive.write(f"segments/{drain.id}", table, about)
        shas = [payload_sha(r.key, r.value) for r in batch.records]
        with drain.ledger.write(drain.queue, drain.epoch) as tx:
            new = 0
            if written is not None:
                segment = custody.add_segment(tx, drain.queue, written, "intake")
                returns = self._returns(tx, prepared)
                rows = self._rows(prepared, shas, source, segment, returns)
                new = custody.add_entries(tx, rows)
                came_back = {
                    s.entry for n, s in returns.items() if s.payload_sha == shas[n] and not s.handed_back
                }
                custody.mark_returned(tx, sorted(came_back), drain.id)
                claimed = {s.entry for n, s in returns.items() if s.payload_sha != shas[n]} - came_back
                custody.mark_contested(tx, sorted(claimed))
                done.returns += len(came_back)
            again = len(batch.records) - new
            custody.move(tx, source, rounds, batch.ranges, again)
        reading.acknowledge(batch)
        done.taken += new
        done.again += again
        done.vanished_max += sum(r.vanished for r in batch.ranges)

    def _returns(self, tx: Connection, prepared: _Prepared) -> dict[int, custody.Sent]:
        """Which records are replays of ours that failed again: by our headers, else by the place they say they
        failed at.
        """
        claims = _claims(prepared.batch.records)
        sent = custody.sent_by_ordinal(tx, set(claims.values())) if claims else {}
        returns = {number: sent[claim] for number, claim in claims.items() if claim in sent}
        if not self._drain.source.has_log:
            refs = {r.place: n for n, r in enumerate(prepared.batch.records) if n not in returns}
            returns.update({refs[ref]: found for ref, found in custody.sent_by_ref(tx, refs).items()})
        if not self._spans:
            return returns
        places = {
            number: place
            for number, what in enumerate(prepared.understood)
            if number not in returns and (place := self._replayed_place(what)) is not None
        }
        by_place = custody.sent_by_place(tx, set(places.values())) if places else {}
        returns.update({number: by_place[place] for number, place in places.items() if place in by_place})
        return returns

    def _replayed_place(self, what: Understood) -> tuple[str, int, int] | None:
        topic, part, pos = what.origin_topic, what.origin_partition, what.origin_offset
        if topic is None or part is None or pos is None:
            return None
        span = self._spans.get(part)
        return (topic, part, pos) if span is not None and span[0] <= pos <= span[1] else None

    def _rows(
        self,
        prepared: _Prepared,
        shas: list[str],
        source: int,
        segment: int,
        returns: dict[int, custody.Sent],
    ) -> list[tuple[Any, ...]]:
        drain, rows, from_ms, first_until = self._drain, [], clock.from_ms, self._first_until
        queue, drain_id, known, destination = drain.queue, drain.id, self._known, self._destination.of
        kept_ms, minute_of = self._kept_ms, clock.minute_of
        for number, (record, what, group, sha) in enumerate(
            zip(prepared.batch.records, prepared.understood, prepared.groups, shas, strict=True)
        ):
            return_of, attempts = None, what.retry_count
            at = self._starts[record.part] if record.pos is None else record.pos
            reason = "first_intake" if at < first_until.get(record.part, -1) else "new"
            if record.flaw is not None:
                reason = record.flaw
            elif (original := returns.get(number)) is not None:
                if original.payload_sha == sha:
                    return_of, attempts = original.entry, original.attempts + (not original.handed_back)
                    if original.handed_back:
                        reason = "handed_back_again"
                    elif reason == "new":  # of a first intake it waits for a decision, like all there
                        reason = "returned"
                else:
                    reason = "conflict"  # it says it is our replay, but carries something else
            size = len(record.key or b"") + len(record.value or b"")
            key = record.lane if self._keyed else None
            key_hash = None if key is None else blake2b(key, digest_size=8).hexdigest()
            rows.append(
                (
                    queue,
                    source,
                    record.part,
                    record.place,
                    record.pos,
                    drain_id,
                    segment,
                    number,
                    sha,
                    size,
                    reason,
                    known[group],
                    group.owner,
                    destination(what),
                    what.correlation_id,
                    what.trace_id,
                    what.dedupe_key,
                    what.origin,
                    key_hash,
                    from_ms(what.failed_at_ms),
                    minute_of(record.timestamp_ms + kept_ms) if kept_ms and record.timestamp_ms else None,
                    attempts,
                    return_of,
                )
            )
        return rows


def _originals(config: QueueConfig) -> frozenset[str]:
    """The topics beside the queue of which originals may be fetched: what a dead letter says only selects in it."""
    source, target = config.source, config.target
    if isinstance(source, SqsSource):
        return frozenset()
    allowed = () if isinstance(target, SqsTarget | OrchestratorTarget) else target.allow
    return frozenset((*source.originals, *allowed))


def _claims(records: Sequence[Record]) -> dict[int, tuple[str, int]]:
    """Which records say they are a replay of ours that failed again: row number → (job, ordinal). Untrusted:
    the ledger decides.
    """
    claims: dict[int, tuple[str, int]] = {}
    for number, record in enumerate(records):
        job = ordinal = None
        for name, value in record.headers:
            if name == "dlq-job":
                job = value
            elif name == "dlq-ordinal":
                ordinal = value
            elif name == mark.NAME and value is not None and (claim := mark.read(value)) is not None:
                job, ordinal = claim.job.encode("utf-8", "replace"), b"%d" % claim.ordinal
        # Postgres text holds no NUL, and no job's name does.
        if job and b"\0" not in job and ordinal and ordinal.isdigit() and len(ordinal) < 18:
            claims[number] = (job.decode("utf-8", "replace")[:200], int(ordinal))
    return claims


def take_custody(
    drain: Drain, deadline_s: float, progress: Progress | None = None, parts: Sequence[int] | None = None
) -> dict[str, Any]:
    """The stage: everything the queue holds now, up to its cut-off, into custody."""
    if drain.dry_run:
        depth = drain.depth()
        drain.note("take_custody", f"dry run: at most {depth.entries} entries would be taken; nothing was")
        return {"taken": 0, "depth": depth.entries}
    drain.phase("take_custody")
    done = Intake(drain, parts).run(deadline_s, progress)
    data = {
        "taken": done.taken,
        "again": done.again,
        "returns": done.returns,
        "vanished_max": done.vanished_max,
        "seconds": round(done.seconds, 3),
        "reached": done.reached,
    }
    drain.note(
        "take_custody",
        str(done),
        level="info" if done.reached and not done.vanished_max else "warning",
        **data,
    )
    return data
