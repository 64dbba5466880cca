"""Positions, segments and entries: what intake writes in one transaction a batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, TypeVar

import msgspec
from sqlalchemy import Connection, func, insert, select, update

from dlq import clock
from dlq.archive import Archive, Segment
from dlq.entry import Group
from dlq.errors import ArchiveError, Overtaken, Refused
from dlq.ledger.schema import CONTESTED, delivery, entry, grp, intake, job, job_entry, segment, source
from dlq.ledger.store import Ledger, insert_rows
from dlq.ports import Range

ENTRY_COLUMNS = (
    "queue",
    "source",
    "part",
    "place",
    "pos",
    "taken_drain",
    "segment",
    "row_no",
    "payload_sha",
    "size",
    "reason",
    "grp",
    "owner",
    "target",
    "correlation_id",
    "trace_id",
    "dedupe_key",
    "origin",
    "key_hash",
    "failed_at",
    "expires_at",
    "attempts",
    "return_of",
)

_IN = 500
_GROUPS = 10_000  # remembered at most: a stranger could make every entry a group of its own
_SENT = (
    select(job_entry.c.ordinal, entry.c.id, job.c.kind, entry.c.attempts, job_entry.c.payload_sha)
    .join(entry, (entry.c.id == job_entry.c.entry) & (entry.c.job == job_entry.c.job))
    .join(job, job.c.id == job_entry.c.job)
)

T = TypeVar("T")


def batched(values: Iterable[T], size: int) -> Iterator[list[T]]:
    left = iter(values)
    while some := list(islice(left, size)):
        yield some


def source_id(tx: Connection, queue: str, uri: str) -> int:
    """The row of a source, written at its first sight.

    :raises Refused: when the queue was another source before (a recreated topic).
    """
    found = tx.execute(
        select(source.c.id, source.c.queue, source.c.retired_at).where(source.c.uri == uri)
    ).first()
    if found is not None and found.queue != queue:
        raise Refused(f"{uri} is drained as queue {found.queue!r} already; one queue file a DLQ")
    if found is not None and found.retired_at is None:
        return int(found.id)
    other = tx.execute(
        select(source.c.uri).where(source.c.queue == queue, source.c.retired_at.is_(None))
    ).scalar()
    if other is not None:
        raise Refused(
            f"queue {queue} was {other} and is {uri} now: the topic was recreated, or the file names another. "
            "Its positions mean nothing "
            f"here. If that is right, run `dlq ledger adopt-source {queue}`: it starts anew by source.start, "
            "entries in custody stay"
        )
    if found is not None:
        return adopt(tx, queue, uri)
    return int(
        tx.execute(
            insert(source).values(queue=queue, uri=uri, seen_at=clock.now()).returning(source.c.id)
        ).scalar_one()
    )


def adopt(tx: Connection, queue: str, uri: str) -> int:
    """Make ``uri`` the queue's one living source, whatever was before: the others' entries and ranges stay."""
    others = (source.c.queue == queue, source.c.uri != uri, source.c.retired_at.is_(None))
    tx.execute(update(source).where(*others).values(retired_at=clock.now()))
    found = tx.execute(
        update(source).where(source.c.uri == uri).values(retired_at=None).returning(source.c.id)
    ).scalar()
    if found is None:
        values = {"queue": queue, "uri": uri, "seen_at": clock.now()}
        found = tx.execute(insert(source).values(**values).returning(source.c.id)).scalar_one()
    return int(found)


def living_uri(tx: Connection, queue: str, uri: str) -> str:
    """What the queue's source is called now. A truncated topic keeps its id, but its offsets begin to mean something
    else: it is another source from then on, named ``<uri>#<n>``."""
    again = source.c.uri.startswith(f"{uri}#", autoescape=True)
    found = tx.execute(
        select(source.c.uri).where(source.c.queue == queue, source.c.retired_at.is_(None), again)
    ).scalar()
    return uri if found is None else str(found)


