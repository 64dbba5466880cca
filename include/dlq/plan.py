"""Make a plan: which entries, in what order, cut into which jobs; frozen, hashed, approved, then locked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from sqlalchemy import ColumnElement, and_, exists, false, func, or_, select, true, update

from dlq import clock, limits, stale
from dlq.drain import Drain
from dlq.errors import Refused
from dlq.ledger import jobs as ledger
from dlq.ledger.jobs import Cut
from dlq.ledger.schema import draft, entry, grp, job, plan, source
from dlq.pace import CANARY

READY = ("ready", "fixed")
"""Reasons of open entries that a replay may take without asking a person again."""

_PAGE = 4_000
_START_WITHIN_S = 3_600.0
_UNSENT = ("open", "planned", "sending", "ambiguous")


def sendable(drain: Drain) -> ColumnElement[bool]:
    """Open entries that may be sent at all: allowed somewhere, no twin before them, not failed too often, not
    on hold.
    """
    return and_(
        entry.c.queue == drain.queue,
        entry.c.state == "open",
        entry.c.target.is_not(None),
        entry.c.duplicate_of.is_(None),
        entry.c.attempts < drain.config.limits.returns,
        or_(entry.c.hold_until.is_(None), entry.c.hold_until <= clock.now()),
    )


def ready(drain: Drain) -> ColumnElement[bool]:
    """What a replay may take now without asking anybody; ordered by key: no earlier entry of its key waits."""
    condition = and_(sendable(drain), entry.c.reason.in_(READY))
    if drain.config.target.ordering != "per_key":
        return condition
    return and_(condition, or_(entry.c.key_hash.is_(None), ~_blocked(drain, READY)))


def _blocked(drain: Drain, passing: Sequence[str]) -> ColumnElement[bool]:
    """Whether an earlier entry of the key waits: it is not about to be sent, its reason none of ``passing``."""
    earlier = entry.alias("earlier")
    waits = or_(
        earlier.c.state != "open",
        earlier.c.reason.not_in(passing),
        earlier.c.target.is_(None),
        earlier.c.duplicate_of.is_not(None),
        earlier.c.attempts >= drain.config.limits.returns,
        earlier.c.hold_until > clock.now(),
    )
    return exists().where(_same_key(drain, earlier), earlier.c.id < entry.c.id, waits)


def heads(drain: Drain) -> ColumnElement[bool]:
    """In a queue ordered by key: nothing unsettled comes before it in its key."""
    if drain.config.target.ordering != "per_key":
        return true()
    earlier = entry.alias("before")
    return or_(
        entry.c.key_hash.is_(None),
        ~exists().where(_same_key(drain, earlier), earlier.c.id < entry.c.id),
    )


def behind(drain: Drain, drafts: ColumnElement[bool]) -> ColumnElement[bool]:
    """In a queue ordered by key: whether something unsettled comes before it in its key that ``drafts`` do not
    replace.
    """
    if drain.config.target.ordering != "per_key":
        return false()
    earlier = entry.alias("ahead")
    ours = select(draft.c.entry).where(drafts)
    return exists().where(_same_key(drain, earlier), earlier.c.id < entry.c.id, earlier.c.id.not_in(ours))


def _same_key(drain: Drain, other: Any) -> ColumnElement[bool]:
    return and_(
        other.c.queue == drain.queue, other.c.key_hash == entry.c.key_hash, other.c.settled_drain.is_(None)
    )


def unfinished(drain: Drain, stage: str) -> list[ledger.Job]:
    """The jobs of this drain's stage that an earlier try left: a retry goes on with them and makes no new plan.

    Their canaries come along, also closed ones: what a canary forbade stays forbidden.
    """
    left = select(job.c.plan).where(job.c.drain == drain.id, job.c.state.in_(("approved", "running")))
    with drain.ledger.read() as tx:
        return ledger.find(
            tx,
            plan.c.drain == drain.id,
            plan.c.stage == stage,
            job.c.plan.in_(left),
            or_(job.c.state != "closed", job.c.canary == 1),
        )


def made(drain: Drain, stage: str) -> list[ledger.Job]:
    """The jobs that were approved for this drain's stage, closed ones too: for a retry to see what it did.

    Those of an earlier life of the drain, which its opening closed, are none of its own.
    """
    earlier = select(job.c.plan).where(job.c.drain == drain.id, job.c.ended == ledger.CLOSED_LATER)
    with drain.ledger.read() as tx:
        return ledger.find(
            tx,
            plan.c.drain == drain.id,
            plan.c.stage == stage,
            plan.c.decision.is_not(None),
            plan.c.id.not_in(earlier),
        )


def make(
    drain: Drain,
    stage: str,
    condition: ColumnElement[bool],
    *,
    who: str,
    saw: str,
    canary: bool = True,
    drafts: ColumnElement[bool] | None = None,
) -> list[ledger.Job]:
    """Plan the entries of ``condition``, canary first, approved by ``who``; returns its jobs, none where there
    is no entry. What is stale on a compacted target is held back and no part of it (:mod:`dlq.stale`).

    :param drafts: which draft replaces each entry's own value (default: none does). An entry without one is no part.
    :raises ledger.PlanStale: when an entry changed between plan and lock.
    """
    if drafts is not None:
        condition = and_(condition, entry.c.id.in_(select(draft.c.entry).where(drafts)))
    condition, checked = stale.hold(drain, condition)
    if checked:
        saw = f"{saw}; {checked}"
    return make_of(drain, stage, _cuts(drain, condition, drafts, canary=canary), who=who, saw=saw)


def make_of(
    drain: Drain, stage: str, cuts: Iterable[Cut], *, who: str, saw: str, kind: str = "replay"
) -> list[ledger.Job]:
    """Freeze, approve and lock a plan of exactly these ``cuts``; ``kind`` is that of the decision.

    :raises Refused: where the guard against data loss lets nothing be replayed.
    """
    if kind == "replay" and (why := limits.forbids(drain)) is not None:
        raise Refused(f"queue {drain.queue}: nothing is replayed: {why}; it is all in custody, open")
    _drop_unapproved(drain, stage)
    plan_id = ledger.propose(
        drain.ledger, drain.queue, drain.epoch, drain.id, stage, cuts, expires_s=_START_WITHIN_S
    )
    if plan_id is None:
        return []
    with drain.ledger.write(drain.queue, drain.epoch) as tx:
        digest = ledger.plan_hash(tx, plan_id)
        decision = ledger.record_decision(
            tx, drain.queue, who, kind, plan_id, saw, f"{kind.replace('_', ' ')} plan {digest[:12]}", drain.id
        )
    ledger.approve(drain.ledger, drain.queue, drain.epoch, plan_id, digest, decision)
    with drain.ledger.read() as tx:
        return ledger.find(tx, job.c.plan == plan_id)


def _drop_unapproved(drain: Drain, stage: str) -> None:
    """A try that died while it made a plan leaves one that was never approved."""
    with drain.ledger.read() as tx:
        left = tx.execute(
            select(plan.c.id).where(
                plan.c.drain == drain.id,
                plan.c.stage == stage,
                plan.c.decision.is_(None),
                plan.c.withdrawn_at.is_(None),
            )
        ).scalars()
        ids = list(left)
    for plan_id in ids:
        ledger.withdraw(drain.ledger, drain.queue, drain.epoch, plan_id)


def _cuts(
    drain: Drain, condition: ColumnElement[bool], drafts: ColumnElement[bool] | None, *, canary: bool
) -> Iterator[Cut]:
    with drain.ledger.read() as tx:
        targets = [
            str(t)
            for t in tx.execute(
                select(entry.c.target).where(condition).distinct().order_by(entry.c.target)
            ).scalars()
        ]
    for target in targets:
        here = and_(condition, entry.c.target == target)
        first = _canary(drain, here) if canary else []
        if first:
            yield Cut(target, by_id(drain, [here, entry.c.id.in_(first)], drafts), canary=True)
        rest = and_(here, entry.c.id.not_in(first)) if first else here
        for share in _shares(drain, rest):
            yield Cut(target, by_id(drain, [rest, *share], drafts))


def _canary(drain: Drain, condition: ColumnElement[bool]) -> list[int]:
    """The first entries of each group in turn, as many as a canary sends; in a queue ordered by key only heads
    of keys.
    """
    most = sum(CANARY)
    condition = and_(condition, heads(drain))
    turn = func.row_number().over(partition_by=entry.c.grp, order_by=entry.c.id)
    with drain.ledger.read() as tx:
        rows = tx.execute(
            select(entry.c.id, turn.label("turn")).where(condition).order_by("turn", entry.c.id).limit(most)
        )
        return [int(r.id) for r in rows]


def _shares(drain: Drain, condition: ColumnElement[bool]) -> list[list[ColumnElement[bool]]]:
    """Conditions that cut the rest into ``limits.jobs`` jobs: by key where order matters, else by place in custody."""
    jobs = drain.config.limits.jobs
    if jobs == 1:
        return [[]]
    if drain.config.target.ordering == "per_key":
        digits = "0123456789abcdef"
        jobs = min(jobs, len(digits))
        cut = [digits[n * 16 // jobs : (n + 1) * 16 // jobs] for n in range(jobs)]
        last = func.substr(entry.c.key_hash, 16, 1)
        shares: list[list[ColumnElement[bool]]] = [[last.in_(list(some))] for some in cut]
        return [*shares, [entry.c.key_hash.is_(None)]]
    with drain.ledger.read() as tx:
        total = tx.execute(select(func.count()).select_from(entry).where(condition)).scalar_one()
        edges = [
            tx.execute(
                select(entry.c.id).where(condition).order_by(entry.c.id).offset(total * n // jobs).limit(1)
            ).scalar()
            for n in range(1, jobs)
        ]
    bounds = [0, *[int(e) for e in edges if e is not None]]
    return [
        [entry.c.id >= low, *([entry.c.id < bounds[n + 1]] if n + 1 < len(bounds) else [])]
        for n, low in enumerate(bounds)
    ]


def by_id(
    drain: Drain, conditions: Sequence[ColumnElement[bool]], drafts: ColumnElement[bool] | None = None
) -> Iterator[Sequence[Any]]:
    """The entries in order of intake, a page at a time, so that a plan of any size fits in memory; each with the bytes
    to send, its own or those of its draft.
    """
    revision = entry if drafts is None else draft
    lines = select(
        *(entry.c.id, source.c.uri, entry.c.part, entry.c.place),
        *(revision.c.segment, revision.c.row_no, revision.c.payload_sha),
    ).join_from(entry, source, source.c.id == entry.c.source)
    if drafts is not None:
        lines = lines.join(draft, draft.c.entry == entry.c.id).where(drafts)
    last = 0
    while True:
        with drain.ledger.read() as tx:
            page = tx.execute(
                lines.where(*conditions, entry.c.id > last).order_by(entry.c.id).limit(_PAGE)
            ).all()
        if not page:
            return
        yield from page
        last = page[-1][0]


def block_by_key(drain: Drain) -> int:
    """In a queue ordered by key, say of each ready entry that an earlier one of its key waits, or no longer does."""
    if drain.config.target.ordering != "per_key":
        return 0
    keyed = and_(entry.c.queue == drain.queue, entry.c.state == "open", entry.c.key_hash.is_not(None))
    with drain.ledger.write(drain.queue, drain.epoch) as tx:
        # One that is blocked itself blocks nothing more than what blocks it.
        free = and_(keyed, entry.c.reason == ledger.EARLIER, ~_blocked(drain, (*READY, ledger.EARLIER)))
        tx.execute(update(entry).where(entry.c.id.in_(select(entry.c.id).where(free))).values(reason="ready"))
        waiting = and_(keyed, entry.c.reason.in_(READY), _blocked(drain, READY))
        ids = select(entry.c.id).where(waiting)
        return int(
            tx.execute(update(entry).where(entry.c.id.in_(ids)).values(reason=ledger.EARLIER)).rowcount
        )


def summary(drain: Drain) -> list[dict[str, Any]]:
    """What a replay would take now, by group and target, and when the queue would have lost the first of it."""
    with drain.ledger.read() as tx:
        rows = tx.execute(
            select(
                grp.c.id,
                grp.c.error_type,
                grp.c.component,
                entry.c.target,
                func.count(),
                func.min(entry.c.expires_at),
            )
            .join(grp, grp.c.id == entry.c.grp)
            .where(ready(drain))
            .group_by(grp.c.id, grp.c.error_type, grp.c.component, entry.c.target)
            .order_by(func.count().desc())
        )
        return [
            {
                "group": r[0],
                "error_type": r[1],
                "component": r[2],
                "target": r[3],
                "entries": r[4],
                "first_to_expire": r[5],
            }
            for r in rows
        ]
