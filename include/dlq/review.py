"""Manual review: file work for people, and do what they decide: replay, discard, leave, or replay a draft."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Select,
    and_,
    case,
    false,
    func,
    insert,
    literal,
    not_,
    or_,
    select,
    update,
)

from dlq import clock, drafts, repair, stale
from dlq import plan as planning
from dlq.drain import Drain
from dlq.entry import FLAWS
from dlq.ledger import duplicates
from dlq.ledger import jobs as ledger_jobs
from dlq.ledger.schema import decision as decisions
from dlq.ledger.schema import draft, entry, grp, work
from dlq.replay import Ran, replay_now, run_jobs
from dlq.triage import FIXES, WAITING_ALONE

_PERSONAL = ("open", "ambiguous")
_CHOICES = {
    "work": ("leave", "replay", "discard"),
    "draft": ("leave", "replay"),
    "repair": ("leave", "replay"),
}
"""What may be chosen, by what is proposed."""


def file_work(drain: Drain, *, besides: ColumnElement[bool] | None = None) -> list[dict[str, Any]]:
    """See that every open entry, but those of ``besides``, has an owner and filed work; returns the work now open."""
    ours = [entry.c.queue == drain.queue, entry.c.state.in_(_PERSONAL)]
    if besides is not None:
        ours.append(not_(besides))
    with drain.ledger.write(drain.queue, drain.epoch) as tx:
        repair.mark_failed(tx, drain.queue)
        settled_work = select(work.c.id).where(
            work.c.queue == drain.queue,
            work.c.closed_at.is_(None),
            ~select(entry.c.id).where(entry.c.work == work.c.id, entry.c.settled_drain.is_(None)).exists(),
        )
        closed = list(tx.execute(settled_work).scalars())
        tx.execute(update(work).where(work.c.id.in_(closed)).values(closed_at=clock.now()))
        kinds = tx.execute(
            select(entry.c.grp, entry.c.reason, func.count())
            .join(grp, grp.c.id == entry.c.grp)
            .where(*ours)
            .group_by(entry.c.grp, entry.c.reason)
        ).all()
        for group, reason, _count in kinds:
            owner = tx.execute(select(grp.c.owner).where(grp.c.id == group)).scalar_one()
            found = tx.execute(
                select(work.c.id).where(
                    work.c.queue == drain.queue,
                    work.c.grp == group,
                    work.c.reason == reason,
                    work.c.closed_at.is_(None),
                )
            ).scalar()
            if found is None:
                values = {
                    "queue": drain.queue,
                    "grp": group,
                    "reason": reason,
                    "owner": owner,
                    "opened_at": clock.now(),
                }
                found = tx.execute(insert(work).values(**values).returning(work.c.id)).scalar_one()
            same = and_(
                entry.c.queue == drain.queue,
                entry.c.grp == group,
                entry.c.reason == reason,
                entry.c.state.in_(_PERSONAL),
            )
            tx.execute(
                update(entry)
                .where(same, or_(entry.c.work.is_(None), entry.c.work != found))
                .values(work=found, owner=owner)
            )
    with drain.ledger.read() as tx:
        return open_work(tx, drain.queue)


def open_work(tx: Connection, queue: str) -> list[dict[str, Any]]:
    """Filed work with how many entries wait in it, largest first."""
    rows = tx.execute(
        select(
            work.c.id,
            work.c.reason,
            work.c.owner,
            grp.c.error_type,
            grp.c.component,
            grp.c.category,
            func.count(entry.c.id).label("count"),
            func.max(entry.c.attempts).label("replays"),
        )
        .join(grp, grp.c.id == work.c.grp)
        .join(entry, and_(entry.c.work == work.c.id, entry.c.state.in_(_PERSONAL)))
        .where(work.c.queue == queue, work.c.closed_at.is_(None))
        .group_by(work.c.id, work.c.reason, work.c.owner, grp.c.error_type, grp.c.component, grp.c.category)
        .order_by(func.count(entry.c.id).desc())
    ).mappings()
    return [dict(r) for r in rows]


def open_review(drain: Drain) -> dict[str, Any]:
    """File the work a person must decide on."""
    if drain.dry_run:
        return {"filed": [], "said": "dry run: no work is filed"}
    # What waits for no person, or a replay or a fix of this drain is about to take, is nobody's work yet; the verdict
    # files what they leave.
    under_way = or_(
        entry.c.reason.in_((*planning.READY, *WAITING_ALONE)),
        and_(entry.c.reason == "waiting_for_fix", grp.c.remedy.in_(FIXES)),
    )
    filed = file_work(drain, besides=under_way)
    said = (
        "; ".join(
            f"work {w['id']}: {w['count']} x {w['error_type']} ({w['reason'].replace('_', ' ')}{_came_back(w)}) "
            f"for {w['owner']}"
            for w in filed[:10]
        )
        or "nothing waits for a person"
    )
    drain.note("open_review", said, filed=filed[:50])
    return {"filed": filed[:50], "said": said}


def proposals(look: Drain, queue: str) -> list[dict[str, Any]]:
    """What waits for a person's word: each piece of work, each draft and each repair, with the hash of exactly the
    entries it means.
    """
    with look.ledger.read() as tx:
        found = [
            {
                "subject": f"work {w['id']}",
                "count": w["count"],
                "reason": w["reason"],
                "error_type": w["error_type"],
                "component": w["component"],
                "owner": w["owner"],
                "hash": _work_hash(tx, w["id"]),
                "choices": list(_CHOICES["work"]),
                "summary": f"{w['count']} x {w['error_type']} in {w['component']}: "
                f"{w['reason'].replace('_', ' ')}{_came_back(w)}; owner {w['owner']}",
            }
            for w in open_work(tx, queue)
        ]
        written = tx.execute(
            select(
                draft.c.id,
                draft.c.entry,
                draft.c.payload_sha,
                draft.c.who,
                entry.c.part,
                entry.c.place,
                grp.c.error_type,
                grp.c.component,
                grp.c.owner,
            )
            .join(entry, entry.c.id == draft.c.entry)
            .join(grp, grp.c.id == entry.c.grp)
            .where(
                entry.c.queue == queue,
                entry.c.state.in_(_PERSONAL),
                draft.c.repair.is_(None),
                drafts.newest(),
            )
            .order_by(draft.c.id)
        ).mappings()
        found.extend(
            {
                "subject": f"draft {d['id']}",
                "count": 1,
                "reason": f"repair of {d['part']}/{d['place']} by {d['who']}",
                "error_type": d["error_type"],
                "component": d["component"],
                "owner": d["owner"],
                "hash": _draft_hash(d["id"], d["entry"], d["payload_sha"]),
                "choices": list(_CHOICES["draft"]),
                "summary": f"repair of {d['part']}/{d['place']} ({d['error_type']} in {d['component']}) drafted by "
                f"{d['who']}, sum {d['payload_sha'][:12]}",
            }
            for d in written
        )
        found.extend({**each, "choices": list(_CHOICES["repair"])} for each in repair.proposals(tx, queue))
    return found


def _came_back(found: Mapping[str, Any]) -> str:
    """How often it failed again, where it did."""
    most = found["replays"]
    if not most:
        return ""
    often = "once" if most == 1 else f"{most} times"
    return f", came back {often}" if found["count"] == 1 else f", came back up to {often}"


def _work_hash(tx: Connection, work_id: int, drafted: Select[tuple[int]] | None = None) -> str:
    """The hash of a work's entries; those of ``drafted`` count, whatever became of them since."""
    ours = entry.c.state.in_(_PERSONAL)
    digest = hashlib.sha256()
    rows = tx.execute(
        select(entry.c.id, entry.c.payload_sha)
        .where(entry.c.work == work_id, ours if drafted is None else or_(ours, entry.c.id.in_(drafted)))
        .order_by(entry.c.id)
    )
    for row in rows.yield_per(5000):
        digest.update(f"{row.id} {row.payload_sha}\n".encode())
    return digest.hexdigest()


