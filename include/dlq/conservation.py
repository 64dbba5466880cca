"""Conservation, by witnesses: the log, the archive and the target are read afresh and held against the ledger."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Integer,
    MetaData,
    Table,
    Text,
    func,
    insert,
    or_,
    select,
    text,
)

from dlq.drain import Drain
from dlq.entry import payload_sha
from dlq.errors import ArchiveError
from dlq.expectations import Expectations, Frames
from dlq.ledger import custody, insert_rows
from dlq.ledger import jobs as ledger_jobs
from dlq.ledger.schema import SENT, entry, grp, intake, job, segment
from dlq.ledger.schema import drain as drains
from dlq.ports import Range

_BROKEN_SHOWN = 100

_witnesses = MetaData()
# Declared types matter: untyped, the anti-joins lose their indexes and the proof takes minutes.
logged = Table(
    "logged",
    _witnesses,
    Column("source", Integer, primary_key=True),
    Column("part", Integer, primary_key=True),
    Column("place", Text, primary_key=True),
    Column("pos", BigInteger),
    prefixes=["TEMPORARY"],
)
archived = Table(
    "archived",
    _witnesses,
    Column("source", Integer, primary_key=True),
    Column("part", Integer, primary_key=True),
    Column("place", Text, primary_key=True),
    Column("payload_sha", Text, primary_key=True),
    prefixes=["TEMPORARY"],
)
seen = Table("seen", _witnesses, Column("job", Text), Column("ordinal", BigInteger), prefixes=["TEMPORARY"])
delivered = Table(
    "delivered",
    _witnesses,
    Column("job", Text, primary_key=True),
    Column("ordinal", BigInteger, primary_key=True),
    Column("n", Integer),
    prefixes=["TEMPORARY"],
)
witnessed = Table("witnessed", _witnesses, Column("job", Text, primary_key=True), prefixes=["TEMPORARY"])


@dataclass(frozen=True)
class Proof:
    """What the witnesses say: broken laws with what and how many, counts by law, and the accounts they were
    held against.
    """

    broken: list[dict[str, Any]]
    laws: Counter[str]
    witnesses: dict[str, str]
    accounts: dict[str, int]
    frames: Frames


def prove(drain: Drain) -> Proof:
    """Read the witnesses afresh and hold them against the ledger: any row of ``broken`` is a broken law."""
    with drain.ledger.scratch() as tx:
        _witnesses.create_all(tx)
        broken: list[dict[str, Any]] = []
        witnesses = {
            "log": _log(drain, tx),
            "archive": _archive(drain, tx, broken),
            "target": _target(drain, tx),
        }
        laws = Counter(b["law"] for b in broken)
        sql = text(files("dlq").joinpath("conservation.sql").read_text())
        for row in tx.execute(sql, {"drain": drain.id, "queue": drain.queue}):
            laws[row.law] += 1
            if len(broken) < _BROKEN_SHOWN:
                broken.append({"law": row.law, "what": row.what, "n": int(row.n)})
        held = accounts(drain, tx)
        return Proof(broken, laws, witnesses, held, _frames(drain, tx, held, broken))


def verify_conservation(drain: Drain) -> dict[str, Any]:
    """Prove that no entry was lost or run twice; ``broken`` names each law that doesn't hold, with what and how many.

    A witness that doesn't exist is said to be "not witnessed"; what retention took unread is counted beside the proof.
    """
    if drain.dry_run:
        return {"proven": None, "broken": [], "said": "dry run: nothing was done, nothing is to be proven"}
    drain.phase("verify")
    with Expectations() as expectations:  # its library takes seconds to import: it does while we read
        proof = prove(drain)
        checks = expectations.check(proof.frames)
    failed = [c["expectation"] for c in checks if not c["success"]]
    proven = not proof.broken and not failed
    held = proof.accounts
    if proven:
        said = (
            f"proven: {held['before']} before + {held['taken']} taken = {held['settled']} settled"
            f" + {held['unsettled']} unsettled; " + "; ".join(f"{k}: {v}" for k, v in proof.witnesses.items())
        )
    else:
        said = "NOT PROVEN: " + "; ".join([*(f"{law} ({n})" for law, n in proof.laws.items()), *failed])
    if held["vanished_max"]:
        said += f"; at most {held['vanished_max']} vanished by retention before they could be read"
    data = {
        "proven": proven,
        "broken": proof.broken,
        "laws": dict(proof.laws),
        "witnesses": proof.witnesses,
        "accounts": held,
        "expectations": checks,
    }
    drain.note("verify_conservation", said, level="info" if proven else "error", **data)
    return {**data, "said": said}


def _log(drain: Drain, tx: Connection) -> str:
    """This drain's ranges, read again from the queue's log."""
    if not drain.source.has_log:
        return "not witnessed (the queue has no log)"
    row = custody.find_source(tx, drain.source.uri)
    ranges = tx.execute(
        select(intake.c.part, func.min(intake.c.from_pos), func.max(intake.c.to_pos))
        .where(intake.c.source == row, intake.c.drain == drain.id)
        .group_by(intake.c.part)
    ).all()
    spans = [Range(int(part), int(start), int(end)) for part, start, end in ranges if end > start]
    total = 0
    for batch in drain.source.reread(spans):
        total += insert_rows(
            tx, logged, ("source", "part", "place", "pos"), [(row, *where) for where in batch]
        )
    return f"{total} records recounted in {len(spans)} range(s)"


_SUMMED = ("part", "place", "key", "value")


def _archive(drain: Drain, tx: Connection, broken: list[dict[str, Any]]) -> str:
    """Every segment of what was taken by this drain or is unsettled, its sum checked, its payloads summed again."""
    ours = or_(entry.c.taken_drain == drain.id, entry.c.settled_drain.is_(None))
    needed = select(entry.c.segment).where(entry.c.queue == drain.queue, ours).distinct()
    segments = tx.execute(
        select(segment.c.id, segment.c.uri, segment.c.sha256).where(
            segment.c.id.in_(needed), segment.c.kind != "draft"
        )
    ).all()
    total = 0
    for one in segments:
        try:
            table, about = drain.archive.verified(one.uri, one.sha256, _SUMMED)
        except ArchiveError as error:
            broken.append({"law": "archive segment broken", "what": str(error), "n": one.id})
            continue
        source = custody.find_source(tx, str(about["source"]))
        columns = (table[name].to_pylist() for name in _SUMMED)
        total += insert_rows(
            tx,
            archived,
            ("source", "part", "place", "payload_sha"),
            [
                (source, part, place, payload_sha(key, value))
                for part, place, key, value in zip(*columns, strict=True)
            ],
            skip_on=("source", "part", "place", "payload_sha"),
        )
    return f"{total} payload sums in {len(segments)} segment(s)"


def _target(drain: Drain, tx: Connection) -> str:
    """Each job of this drain, and each whose entries it settled, read from where the target ended when the job
    began.
    """
    settled = (
        select(entry.c.job).where(entry.c.settled_drain == drain.id, entry.c.job.is_not(None)).distinct()
    )
    jobs = [
        j
        for j in ledger_jobs.find(
            tx, job.c.queue == drain.queue, or_(job.c.drain == drain.id, job.c.id.in_(settled))
        )
        if j.target_from is not None
    ]
    if not jobs:
        return "nothing was sent"
    unseen = [j for j in jobs if not drain.target_of(j.kind).transactional]
    jobs = [j for j in jobs if j not in unseen]
    insert_rows(tx, witnessed, ("job",), [(j.id,) for j in jobs])
    if not jobs:
        return f"not witnessed ({len(unseen)} job(s) to queues, which can't be read without taking)"
    ours = f"{drain.queue}-"
    with drain.ledger.read() as look:
        ledger_knows = set(look.execute(select(job.c.id).where(job.c.queue == drain.queue)).scalars())
    total = 0
    for kind, topic in sorted({(j.kind, j.target) for j in jobs}):
        here = [j for j in jobs if (j.kind, j.target) == (kind, topic)]
        known = {j.id for j in here}
        start: dict[int, int] = {}
        for one in here:
            for part, offset in (one.target_from or {}).items():
                start[int(part)] = min(offset, start.get(int(part), offset))
        for batch in drain.target_of(kind).delivered(topic, start):
            # A job this ledger never made, under this queue's name, is a memory lost or a liar: both are found.
            # (In the queue itself, where entries are handed back, lie also the failed replays of any job.)
            found = [
                (job_id, ordinal)
                for job_id, ordinal, _, _ in batch
                if job_id in known
                or (kind == "replay" and job_id.startswith(ours) and job_id not in ledger_knows)
            ]
            total += insert_rows(tx, seen, ("job", "ordinal"), found)
    tx.execute(
        insert(delivered).from_select(
            ["job", "ordinal", "n"],
            select(seen.c.job, seen.c.ordinal, func.count()).group_by(seen.c.job, seen.c.ordinal),
        )
    )
    return f"{total} replays found of {len(jobs)} job(s), read committed"


def accounts(drain: Drain, tx: Connection) -> dict[str, int]:
    """A drain's accounts as the ledger has them now: unsettled before, taken, settled, unsettled, and what was lost."""

    def count(*conditions: Any) -> int:
        return int(
            tx.execute(
                select(func.count()).select_from(entry).where(entry.c.queue == drain.queue, *conditions)
            ).scalar_one()
        )

    before = tx.execute(select(drains.c.open_before).where(drains.c.id == drain.id)).scalar_one()
    vanished = tx.execute(
        select(func.coalesce(func.sum(intake.c.vanished_max), 0)).where(intake.c.drain == drain.id)
    ).scalar_one()
    again = tx.execute(
        select(func.coalesce(func.sum(intake.c.again), 0)).where(intake.c.drain == drain.id)
    ).scalar_one()
    return {
        "before": int(before),
        "taken": count(entry.c.taken_drain == drain.id),
        "settled": count(entry.c.settled_drain == drain.id),
        "unsettled": count(entry.c.settled_drain.is_(None)),
        "again": int(again),
        "vanished_max": int(vanished),
    }


