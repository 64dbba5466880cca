"""Rebuild: a ledger that was lost, or restored from an older backup, takes up again what the archive has.

The archive has bytes, not outcomes. So what it has and the ledger lacks becomes entries in doubt, and so does what an
older ledger believes to be open: it may have been sent since. A person says what becomes of it; nothing is sent before.

While it runs, an epoch file in the archive names no ledger, so that nothing opens the queue before it is done; run
again, it goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, NamedTuple

from sqlalchemy import Connection, case, insert, literal, select, update

from dlq import clock, expiry, mark
from dlq.archive import Archive, Rows, Segment
from dlq.config import QueueConfig
from dlq.dedupe import DedupeKeys
from dlq.destination import Destination
from dlq.drain import Drain, drain_id
from dlq.entry import FLAWS, Record, payload_sha
from dlq.errors import ArchiveError
from dlq.grouping.classify import Classifier
from dlq.ledger import Ledger, custody, insert_rows, lease
from dlq.ledger.behind import behind
from dlq.ledger.jobs import record_decision
from dlq.ledger.schema import entry, job, segment, source
from dlq.ledger.schema import queue as queues
from dlq.ports import Connections, Range, Source
from dlq.regroup import regrouping

REASON = "rebuilt"
"""Why an entry is in doubt: the ledger that knew its outcome is gone."""

Progress = Callable[[int, int], None]
"""Called with (segments, of)."""

_LEASE_S = 300.0
_CHAIN = 100  # returns of returns; a longer chain is nobody's replays
_ROW = (*custody.ENTRY_COLUMNS, "state")


@dataclass
class Rebuilt:
    """What a rebuild did; ``behind`` says what was wrong, None where nothing was."""

    behind: str | None = None
    segments: int = 0
    adopted: int = 0
    doubted: int = 0
    positions: dict[int, int] = field(default_factory=dict)
    findings: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        if self.behind is None and not self.adopted:
            return "nothing to rebuild: the ledger, the archive and the queue agree"
        return (
            f"{self.adopted} entries adopted from {self.segments} segment(s) of the archive, {self.doubted} that the "
            "ledger believed open are in doubt now; nothing is sent before a person decides"
        )


class _Seen(NamedTuple):
    """A segment file that the ledger lacks, and what it says of itself."""

    uri: str
    sha256: str
    source: str
    epoch: int
    ranges: Sequence[tuple[int, int, int]]
    known: int | None
    """Its row, where it was registered as an orphan."""


def rebuild(
    config: QueueConfig, *, who: str, run_id: str, connections: Connections, progress: Progress | None = None
) -> Rebuilt:
    """Adopt what the archive has and the ledger lacks, and make this ledger the queue's own.

    :raises QueueBusy: while another holds the queue in this ledger.
    :raises ConfigError: where there is no ledger: create it first.
    """
    ledger = Ledger.open(config.ledger)
    identity = drain_id(config.name, run_id)
    archive = Archive(config.archive, config.name)
    done = Rebuilt()
    missing = list(_missing(ledger, archive, config.name, done))
    drain = Drain(identity, config, ledger, connections, epoch=-1, kind="cli")
    try:
        drain.source.uri = _living(ledger, config.name, drain.source.uri, missing)
        floor = _floor(drain, archive, missing, done)
        if done.behind is not None:
            floor += 1
            archive.claim_epoch(floor, f"none (a rebuild by {ledger.id} is not over)", identity)
        elif not missing:
            return done
        drain.epoch = lease.acquire(
            ledger,
            config.name,
            identity,
            run_id=run_id,
            kind="cli",
            seconds=_LEASE_S,
            config=config.frozen(),
            floor=floor,
        )
        verdict = "failed"
        try:
            _rebuild(drain, missing, who, done, progress)
            archive.claim_plan(drain.epoch, "none", "")
            archive.claim_epoch(drain.epoch, ledger.id, identity)
            verdict = "done"
        finally:
            lease.release(ledger, config.name, identity, drain.epoch, verdict)
    finally:
        drain.close()
    return done


def _rebuild(
    drain: Drain, missing: Sequence[_Seen], who: str, done: Rebuilt, progress: Progress | None
) -> None:
    lost = not _entries(drain) and not drain.positions()
    with drain.ledger.write(drain.queue, drain.epoch) as tx:
        saw = done.behind or "segments without rows"
        record_decision(
            tx, drain.queue, who, "rebuild", "ledger", saw, "adopt the archive, as in doubt", drain.id
        )
        if done.behind is not None:
            done.doubted = _doubt(tx, drain.queue)
        other = _other_source(tx, drain.queue, drain.source.uri)
    if done.behind is None:
        lowest = _bounds(drain.source)[0]
        adopting = _Adopting(
            drain, lambda uri, r: uri == drain.source.uri and (r.pos or 0) < lowest.get(r.part, 0)
        )
    else:
        adopting = _Adopting(drain, lambda _uri, _record: True)
    for number, one in enumerate(missing, 1):
        try:
            adopted = adopting.adopt(one)
            done.adopted += adopted
            done.segments += adopted > 0
        except ArchiveError as error:
            done.findings.append(str(error))
        lease.extend(drain.ledger, drain.queue, drain.epoch, _LEASE_S)
        if progress is not None:
            progress(number, len(missing))
    adopting.close()
    adopting.link()
    if done.behind is not None and other is None:
        ranges = _ranges(missing, drain.source.uri)
        done.positions = _set_positions(drain, ranges, lost=lost, findings=done.findings)
        drain.source.remember(done.positions, drain.ledger.id, drain.epoch)
    elif other is not None:
        done.findings.append(
            f"the ledger's source is {other}, the queue is {drain.source.uri} now: "
            f"run `dlq ledger adopt-source {drain.queue}` next"
        )
    for finding in done.findings:
        drain.note("rebuild", finding, level="warning")
    drain.note("rebuild", str(done), adopted=done.adopted, doubted=done.doubted, segments=done.segments)


# What is missing, and why


def _missing(ledger: Ledger, archive: Archive, queue: str, done: Rebuilt) -> Iterator[_Seen]:
    with ledger.read() as tx:
        known = {
            str(r.uri): (int(r.id), str(r.kind), str(r.sha256))
            for r in tx.execute(
                select(segment.c.uri, segment.c.id, segment.c.kind, segment.c.sha256).where(
                    segment.c.queue == queue
                )
            )
        }
    for uri in archive.segments():
        row, kind, sha = known.get(uri, (None, "", ""))
        if kind == "intake":
            continue
        try:
            about, digest, _ = archive.about(uri)
        except ArchiveError as error:
            done.findings.append(str(error))
            continue
        if sha and sha != digest:
            done.findings.append(
                f"archive: segment {uri} has other bytes than were written; it is not adopted"
            )
            continue
        ranges = [(int(p), int(a), int(b)) for p, a, b in about["ranges"]]
        yield _Seen(uri, digest, str(about["source"]), int(about["epoch"]), ranges, row)


def _floor(drain: Drain, archive: Archive, missing: Sequence[_Seen], done: Rebuilt) -> int:
    """The highest epoch known anywhere; says in ``done.behind`` what the ledger doesn't know of the world."""
    newest = archive.newest_epoch()
    done.behind = behind(drain.ledger, archive, drain.queue)
    with drain.ledger.read() as tx:
        known = int(tx.execute(select(queues.c.epoch).where(queues.c.name == drain.queue)).scalar() or 0)
    positions, echoes = drain.positions(), drain.source.echoes()
    for part, echo in echoes.items():
        if done.behind is None and (
            echo.ledger not in (None, drain.ledger.id)
            or echo.epoch > known
            or echo.position > positions.get(part, -1)
        ):
            done.behind = (
                f"partition {part} was committed at {echo.position} by ledger {echo.ledger or '?'}, "
                f"epoch {echo.epoch}; this ledger stands at {positions.get(part, 'nothing')}, epoch {known}"
            )
    epochs = [
        known,
        newest[0] if newest else 0,
        *(e.epoch for e in echoes.values()),
        *(s.epoch for s in missing),
    ]
    return max(epochs)


