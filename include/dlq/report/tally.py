"""Counting up what a drain found, did, proved and left: aggregated in the ledger, never row by row."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from msgspec import Struct
from sqlalchemy import Connection, FromClause, Label, RowMapping, and_, func, literal_column, or_, select
from sqlalchemy.sql.elements import ColumnElement

from dlq import clock, held, returns
from dlq.config import KafkaTarget, QueueConfig
from dlq.errors import DlqError
from dlq.ledger import schema
from dlq.ledger.schema import (
    SENT,
    decision,
    delivery,
    draft,
    entry,
    event,
    grp,
    incident,
    intake,
    job,
    job_entry,
    plan,
    repair,
    source,
    work,
)
from dlq.redact import redact
from dlq.report.account import (
    LAYOUT,
    Decided,
    Group,
    Hop,
    Intake,
    Job,
    Note,
    Numbers,
    Open,
    Point,
    Poison,
    Proof,
    Repair,
    ReportData,
    Stage,
)

if TYPE_CHECKING:
    from dlq.drain import Drain

_GROUPS, _OPEN, _JOBS, _DECISIONS, _NOTES, _RANGES, _POINTS = 100, 200, 200, 200, 1_000, 256, 120
_POISON = 50
_BESIDE = {"acknowledge_alert", "wait_threshold", "escalate"}
"""Stages that run beside the others: the time since the last note is not theirs."""


def build_report(drain: Drain) -> ReportData:
    """The account of ``drain`` as its ledger has it now.

    :raises DlqError: when the ledger has no such drain.
    """
    with drain.ledger.read() as tx:
        row = tx.execute(select(schema.drain).where(schema.drain.c.id == drain.id)).mappings().first()
        if row is None:
            raise DlqError(f"the ledger has no drain {drain.id}: name one that `dlq status` lists")
        config = QueueConfig.thaw(row["config"], drain.id)
        notes = tx.execute(
            select(event.c.at, event.c.stage, event.c.level, event.c.text, event.c.data)
            .where(event.c.drain == drain.id)
            .order_by(event.c.id)
        ).all()
        data = _newest(notes)
        now = clock.now()
        until = row["closed_at"] or now
        numbers = _numbers(tx, drain.id, row, config, data)
        groups, group_count = _groups(tx, drain.id, row["queue"])
        still, by_owner, dies_first = _open(tx, row["queue"])
        poison, poison_count = _poison(tx, row["queue"], config.limits.returns)
        ranges, vanished = _intake(tx, drain.id)
        closing = data.get("close_drain", {})
        return ReportData(
            schema=LAYOUT,
            made_at=now,
            drain=drain.id,
            queue=row["queue"],
            kind=row["kind"],
            run_id=row["run_id"],
            epoch=row["epoch"],
            opened_at=row["opened_at"],
            closed_at=row["closed_at"],
            seconds=_between(row["opened_at"], until),
            phase=row["phase"],
            verdict=row["verdict"],
            reasons=[redact(str(reason)) for reason in closing.get("reasons", [])],
            incident=_incident(tx, row["incident"], closing),
            numbers=numbers,
            groups=groups,
            group_count=group_count,
            suspects=_suspects(data.get("find_root_cause", {})),
            open=still,
            open_by_owner=by_owner,
            dies_first=dies_first,
            poison=poison,
            poison_count=poison_count,
            stages=_stages(notes, row["opened_at"]),
            decisions=_decisions(tx, drain.id),
            jobs=_jobs(tx, drain.id),
            repairs=_repairs(tx, drain.id),
            notes=[Note(n.at, n.stage, n.level, redact(n.text)) for n in _ends(notes, _NOTES)],
            note_count=len(notes),
            timeline=_timeline(tx, drain.id, notes, row["opened_at"], until, numbers),
            proof=_proof(notes, data, config),
            golden=data.get("verify_golden_flows"),
            intake=ranges,
            vanished_max=vanished,
            policy=_policy(config),
        )


def _newest(notes: Sequence[Any]) -> dict[str, dict[str, Any]]:
    """The data of each stage's newest note that has any."""
    found: dict[str, dict[str, Any]] = {}
    for note in notes:
        if data := json.loads(note.data):
            found[note.stage] = data
    return found


def _suspects(data: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {name: redact(value) if isinstance(value, str) else value for name, value in suspect.items()}
        for suspect in data.get("suspects", [])
    ]


def _ends(rows: Sequence[Any], most: int) -> list[Any]:
    """The first and last of too many rows, and in between those that are no mere information."""
    if len(rows) <= most:
        return list(rows)
    half = most // 2
    middle = [row for row in rows[half:-half] if row.level != "info"]
    return [*rows[:half], *middle[:half], *rows[-half:]]