def _draft_hash(draft_id: int, entry_id: int, sha: str) -> str:
    return hashlib.sha256(f"draft {draft_id} {entry_id} {sha}".encode()).hexdigest()


def apply_review(
    drain: Drain, choices: Mapping[str, Mapping[str, str]], who: str, deadline_s: float
) -> dict[str, Any]:
    """Do what was decided: by a proposal's subject, ``{"choice", "hash"}``.

    A subject whose entries are no longer those the person saw is refused, and said so; the others are done.
    """
    if drain.dry_run:
        said = "; ".join(f"{subject}: would {each['choice']}" for subject, each in sorted(choices.items()))
        return {"refused": [], "said": f"dry run: {said or 'nobody was asked'}"}
    drain.phase("apply_review")
    deadline = time.monotonic() + deadline_s
    totals = {"replayed": 0, "confirmed": 0, "returned": 0, "discarded": 0, "left": 0}
    refused: list[str] = []
    offered = {p["subject"]: p for p in proposals(drain, drain.queue)}
    # A draft replaces its entry: what is drafted is not sent as it was, nor discarded, even where the draft can't be
    # sent. So drafts come first, and a work's hash is of the entries it had before them.
    chosen = [_drafts(subject) for subject, choice in choices.items() if choice["choice"] == "replay"]
    drafted = select(draft.c.entry).where(or_(false(), *chosen))
    for subject, choice in sorted(choices.items(), key=lambda c: c[0].startswith("work ")):
        wanted = choice["choice"]
        offer = offered.get(subject)
        if wanted == "leave":
            if offer is not None:
                with drain.ledger.write(drain.queue, drain.epoch) as tx:
                    if _decided(tx, drain, subject, choice) is None:
                        ledger_jobs.record_decision(
                            tx, drain.queue, who, "review:leave", subject, choice["hash"], wanted, drain.id
                        )
                totals["left"] += offer["count"]
            continue
        what, number = subject.split()[0], int(subject.split()[1])
        with drain.ledger.write(drain.queue, drain.epoch) as tx:
            now = _work_hash(tx, number, drafted) if what == "work" else offer and offer["hash"]
            decision = _decided(tx, drain, subject, choice)
            same = now == choice["hash"] and wanted in _CHOICES[what]
            if same and decision is None:
                decision = ledger_jobs.record_decision(
                    tx, drain.queue, who, f"review:{wanted}", subject, choice["hash"], wanted, drain.id
                )
            if same and wanted == "discard":
                totals["discarded"] += _discard(tx, drain, number, drafted, decision or 0)
        jobs = planning.made(drain, f"review:{subject}")
        if decision is None or not (same or jobs or wanted == "discard"):
            refused.append(
                f"{subject}: it changed since it was looked at, or {wanted!r} is no choice; look again"
            )
            continue
        if wanted == "discard":
            continue
        if not same:  # an earlier try of this stage got as far as its plan
            ran = run_jobs(drain, jobs, deadline)
        elif what == "work":
            ran = _replay_work(drain, number, drafted, who, decision, deadline)
        else:
            ran = _replay_drafts(drain, subject, who, decision, deadline)
        for one in ran:
            totals["replayed"] += one.sent
            totals["confirmed"] += one.tally.confirmed
            totals["returned"] += one.tally.returned
            drain.note("apply_review", f"{subject}: {one}", **one.data())
    with drain.ledger.write(drain.queue, drain.epoch) as tx:
        duplicates.settle(tx, drain.queue, drain.id)
    file_work(drain)
    said = ", ".join(f"{n} {what}" for what, n in totals.items() if n) or "nothing was decided"
    drain.note(
        "apply_review",
        said + "".join(f". REFUSED {r}" for r in refused),
        level="warning" if refused else "info",
        refused=refused,
        **totals,
    )
    return {**totals, "refused": refused, "said": said}