def _entries(drain: Drain) -> bool:
    with drain.ledger.read() as tx:
        return tx.execute(select(entry.c.id).where(entry.c.queue == drain.queue).limit(1)).first() is not None


def _living(ledger: Ledger, queue: str, uri: str, missing: Sequence[_Seen]) -> str:
    """The newest of what the present topic was called (``<uri>``, ``<uri>#2``, …) in ledger or archive."""
    base = uri.partition("#")[0]
    with ledger.read() as tx:
        names = set(tx.execute(select(source.c.uri).where(source.c.queue == queue)).scalars())
    names |= {one.source for one in missing}
    family = [str(name) for name in names if name.partition("#")[0] == base]
    return max([uri, *family], key=lambda name: int(name.partition("#")[2] or 1))


def _other_source(tx: Connection, queue: str, uri: str) -> str | None:
    """The queue's living source in the ledger, where the topic is another one by now."""
    base = uri.partition("#")[0]
    found = tx.execute(
        select(source.c.uri).where(source.c.queue == queue, source.c.retired_at.is_(None))
    ).scalar()
    return None if found is None or found.partition("#")[0] == base else str(found)


# Entries


def _doubt(tx: Connection, queue: str) -> int:
    """What an older ledger believes open may have been sent since: it is in doubt, and its jobs are over."""
    kept = case((entry.c.reason.in_(FLAWS), entry.c.reason), else_=literal(REASON))
    doubted = tx.execute(
        update(entry)
        .where(entry.c.queue == queue, entry.c.state.in_(("open", "planned", "sending")))
        .values(state="ambiguous", reason=kept)
    ).rowcount
    tx.execute(
        update(job)
        .where(job.c.queue == queue, job.c.state.in_(("approved", "running")))
        .values(state="closed", ended="the ledger was rebuilt")
    )
    return int(doubted)