def _between(start: str, end: str) -> float:
    return max(0.0, (datetime.fromisoformat(end) - datetime.fromisoformat(start)).total_seconds())


def _count(condition: ColumnElement[bool], name: str) -> Label[int]:
    return func.count().filter(condition).label(name)


def _mine(drain_id: str, *states: str) -> ColumnElement[bool]:
    return and_(entry.c.settled_drain == drain_id, entry.c.state.in_(states))


def _numbers(
    tx: Connection, drain_id: str, row: Any, config: QueueConfig, data: dict[str, dict[str, Any]]
) -> Numbers:
    counts = tx.execute(
        select(
            _count(entry.c.taken_drain == drain_id, "taken"),
            _count(entry.c.settled_drain == drain_id, "settled"),
            _count(entry.c.settled_drain.is_(None), "unsettled"),
            *(
                _count(_mine(drain_id, state), state)
                for state in ("confirmed", "replayed", "returned", "duplicate", "discarded", "handed_back")
            ),
        ).where(entry.c.queue == row["queue"])
    ).one()
    known = counts.confirmed + counts.returned
    depths = [d["depth"] for d in data.values() if isinstance(d.get("depth"), int)]
    return Numbers(
        open_before=row["open_before"],
        taken=counts.taken,
        settled=counts.settled,
        unsettled=counts.unsettled,
        confirmed=counts.confirmed,
        unconfirmed=counts.replayed,
        returned=counts.returned,
        duplicate=counts.duplicate,
        discarded=counts.discarded,
        handed_back=counts.handed_back,
        success=counts.confirmed / known if known else None,
        success_asked=config.slo.success,
        depth=depths[-1] if depths else None,
    )


def _groups(tx: Connection, drain_id: str, queue: str) -> tuple[list[Group], int]:
    settled_here = entry.c.settled_drain == drain_id
    unsettled = entry.c.settled_drain.is_(None)
    per_group = (
        select(
            entry.c.grp,
            func.count().label("total"),
            _count(entry.c.taken_drain == drain_id, "taken"),
            _count(_mine(drain_id, "confirmed"), "confirmed"),
            _count(_mine(drain_id, "replayed"), "unconfirmed"),
            _count(_mine(drain_id, "returned"), "returned"),
            _count(_mine(drain_id, "duplicate", "discarded", "handed_back"), "aside"),
            _count(unsettled, "open"),
            func.min(entry.c.correlation_id).label("example"),
        )
        .where(entry.c.queue == queue, or_(entry.c.taken_drain == drain_id, settled_here, unsettled))
        .group_by(entry.c.grp)
        .cte("per_group")
    )
    rows = tx.execute(
        select(grp, *(c for c in per_group.c if c.name != "grp"), _group_count(per_group))
        .join_from(per_group, grp, grp.c.id == per_group.c.grp)
        .order_by(per_group.c.total.desc(), grp.c.id)
        .limit(_GROUPS)
    ).mappings()
    groups, count = [], 0
    for row in rows:
        count = row["group_count"]
        groups.append(Group(**{**_fields(Group, row), "signature": redact(row["signature"])}))
    return groups, count


def _fields(struct: type[Struct], row: RowMapping) -> dict[str, Any]:
    return {name: row[name] for name in struct.__struct_fields__}


def _group_count(per_group: FromClause) -> Label[int]:
    return select(func.count()).select_from(per_group).scalar_subquery().label("group_count")


def _open(tx: Connection, queue: str) -> tuple[list[Open], dict[str, int], str | None]:
    unsettled = (
        select(entry).where(entry.c.queue == queue, entry.c.settled_drain.is_(None)).subquery("unsettled")
    )
    u = unsettled.c
    owner = func.coalesce(work.c.owner, u.owner, grp.c.owner)
    joined = unsettled.join(grp, grp.c.id == u.grp).outerjoin(work, work.c.id == u.work)
    rows = tx.execute(
        select(
            func.count().label("count"),
            u.state,
            u.reason,
            owner.label("owner"),
            u.work,
            u.grp.label("group"),
            grp.c.signature,
            func.min(u.failed_at).label("oldest_failure"),
            func.min(u.expires_at).label("first_expiry"),
            func.min(u.hold_until).label("held_until"),
        )
        .select_from(joined)
        .group_by(u.state, u.reason, owner, u.work, u.grp, grp.c.signature)
        .order_by(literal_column("count").desc(), u.grp)
        .limit(_OPEN)
    ).mappings()
    looks = held.why(tx, queue)
    still = [
        Open(
            **{**row, "signature": redact(row["signature"])},
            held_for=looks.get(row["group"]) if row["reason"] == held.REASON else None,
        )
        for row in rows
    ]
    totals = tx.execute(
        select(owner.label("owner"), func.count().label("n"), func.min(u.expires_at).label("expiry"))
        .select_from(joined)
        .group_by(owner)
        .order_by(literal_column("n").desc(), literal_column("owner"))
    ).all()
    return still, {t.owner: t.n for t in totals}, min((t.expiry for t in totals if t.expiry), default=None)