def positions(tx: Connection, source_row: int) -> dict[int, int]:
    """THE position of each partition: the end of its last range."""
    last = (
        select(intake.c.part, func.max(intake.c.round).label("round"))
        .where(intake.c.source == source_row)
        .group_by(intake.c.part)
        .subquery()
    )
    rows = tx.execute(
        select(intake.c.part, intake.c.to_pos)
        .join(last, (intake.c.part == last.c.part) & (intake.c.round == last.c.round))
        .where(intake.c.source == source_row, intake.c.to_pos.is_not(None))
    )
    return {int(r.part): int(r.to_pos) for r in rows}


def begin(tx: Connection, source_row: int, drain: str, first: Mapping[int, tuple[int, int]]) -> None:
    """Write down where a first intake begins, and up to where its entries wait for a decision."""
    for part, (start, end) in sorted(first.items()):
        _range(tx, source_row, drain, part, start, end, first=1)


def open_ranges(
    tx: Connection, source_row: int, drain: str, starts: Mapping[int, int], cutoffs: Mapping[int, int]
) -> dict[int, int]:
    """Begin a range for each partition of a pass that has something to read; returns their rounds.

    Every drain has a range of each partition, also of an empty one. ``tx`` must be alone.

    :raises Overtaken: when a partition is no longer where this pass begins.
    """
    at = positions(tx, source_row)
    known = set(
        tx.execute(
            select(intake.c.part).where(
                intake.c.source == source_row, intake.c.drain == drain, intake.c.first == 0
            )
        ).scalars()
    )
    rounds = {}
    for part, start in sorted(starts.items()):
        if at.get(part, start) != start:
            raise Overtaken(
                f"partition {part} is at {at[part]}, no longer at {start}: another process takes this queue"
            )
        if (begun := _begun(tx, source_row, drain, part, start, cutoffs[part])) is not None:
            rounds[part] = begun
        elif start < cutoffs[part] or part not in known:
            rounds[part] = _range(tx, source_row, drain, part, start, cutoffs[part], first=0)
    return rounds


def _begun(tx: Connection, source_row: int, drain: str, part: int, start: int, cutoff: int) -> int | None:
    """The round of this drain that is the partition's last, covers just this, and moved nothing yet."""
    last = tx.execute(
        select(intake)
        .where(intake.c.source == source_row, intake.c.part == part)
        .order_by(intake.c.round.desc())
        .limit(1)
    ).first()
    if last is None or last.first or (last.drain, last.to_pos, last.cutoff) != (drain, start, cutoff):
        return None
    return int(last.round) if last.from_pos == start else None


def _range(
    tx: Connection, source_row: int, drain: str, part: int, start: int, cutoff: int, *, first: int
) -> int:
    last = tx.execute(
        select(func.max(intake.c.round)).where(intake.c.source == source_row, intake.c.part == part)
    ).scalar()
    number = int(last or 0) + 1
    values = {
        "source": source_row,
        "part": part,
        "round": number,
        "drain": drain,
        "from_pos": start,
        "to_pos": start,
    }
    tx.execute(insert(intake).values(**values, cutoff=cutoff, first=first))
    return number


def first_until(tx: Connection, source_row: int) -> dict[int, int]:
    """By partition, the position before which entries belong to the first intake."""
    rows = tx.execute(
        select(intake.c.part, func.max(intake.c.cutoff).label("until"))
        .where(intake.c.source == source_row, intake.c.first == 1)
        .group_by(intake.c.part)
    )
    return {int(r.part): int(r.until) for r in rows}