class _Adopting:
    """Makes entries of segments. :meth:`link` says which of them are returns, once all are there."""

    def __init__(self, drain: Drain, wanted: Callable[[str, Record], bool]) -> None:
        self._drain = drain
        self._wanted = wanted
        self._classifier = Classifier.load(drain.config, regrouping(drain))
        self._keys = DedupeKeys(drain.config, drain.connections)
        self._kept_ms = drain.source.retention_ms()
        self._groups: dict[Any, int] = {}
        self._with_returns: list[_Seen] = []
        self._destination = Destination(drain.config)
        self._keyed = drain.config.target.ordering == "per_key"

    def adopt(self, one: _Seen) -> int:
        """Rows for what has none yet, in one transaction with the segment's; returns how many."""
        drain = self._drain
        records = list(_records(drain.archive, one.uri))
        chosen = [(n, r) for n, r in enumerate(records) if self._wanted(one.source, r)]
        if not chosen:
            return 0
        if any(_claimed(record) for _, record in chosen):
            self._with_returns.append(one)
        read = [self._classifier.classify(record) for _, record in chosen]
        for (_, record), (what, _) in zip(chosen, read, strict=True):
            self._keys.fill(record, what)
        custody.group_ids(drain.ledger, drain.queue, drain.epoch, [group for _, group in read], self._groups)
        with drain.ledger.write(drain.queue, drain.epoch) as tx:
            where = _source_row(tx, drain.queue, one.source, living=one.source == drain.source.uri)
            kept_in = one.known
            if kept_in is None:
                written = Segment(one.uri, one.sha256, len(records))
                kept_in = custody.add_segment(tx, drain.queue, written, "intake")
            else:
                tx.execute(update(segment).where(segment.c.id == kept_in).values(kind="intake"))
            rows = [
                self._row(where, kept_in, number, record, what, group)
                for (number, record), (what, group) in zip(chosen, read, strict=True)
            ]
            return insert_rows(tx, entry, _ROW, rows, skip_on=("source", "part", "place"))

    def _row(
        self, where: int, kept_in: int, number: int, record: Record, what: Any, group: Any
    ) -> tuple[Any, ...]:
        key = record.lane if self._keyed else None
        values = {
            "queue": self._drain.queue,
            "source": where,
            "part": record.part,
            "place": record.place,
            "pos": record.pos,
            "taken_drain": self._drain.id,
            "segment": kept_in,
            "row_no": number,
            "payload_sha": payload_sha(record.key, record.value),
            "size": len(record.key or b"") + len(record.value or b""),
            "reason": record.flaw or REASON,
            "grp": self._groups[group],
            "owner": group.owner,
            "target": self._destination.of(what),
            "correlation_id": what.correlation_id,
            "trace_id": what.trace_id,
            "dedupe_key": what.dedupe_key,
            "origin": what.origin,
            "key_hash": None if key is None else blake2b(key, digest_size=8).hexdigest(),
            "failed_at": clock.from_ms(what.failed_at_ms),
            "expires_at": expiry.of(record, self._kept_ms),
            "attempts": what.retry_count,
            "return_of": None,
            "state": "ambiguous",
        }
        return tuple(values[column] for column in _ROW)

    def close(self) -> None:
        self._keys.close()

    def link(self) -> None:
        """Say what each adopted return is the return of: by our header, and only where the payload is the same."""
        drain = self._drain
        for one in self._with_returns:
            for record in _records(drain.archive, one.uri):
                if (claim := _claimed(record)) is None:
                    continue
                uri, part, place = ["", "", *claim.entry.rsplit("/", 2)][-3:]
                if not part.isascii() or not part.isdigit() or len(part) > 9:
                    continue
                with drain.ledger.write(drain.queue, drain.epoch) as tx:
                    ours = _find(tx, drain.queue, one.source, record.part, record.place)
                    first = _find(tx, drain.queue, uri, int(part), place)
                    if (
                        ours is None
                        or first is None
                        or ours.id == first.id
                        or ours.payload_sha != first.payload_sha
                        or not _may_descend(tx, ours.id, first.id)
                    ):
                        continue
                    tx.execute(
                        update(entry)
                        .where(entry.c.id == ours.id, entry.c.taken_drain == drain.id)
                        .values(return_of=first.id)
                    )
                    if first.job is not None and first.job == claim.job:
                        custody.mark_returned(tx, [first.id], drain.id)