def _frames(drain: Drain, tx: Connection, accounts: dict[str, int], broken: list[dict[str, Any]]) -> Frames:
    """What Great Expectations looks at: small tables of accounts, ranges, jobs and what is open."""
    ranges = tx.execute(
        select(
            intake.c.part,
            func.min(intake.c.from_pos).label("from_pos"),
            func.max(intake.c.to_pos).label("to_pos"),
            func.max(intake.c.cutoff).label("cutoff"),
        )
        .where(intake.c.drain == drain.id, intake.c.from_pos.is_not(None))
        .group_by(intake.c.part)
    ).mappings()
    sent = (
        select(entry.c.job, func.count().label("sent"))
        .where(entry.c.queue == drain.queue, entry.c.state.in_(SENT))
        .group_by(entry.c.job)
        .subquery()
    )
    found = (
        select(delivered.c.job, func.sum(delivered.c.n).label("delivered"))
        .group_by(delivered.c.job)
        .subquery()
    )
    jobs = tx.execute(
        select(
            job.c.id.label("job"),
            job.c.size,
            job.c.cursor,
            func.coalesce(sent.c.sent, 0).label("sent"),
            func.coalesce(found.c.delivered, 0).label("delivered"),
        )
        .join(witnessed, witnessed.c.job == job.c.id)
        .join(sent, sent.c.job == job.c.id, isouter=True)
        .join(found, found.c.job == job.c.id, isouter=True)
    ).mappings()
    still = tx.execute(
        select(
            entry.c.state,
            entry.c.reason,
            func.coalesce(entry.c.owner, grp.c.owner).label("owner"),
            func.count().label("entries"),
        )
        .join(grp, grp.c.id == entry.c.grp)
        .where(entry.c.queue == drain.queue, entry.c.settled_drain.is_(None))
        .group_by(entry.c.state, entry.c.reason, func.coalesce(entry.c.owner, grp.c.owner))
    ).mappings()
    balance = accounts["before"] + accounts["taken"] - accounts["settled"] - accounts["unsettled"]
    return {
        "accounts": [{**accounts, "balance": balance, "broken_laws": len(broken)}],
        "ranges": [{**r, "short_of_cutoff": max(0, r["cutoff"] - r["to_pos"])} for r in ranges],
        "jobs": [{**j, "sent": int(j["sent"]), "delivered": int(j["delivered"])} for j in jobs],
        "open": [dict(r) for r in still],
    }