def move(
    tx: Connection, source_row: int, rounds: dict[int, int], ranges: Sequence[Range], again: int
) -> None:
    """Move the positions past a batch.

    Where another pass has opened a range meanwhile and moved nothing yet, this one goes on in a new range after it, so
    that the chain holds (``rounds`` says which).

    :raises Overtaken: when a partition is not where the batch began: another process took what follows.
    """
    # On Postgres two passes could read the same last range; SQLite has one writer anyway.
    tx.execute(select(source.c.id).where(source.c.id == source_row).with_for_update(key_share=True))
    if again and not ranges:  # of a queue without a log
        newest = select(func.max(intake.c.round)).where(intake.c.source == source_row).scalar_subquery()
        tx.execute(
            update(intake)
            .where(intake.c.source == source_row, intake.c.round == newest)
            .values(again=intake.c.again + again)
        )
    for span in ranges:
        here = (intake.c.source == source_row) & (intake.c.part == span.part)
        last = tx.execute(
            select(intake.c.round, intake.c.to_pos).where(here).order_by(intake.c.round.desc()).limit(1)
        ).one()
        if last.to_pos != span.from_pos:
            raise Overtaken(
                f"partition {span.part} is at {last.to_pos}, no longer at {span.from_pos}: another process takes "
                "this queue; this one stops"
            )
        if last.round != rounds[span.part]:
            ours = tx.execute(
                select(intake.c.drain, intake.c.cutoff).where(here, intake.c.round == rounds[span.part])
            ).one()
            rounds[span.part] = _range(
                tx, source_row, ours.drain, span.part, span.from_pos, ours.cutoff, first=0
            )
        tx.execute(
            update(intake)
            .where(here, intake.c.round == rounds[span.part])
            .values(
                to_pos=span.to_pos,
                leader_epoch=func.coalesce(
                    span.leader_epoch, intake.c.leader_epoch
                ),  # a range of markers says none
                again=intake.c.again + again,
                vanished_max=intake.c.vanished_max + span.vanished,
            )
        )
        again = 0


def add_segment(tx: Connection, queue: str, written: Segment, kind: str) -> int:
    return int(
        tx.execute(
            insert(segment)
            .values(queue=queue, uri=written.uri, sha256=written.sha256, rows=written.rows, kind=kind)
            .returning(segment.c.id)
        ).scalar_one()
    )


def add_entries(tx: Connection, rows: Sequence[Sequence[Any]]) -> int:
    """Insert entries by :data:`ENTRY_COLUMNS`; a place that has a row already is passed over. Returns how many
    were new.
    """
    return insert_rows(tx, entry, ENTRY_COLUMNS, rows, skip_on=("source", "part", "place"))


def group_ids(
    ledger: Ledger, queue: str, epoch: int, groups: Sequence[Group], known: dict[Group, int]
) -> None:
    """Make sure every group has a row; fills ``known``."""
    if len(known) > _GROUPS:
        known.clear()
    missing = [g for g in dict.fromkeys(groups) if g not in known]
    if not missing:
        return
    with ledger.write(queue, epoch) as tx:
        for group in missing:
            same = (
                (grp.c.queue == queue)
                & (grp.c.fingerprint == group.fingerprint)
                & (grp.c.component == group.component)
                & (grp.c.category == group.category)
                & (grp.c.remedy == group.remedy)
                & (grp.c.rule == group.rule)
                & (grp.c.format == group.format)
            )
            found = tx.execute(select(grp.c.id).where(same)).scalar()
            if found is None:
                found = tx.execute(
                    insert(grp)
                    .values(
                        queue=queue,
                        fingerprint=group.fingerprint,
                        signature=group.signature,
                        component=group.component,
                        error_type=group.error_type,
                        category=group.category,
                        remedy=group.remedy,
                        rule=group.rule,
                        format=group.format,
                        owner=group.owner,
                    )
                    .returning(grp.c.id)
                ).scalar_one()
            known[group] = int(found)


class Sent(msgspec.Struct, frozen=True):
    """An entry that was sent: what a dead letter claims to be the failed replay of.

    ``handed_back``: to the queue itself, by a restore; also where the ledger is still in doubt about it.
    """

    entry: int
    handed_back: bool
    attempts: int
    payload_sha: str


def _sent(row: Any) -> Sent:
    return Sent(row.id, row.kind == "hand_back", row.attempts, row.payload_sha)


def sent_by_ordinal(tx: Connection, claims: Iterable[tuple[str, int]]) -> dict[tuple[str, int], Sent]:
    """The claimed (job, ordinal) pairs that were really sent."""
    found: dict[tuple[str, int], Sent] = {}
    by_job: dict[str, list[int]] = {}
    for job_id, ordinal in claims:
        by_job.setdefault(job_id, []).append(ordinal)
    for job_id, ordinals in by_job.items():
        for some in batched(ordinals, _IN):
            rows = tx.execute(_SENT.where(job_entry.c.job == job_id, job_entry.c.ordinal.in_(some)))
            found.update({(job_id, int(r.ordinal)): _sent(r) for r in rows})
    return found