def _find(tx: Connection, queue: str, uri: str, part: int, place: str) -> Any:
    return tx.execute(
        select(entry.c.id, entry.c.payload_sha, entry.c.job)
        .join(source, source.c.id == entry.c.source)
        .where(entry.c.queue == queue, source.c.uri == uri, entry.c.part == part, entry.c.place == place)
    ).first()


def _may_descend(tx: Connection, number: int, first: int) -> bool:
    """Whether ``first`` is none of what came back as ``number``: headers are anybody's, and could make a ring."""
    at: int | None = first
    for _ in range(_CHAIN):
        if at is None or at == number:
            return at is None
        at = tx.execute(select(entry.c.return_of).where(entry.c.id == at)).scalar()
    return False


class _Claim(NamedTuple):
    """The entry and the job that a record says it is the failed replay of."""

    entry: str
    job: str


def _claimed(record: Record) -> _Claim | None:
    headers = dict(record.headers)
    if (ours := headers.get(mark.NAME)) is not None and (said := mark.read(ours)) is not None:
        return _Claim(said.entry, said.job)
    if (named := headers.get("dlq-entry")) is None:
        return None
    return _Claim(
        named.decode("utf-8", "replace"), (headers.get("dlq-job") or b"").decode("utf-8", "replace")
    )