def _drafts(subject: str) -> ColumnElement[bool]:
    """The drafts a subject means; none where it is work."""
    what, number = subject.split()[0], int(subject.split()[1])
    if what == "draft":
        return draft.c.id == number
    return and_(draft.c.repair == number, drafts.newest()) if what == "repair" else false()


def _decided(tx: Connection, drain: Drain, subject: str, choice: Mapping[str, str]) -> int | None:
    """The decision an earlier try of this drain wrote down: done, or to be gone on with."""
    found = tx.execute(
        select(decisions.c.id).where(
            decisions.c.drain == drain.id,
            decisions.c.kind == f"review:{choice['choice']}",
            decisions.c.subject == subject,
            decisions.c.saw == choice["hash"],
        )
    ).scalar()
    return None if found is None else int(found)


def _discard(tx: Connection, drain: Drain, work_id: int, drafted: Select[tuple[int]], number: int) -> int:
    return int(
        tx.execute(
            update(entry)
            .where(entry.c.work == work_id, entry.c.state.in_(_PERSONAL), entry.c.id.not_in(drafted))
            .values(state="discarded", settled_drain=drain.id, reason=f"discarded by decision {number}")
        ).rowcount
    )


def _freed(drain: Drain, ours: Any, decision: int) -> None:
    """What a person lets go again is open; that it may have been sent before, or is stale, was theirs to weigh."""
    reason = case((entry.c.reason.in_(FLAWS), entry.c.reason), else_=literal(f"{stale.FREED} {decision}"))
    held = and_(entry.c.state == "open", entry.c.reason.in_(stale.HELD))
    with drain.ledger.write(drain.queue, drain.epoch) as tx:
        tx.execute(
            update(entry)
            .where(ours, or_(entry.c.state == "ambiguous", held))
            .values(state="open", reason=reason)
        )