def sent_spans(tx: Connection) -> dict[int, tuple[int, int]]:
    """By partition of any target, the first and last position a replay was delivered to.

    A few looks into the index, however much was delivered: every look for returns asks for it.
    """
    spans: dict[int, tuple[int, int]] = {}
    part = -1
    while True:
        found = tx.execute(select(func.min(delivery.c.part)).where(delivery.c.part > part)).scalar()
        if found is None:
            return spans
        part = int(found)
        low, high = (
            tx.execute(select(end(delivery.c.pos)).where(delivery.c.part == part)).scalar()
            for end in (func.min, func.max)
        )
        if low is not None and high is not None:
            spans[part] = (int(low), int(high))


def sent_by_place(tx: Connection, places: Iterable[tuple[str, int, int]]) -> dict[tuple[str, int, int], Sent]:
    """The (target, partition, position) places that hold a replay of ours."""
    found: dict[tuple[str, int, int], Sent] = {}
    by_part: dict[tuple[str, int], list[int]] = {}
    for topic, part, pos in places:
        by_part.setdefault((topic, part), []).append(pos)
    for (topic, part), positions_ in by_part.items():
        for some in batched(positions_, _IN):
            rows = tx.execute(
                _SENT.add_columns(delivery.c.pos)
                .join(
                    delivery,
                    (delivery.c.job == job_entry.c.job) & (delivery.c.ordinal == job_entry.c.ordinal),
                )
                .where(job.c.target == topic, delivery.c.part == part, delivery.c.pos.in_(some))
            )
            found.update({(topic, part, int(r.pos)): _sent(r) for r in rows})
    return found


def sent_by_ref(tx: Connection, refs: Iterable[str]) -> dict[str, Sent]:
    """The replays of ours that a queue gave these ids: native redrive keeps a message's id."""
    found: dict[str, Sent] = {}
    for some in batched(refs, _IN):
        rows = tx.execute(
            _SENT.add_columns(delivery.c.ref)
            .join(delivery, (delivery.c.job == job_entry.c.job) & (delivery.c.ordinal == job_entry.c.ordinal))
            .where(delivery.c.ref.in_(some))
        )
        found.update({str(r.ref): _sent(r) for r in rows})
    return found


def mark_returned(tx: Connection, ids: Sequence[int], drain: str) -> None:
    """Entries whose replay came back; in the transaction that takes the new entry. What was in doubt was sent, then."""
    for some in batched(ids, _IN):
        tx.execute(
            update(entry)
            .where(entry.c.id.in_(some), entry.c.state == "ambiguous")
            .values(state="replayed", settled_drain=drain, reason="its replay came back")
        )
        tx.execute(
            update(entry)
            .where(entry.c.id.in_(some), entry.c.state.in_(("replayed", "confirmed")))
            .values(state="returned", reason="its replay failed again")
        )


def mark_contested(tx: Connection, ids: Sequence[int]) -> None:
    """Entries whose replay a dead letter of another payload claims to be. A consumer may have written the value anew
    before it gave up, or somebody copied our headers into a message of their own: nobody here can tell which.
    """
    for some in batched(ids, _IN):
        tx.execute(
            update(entry)
            .where(entry.c.id.in_(some), entry.c.state.in_(("replayed", "confirmed")))
            .values(reason=CONTESTED)
        )


def find_source(tx: Connection, uri: str) -> int | None:
    found = tx.execute(select(source.c.id).where(source.c.uri == uri)).scalar()
    return None if found is None else int(found)


def register_orphans(ledger: Ledger, archive: Archive, queue: str, epoch: int) -> int:
    """Give a row to every segment file that has none: a crash came between file and rows. Returns how many.

    One that can't be read is passed over: the position had not moved, so nothing depends on it.
    """
    with ledger.read() as tx:
        known = set(tx.execute(select(segment.c.uri).where(segment.c.queue == queue)).scalars())
    registered = 0
    for uri in archive.segments():
        if uri in known:
            continue
        try:
            _, digest, rows = archive.about(uri)
        except ArchiveError:
            continue
        with ledger.write(queue, epoch) as tx:
            add_segment(tx, queue, Segment(uri, digest, rows), "orphan")
        registered += 1
    return registered