def _records(archive: Archive, uri: str) -> Iterator[Record]:
    table = archive.read(uri)
    rows, places, flaws = Rows(table), table["place"].to_pylist(), table["flaw"].to_pylist()
    for n in range(len(rows)):
        at = rows[n]
        yield Record(
            at.part,
            places[n],
            at.pos,
            at.key,
            at.value,
            at.headers,
            at.timestamp_ms,
            flaws[n],
            at.types,
            at.system,
            "sqs" if at.pos is None else "kafka",
        )


def _source_row(tx: Connection, queue: str, uri: str, *, living: bool) -> int:
    """The row of a source; what isn't the queue's present topic is written down as retired."""
    found = tx.execute(select(source.c.id).where(source.c.uri == uri)).scalar()
    if found is None:
        now = clock.now()
        values = {"queue": queue, "uri": uri, "seen_at": now, "retired_at": None if living else now}
        found = tx.execute(insert(source).values(**values).returning(source.c.id)).scalar_one()
    return int(found)


# Positions


def _ranges(missing: Iterable[_Seen], uri: str) -> dict[int, list[tuple[int, int]]]:
    by_part: dict[int, list[tuple[int, int]]] = {}
    for one in missing:
        for part, start, end in one.ranges if one.source == uri else ():
            by_part.setdefault(part, []).append((start, end))
    return {part: sorted(spans) for part, spans in by_part.items()}


def _bounds(reading: Source) -> tuple[dict[int, int], dict[int, int]]:
    """Where each partition begins and ends now."""
    look = reading.open_pass({})
    look.close()
    return dict(look.starts), dict(look.cutoffs)


def _set_positions(
    drain: Drain, ranges: dict[int, list[tuple[int, int]]], *, lost: bool, findings: list[str]
) -> dict[int, int]:
    """Move each partition's position to where the archive has everything before; returns them.

    What the queue was told beyond that is not in the archive, so it is read again, and waits for a decision like a
    first intake's, for it may have been sent.
    """
    lowest, highest = _bounds(drain.source)
    first, echoes = drain.source.first(), drain.source.echoes()
    with drain.ledger.write(drain.queue, drain.epoch) as tx:
        row = custody.adopt(tx, drain.queue, drain.source.uri)
        held = custody.positions(tx, row)
    for part in sorted(highest):
        spans = ranges.get(part, [])
        told = echoes[part].position if part in echoes else None
        if part in held:
            begin = held[part]
        elif lost:
            # Never later than what was read; never earlier than the queue's file says.
            known = [start for start, _ in spans] or ([told] if told is not None else [])
            begin = min([first[part][0], *known])
        else:
            begin = lowest[part]  # added since the backup
        position = begin
        for start, end in spans:
            if start > position and _any(drain.source, part, position, start):
                findings.append(
                    f"partition {part}: the archive lacks what lies from {position} to {start}; "
                    "the queue still has it, it is read again"
                )
                break
            position = max(position, end)
        until = max([position, *([told] if told is not None else []), *(end for _, end in spans)])
        if lost:
            until = max(until, highest[part])
        with drain.ledger.write(drain.queue, drain.epoch, alone=True) as tx:
            if position > begin:
                rounds = custody.open_ranges(tx, row, drain.id, {part: begin}, {part: position})
                custody.move(tx, row, rounds, [Range(part, begin, position)], 0)
            if until > position or (part not in held and position == begin):
                custody.begin(tx, row, drain.id, {part: (position, until)})
    with drain.ledger.read() as tx:
        return custody.positions(tx, row)


def _any(reading: Source, part: int, start: int, end: int) -> bool:
    return any(batch for batch in reading.reread([Range(part, start, end)]))


__all__ = ["REASON", "Rebuilt", "rebuild"]