def _poison(tx: Connection, queue: str, limit: int) -> tuple[list[Poison], int]:
    """What failed too often, the worst first, each with its history."""
    bad = and_(entry.c.queue == queue, entry.c.settled_drain.is_(None), entry.c.attempts >= limit)
    count = tx.execute(select(func.count()).select_from(entry).where(bad)).scalar_one()
    rows = tx.execute(
        select(
            *(entry.c.id, entry.c.part, entry.c.place, entry.c.attempts, grp.c.signature),
            func.coalesce(work.c.owner, entry.c.owner, grp.c.owner).label("owner"),
        )
        .join(grp, grp.c.id == entry.c.grp)
        .outerjoin(work, work.c.id == entry.c.work)
        .where(bad)
        .order_by(entry.c.attempts.desc(), entry.c.id)
        .limit(_POISON)
    ).all()
    histories = returns.families(tx, [row.id for row in rows])
    fields = Hop.__struct_fields__
    return [
        Poison(
            row.part,
            row.place,
            row.attempts,
            row.owner,
            redact(row.signature),
            [Hop(**{name: hop[name] for name in fields}) for hop in histories[row.id]],
        )
        for row in rows
    ], int(count)


def _jobs(tx: Connection, drain_id: str) -> list[Job]:
    rows = tx.execute(
        select(
            job,
            plan.c.stage,
            plan.c.hash.label("plan_hash"),
            plan.c.decision,
            _count(entry.c.state == "confirmed", "confirmed"),
            _count(entry.c.state == "replayed", "unconfirmed"),
            _count(entry.c.state == "returned", "returned"),
        )
        .join_from(job, plan, plan.c.id == job.c.plan)
        .outerjoin(entry, and_(entry.c.job == job.c.id, entry.c.state.in_(SENT)))
        .where(job.c.drain == drain_id)
        .group_by(job.c.id, plan.c.id)
        .order_by(plan.c.proposed_at, job.c.id)
        .limit(_JOBS)
    ).mappings()
    return [Job(**{**_fields(Job, row), "canary": bool(row["canary"])}) for row in rows]


def _repairs(tx: Connection, drain_id: str) -> list[Repair]:
    """Lines of this drain's jobs that are drafts of a repair, and were sent."""
    sent = (
        select(draft.c.repair, func.count().label("sent"))
        .join_from(job, job_entry, and_(job_entry.c.job == job.c.id, job_entry.c.ordinal < job.c.cursor))
        .join(entry, and_(entry.c.id == job_entry.c.entry, entry.c.job == job.c.id, entry.c.state.in_(SENT)))
        .join(
            draft,
            and_(
                draft.c.entry == job_entry.c.entry,
                draft.c.segment == job_entry.c.segment,
                draft.c.row_no == job_entry.c.row_no,
            ),
        )
        .where(job.c.drain == drain_id)
        .group_by(draft.c.repair)
        .subquery()
    )
    rows = tx.execute(
        select(repair, sent.c.sent)
        .join(sent, sent.c.repair == repair.c.id)
        .order_by(repair.c.id)
        .limit(_JOBS)
    ).mappings()
    return [Repair(**_fields(Repair, row)) for row in rows]


def _decisions(tx: Connection, drain_id: str) -> list[Decided]:
    rows = tx.execute(
        select(*(decision.c[name] for name in Decided.__struct_fields__))
        .where(decision.c.drain == drain_id)
        .order_by(decision.c.id)
        .limit(_DECISIONS)
    ).mappings()
    return [Decided(**row) for row in rows]


def _stages(notes: Sequence[Any], opened_at: str) -> list[Stage]:
    """Each stage by its last note, in the order they began."""
    began: dict[str, str] = {}
    last: dict[str, Any] = {}
    before = opened_at
    for note in notes:
        began.setdefault(note.stage, before)
        last[note.stage] = note
        if note.stage not in _BESIDE:
            before = note.at
    stages = []
    for name, note in last.items():
        said = json.loads(note.data).get("seconds")
        took = (
            float(said)
            if isinstance(said, (int, float))
            else None
            if name in _BESIDE
            else _between(began[name], note.at)
        )
        stages.append(Stage(name, note.level, redact(note.text), took))
    return stages