def _replay_work(
    drain: Drain, work_id: int, drafted: Select[tuple[int]], who: str, decision: int, deadline: float
) -> list[Ran]:
    ours = and_(entry.c.work == work_id, entry.c.id.not_in(drafted))
    _freed(drain, ours, decision)
    sendable = and_(
        ours,
        entry.c.queue == drain.queue,
        entry.c.state == "open",
        entry.c.target.is_not(None),
        entry.c.duplicate_of.is_(None),
        entry.c.reason.not_in(FLAWS),
    )
    return replay_now(
        drain, f"review:work {work_id}", sendable, who=who, saw=f"decision {decision}", deadline=deadline
    )


def _replay_drafts(drain: Drain, subject: str, who: str, decision: int, deadline: float) -> list[Ran]:
    """The drafted values replace the originals: one entry, one effect. In a queue ordered by key an entry waits while
    an earlier one of its key does, that is none of these.
    """
    chosen = _drafts(subject)
    ours = and_(entry.c.queue == drain.queue, entry.c.id.in_(select(draft.c.entry).where(chosen)))
    _freed(drain, ours, decision)
    ours = and_(ours, entry.c.state == "open", entry.c.reason.not_in(FLAWS))
    keeps_back = {
        "their origin names no allowed target (target.allow)": entry.c.target.is_(None),
        "an earlier entry of their key waits": planning.behind(drain, chosen),
    }
    with drain.ledger.read() as tx:
        for why, kept in keeps_back.items():
            if n := tx.execute(select(func.count()).select_from(entry).where(ours, kept)).scalar_one():
                drain.note("apply_review", f"{subject}: {n} not sent: {why}", level="warning", kept_back=n)
    return replay_now(
        drain,
        f"review:{subject}",
        and_(ours, *(not_(kept) for kept in keeps_back.values())),
        who=who,
        saw=f"decision {decision}",
        deadline=deadline,
        drafts=chosen,
    )