def _intake(tx: Connection, drain_id: str) -> tuple[list[Intake], int]:
    rows = tx.execute(
        select(
            source.c.uri.label("source"),
            intake.c.part,
            func.count().label("rounds"),
            func.min(intake.c.from_pos).label("from_pos"),
            func.max(intake.c.cutoff).label("cutoff"),
            func.max(intake.c.to_pos).label("to_pos"),
            func.sum(intake.c.again).label("again"),
            func.sum(intake.c.vanished_max).label("vanished_max"),
        )
        .join_from(intake, source, source.c.id == intake.c.source)
        .where(intake.c.drain == drain_id)
        .group_by(source.c.uri, intake.c.part)
        .order_by(source.c.uri, intake.c.part)
    ).mappings()
    ranges = [
        Intake(**{**row, "again": int(row["again"]), "vanished_max": int(row["vanished_max"])})
        for row in rows
    ]
    return ranges[:_RANGES], sum(r.vanished_max for r in ranges)


def _incident(tx: Connection, incident_id: int | None, closing: dict[str, Any]) -> dict[str, Any] | None:
    row = tx.execute(select(incident).where(incident.c.id == incident_id)).mappings().first()
    if row is None:
        return None
    found = {"id": row["id"], "started_at": row["started_at"], "closed_at": row["closed_at"]}
    told = closing.get("incident")
    return {**found, "said": str(told["said"]) if isinstance(told, dict) and told.get("said") else None}


def _timeline(
    tx: Connection, drain_id: str, notes: Sequence[Any], opened_at: str, until: str, numbers: Numbers
) -> list[Point]:
    """Cumulative counts: sends by the second as the target answered, the rest from what the notes say.

    A note's ``taken`` is what came about since its stage's note before; ``confirmed`` and ``returned`` beside
    a ``job`` are that job's so far.
    """
    sent = tx.execute(
        select(func.substr(delivery.c.sent_at, 1, 19).label("at"), func.count().label("n"))
        .join_from(delivery, job, job.c.id == delivery.c.job)
        .where(job.c.drain == drain_id)
        .group_by(literal_column("at"))
    ).all()
    steps: list[tuple[str, str, int]] = [(f"{row.at}.999+00:00", "replayed", row.n) for row in sent]
    of_job: dict[tuple[str, str], int] = {}
    for note in notes:
        data = json.loads(note.data)
        if isinstance(data.get("taken"), int):
            steps.append((note.at, "taken", data["taken"]))
        for name in ("confirmed", "returned"):
            if isinstance(data.get(name), int) and isinstance(data.get("job"), str):
                before = of_job.get((data["job"], name), 0)
                of_job[data["job"], name] = max(before, data[name])
                steps.append((note.at, name, max(0, data[name] - before)))
    # A task that was tried again may have said a thing twice: the ledger's totals are the bound.
    most = {name: getattr(numbers, name) for name in ("taken", "replayed", "confirmed", "returned")}
    have = dict.fromkeys(most, 0)
    slot = max(1e-3, _between(opened_at, until) / _POINTS)
    points = {-1: Point(opened_at, **have)}
    for at, name, n in sorted(steps):
        have[name] = min(have[name] + n, most[name])
        at = min(max(at, opened_at), until)
        points[int(_between(opened_at, at) / slot)] = Point(at, **have)
    return [*points.values(), Point(until, **most)]


def _proof(notes: Sequence[Any], data: dict[str, dict[str, Any]], config: QueueConfig) -> Proof:
    found = data.get("verify_conservation", {})
    at = next((n.at for n in reversed(notes) if n.stage == "verify_conservation"), None)
    readers = config.target.origin_consumers if isinstance(config.target, KafkaTarget) else "unknown"
    proven = found.get("proven")
    return Proof(
        at=at,
        proven=proven if isinstance(proven, bool) else None,
        broken=[b for b in found.get("broken", []) if isinstance(b, dict)],
        witnesses=dict(found.get("witnesses", {})),
        expectations=list(found.get("expectations", [])),
        seen_once_by=readers,
    )


def _policy(config: QueueConfig) -> dict[str, Any]:
    """The policy in force, as frozen at the opening; no address and no secret is in it."""
    shown = config.model_dump(
        mode="json",
        include={"slo", "limits", "outcome", "approval", "quotas", "owners", "golden_flows", "schedule"},
    )
    return {
        "configuration": config.sha,
        **shown,
        "target": {
            "kind": config.target.kind,
            "allow": list(config.target.allow),
            "ordering": config.target.ordering,
        },
    }
