"""Inspect, categorize, find the root cause, choose the remedies: what the runbook decides before it acts."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

from sqlalchemy import ColumnElement, Connection, and_, case, func, select, update

from dlq import expiry, held, limits, regroup, rehearsal, silent
from dlq import plan as planning
from dlq.drain import Drain
from dlq.errors import ArchiveError, DlqError
from dlq.ledger import duplicates
from dlq.ledger.schema import entry, grp, segment
from dlq.redact import redact

FIXES = ("raise_quota", "patch_plugin")
"""Remedies a fix is proposed for; their entries wait for it."""

_WAITING = {
    "retry": "ready",
    "raise_quota": "waiting_for_fix",
    "patch_plugin": "waiting_for_fix",
    "hold": held.REASON,
}
"""Why a new entry stays open, by its group's remedy; every other waits for a person."""

_NOT_STARTED = "start_probe_failed"
_FREE = (_NOT_STARTED, "earlier_entry_of_key")
"""What was free already, and not tried: it is not held again."""

WAITING_ALONE = (held.REASON, _NOT_STARTED)
"""Reasons of open entries that wait for no person."""

_OF_GROUP = ("fingerprint", "category", "remedy", "rule", "component", "error_type", "owner")

SHOWN = 100
_IDS = 5


def assign(drain: Drain, canary: held.Canary | None = None) -> dict[str, Any]:
    """Give every new entry the reason why it is open; mark twins and conflicts; free what was held long enough (see
    :func:`dlq.held.look`). Returns counts.
    """
    regroup.apply(drain)
    silent.ask(drain)
    with drain.ledger.write(drain.queue, drain.epoch) as tx:
        twins, conflicts = duplicates.mark(tx, drain.queue)
        duplicates.settle(tx, drain.queue, drain.id)
        unsettled = and_(entry.c.queue == drain.queue, entry.c.state == "open")
        tired = tx.execute(
            update(entry)
            .where(
                unsettled,
                entry.c.reason.in_(("new", "ready", "returned")),
                entry.c.attempts >= drain.config.limits.returns,
            )
            .values(reason="returns_limit")
        ).rowcount
        # What came back is not replayed by the drain that sent it: it waits for the next one.
        older = select(entry.c.id).where(
            unsettled, entry.c.reason == "returned", entry.c.taken_drain != drain.id
        )
        tx.execute(update(entry).where(entry.c.id.in_(older)).values(reason="new"))
        nowhere = tx.execute(
            update(entry)
            .where(unsettled, entry.c.reason == "new", entry.c.target.is_(None))
            .values(reason="target_not_allowed")
        ).rowcount
        if silent.tried(drain):
            ids = select(entry.c.id).where(silent.silent(drain))
            tx.execute(update(entry).where(entry.c.id.in_(ids)).values(reason="ready"))
        for remedy in (
            tx.execute(select(grp.c.remedy).where(grp.c.queue == drain.queue).distinct()).scalars().all()
        ):
            ours = select(grp.c.id).where(grp.c.queue == drain.queue, grp.c.remedy == remedy)
            tx.execute(
                update(entry)
                .where(unsettled, entry.c.reason == "new", entry.c.grp.in_(ours))
                .values(reason=_WAITING.get(remedy, "waiting_for_person"), hold_until=None)
            )
        # What an earlier drain stopped at is tried again by this one.
        again = select(entry.c.id).where(
            unsettled,
            entry.c.reason.in_(
                (
                    "gate_failed",
                    "canary_failed",
                    "outcome_unknown",
                    "nobody_consumes",
                    "consumers_lag",
                    "approval_expired",
                    "earlier_entry_of_key",
                    _NOT_STARTED,
                )
            ),
        )
        if drain.noted("categorize") is None:
            held_ones = select(grp.c.id).where(grp.c.queue == drain.queue, grp.c.remedy == "hold")
            unless = and_(entry.c.grp.in_(held_ones), entry.c.reason.not_in(_FREE))
            reason = case((unless, held.REASON), else_="ready")
            tx.execute(update(entry).where(entry.c.id.in_(again)).values(reason=reason, hold_until=None))
    held.look(drain, canary)
    if limits.not_started(drain) is not None:
        with drain.ledger.write(drain.queue, drain.epoch) as tx:
            ready = and_(entry.c.queue == drain.queue, entry.c.state == "open", entry.c.reason == "ready")
            tx.execute(update(entry).where(ready).values(reason=_NOT_STARTED))
    planning.block_by_key(drain)
    return {
        "twins": twins,
        "conflicts": conflicts,
        "returns_limit": int(tired),
        "target_not_allowed": int(nowhere),
    }


def groups(drain: Drain) -> list[dict[str, Any]]:
    """The largest groups of unsettled entries, at most :data:`SHOWN`, with a few correlation ids each."""
    with drain.ledger.read() as tx:
        rows = tx.execute(
            select(
                grp.c.id,
                grp.c.fingerprint,
                grp.c.category,
                grp.c.remedy,
                grp.c.rule,
                grp.c.component,
                grp.c.error_type,
                grp.c.owner,
                func.count().label("count"),
                func.min(entry.c.failed_at).label("first"),
                func.max(entry.c.failed_at).label("last"),
            )
            .join(entry, entry.c.grp == grp.c.id)
            .where(_unsettled(drain))
            .group_by(*grp.c)
            .order_by(func.count().desc())
            .limit(SHOWN)
        ).mappings()
        return [{**r, "correlation_ids": _correlation_ids(tx, drain, r["id"])} for r in rows.all()]


def _unsettled(drain: Drain) -> ColumnElement[bool]:
    return and_(entry.c.queue == drain.queue, entry.c.settled_drain.is_(None))


def _correlation_ids(tx: Connection, drain: Drain, group: int) -> list[str]:
    ids = select(entry.c.correlation_id).where(
        _unsettled(drain), entry.c.grp == group, entry.c.correlation_id.is_not(None)
    )
    return [str(i) for i in tx.execute(ids.order_by(entry.c.id).limit(_IDS)).scalars()]


def inspect_sample(drain: Drain) -> dict[str, Any]:
    """The first entries of each group, oldest first, from custody, redacted: 10 to 50 in all."""
    most = drain.config.limits.sample
    if drain.dry_run:
        seen = rehearsal.shown(drain, most)
        said = f"{len(seen)} entries looked at in the queue"
        queued = expiry.in_queue(drain.source, drain.positions())
        if words := expiry.said(queued, None):
            said += f"; {words}"
        drain.note("inspect_sample", f"dry run: {said}; none was taken")
        return {"sample": seen, "said": said, "first_to_expire": queued}
    turn = func.row_number().over(partition_by=entry.c.grp, order_by=entry.c.id)
    with drain.ledger.read() as tx:
        ranked = (
            select(entry.c.id, turn.label("turn"))
            .where(entry.c.queue == drain.queue, entry.c.settled_drain.is_(None))
            .subquery()
        )
        rows = (
            tx.execute(
                select(
                    entry.c.part,
                    entry.c.place,
                    entry.c.correlation_id,
                    entry.c.failed_at,
                    entry.c.size,
                    entry.c.attempts,
                    entry.c.row_no,
                    grp.c.error_type,
                    grp.c.component,
                    grp.c.category,
                    segment.c.uri,
                )
                .join(ranked, ranked.c.id == entry.c.id)
                .join(grp, grp.c.id == entry.c.grp)
                .join(segment, segment.c.id == entry.c.segment)
                .order_by(ranked.c.turn, entry.c.id)
                .limit(most)
            )
            .mappings()
            .all()
        )
        saved = expiry.in_custody(tx, _unsettled(drain))
    messages = _messages(drain, [(r["uri"], r["row_no"]) for r in rows])
    sample = [
        {
            "place": f"{r['part']}/{r['place']}",
            "error_type": r["error_type"],
            "component": r["component"],
            "category": r["category"],
            "correlation_id": r["correlation_id"],
            "failed_at": r["failed_at"],
            "bytes": r["size"],
            "replays": r["attempts"],
            "message": messages.get((r["uri"], r["row_no"]), ""),
        }
        for r in rows
    ]
    kinds = len({(s["error_type"], s["component"]) for s in sample})
    said = f"{len(sample)} entries looked at, from {kinds} kinds of failure"
    if words := expiry.said(None, saved):
        said += f"; {words}"
    drain.note("inspect_sample", said, entries=len(sample), first_to_expire=saved)
    return {"sample": sample, "said": said, "first_to_expire": saved}


def _messages(drain: Drain, places: list[tuple[str, int]]) -> dict[tuple[str, int], str]:
    """The redacted failure messages of archived rows; a sample is no reason to fail, so a broken segment gives none."""
    found = {}
    for uri in dict.fromkeys(uri for uri, _ in places):
        try:
            column = drain.archive.read(uri, ["message"])["message"]
        except ArchiveError as error:
            drain.note("inspect_sample", str(error), level="error")
            continue
        for where, row in places:
            if where == uri:
                found[(uri, row)] = redact(column[row].as_py() or "")[:200]
    return found


def categorize(drain: Drain) -> dict[str, Any]:
    """Group what is unsettled by fingerprint and component; say of each new entry why it stays open."""
    if drain.dry_run:
        return _rehearsed(drain)
    drain.phase("categorize")
    marks = assign(drain)
    with drain.ledger.read() as tx:
        counts = tx.execute(
            select(grp.c.category, func.count(), func.count(grp.c.id.distinct()))
            .join(entry, entry.c.grp == grp.c.id)
            .where(_unsettled(drain))
            .group_by(grp.c.category)
        ).all()
    by_category = Counter({category: n for category, n, _ in counts})
    total = sum(n for *_, n in counts)
    said = ", ".join(f"{n} {c}" for c, n in by_category.most_common()) or "nothing is unsettled"
    extra = "".join(f"; {n} {name.replace('_', ' ')}" for name, n in marks.items() if n)
    drain.note("categorize", f"{total} group(s): {said}{extra}", by_category=dict(by_category), **marks)
    return {"groups": groups(drain), "by_category": dict(by_category), "said": f"{said}{extra}", **marks}


def _rehearsed(drain: Drain) -> dict[str, Any]:
    """The categories as a dry run sees them: what is in custody, and the oldest of what is in the queue."""
    found = _foreseen(drain)
    by_category: Counter[str] = Counter()
    for group in found:
        by_category[group["category"]] += group["count"]
    said = ", ".join(f"{n} {c}" for c, n in by_category.most_common()) or "nothing is unsettled"
    drain.note("categorize", f"dry run: of custody and the {rehearsal.MOST} oldest of the queue: {said}")
    return {"groups": found, "by_category": dict(by_category), "said": said}


def _foreseen(drain: Drain) -> list[dict[str, Any]]:
    """The groups that there would be: those in custody where people merged them, and those of the queue. (What a split
    takes out of custody is known when it is done.)
    """
    decided = regroup.regrouping(drain)
    found: dict[str, dict[str, Any]] = {}
    for each in [*groups(drain), *rehearsal.groups(drain)]:
        if (into := decided.merged(each["fingerprint"])) is not None:
            each = {**each, "id": None, **{name: getattr(into, name) for name in _OF_GROUP}}
        if (same := found.setdefault(each["fingerprint"], each)) is not each:
            same["id"] = each["id"] if same["id"] is None else same["id"]
            same["count"] += each["count"]
            same["correlation_ids"] = [*same["correlation_ids"], *each["correlation_ids"]][:_IDS]
    return sorted(found.values(), key=lambda group: -group["count"])


def find_root_cause(drain: Drain) -> dict[str, Any]:
    """Suspects by over-representation: what fails more than its share, by what entries and the orchestrator
    tell. Never raises.
    """
    with drain.ledger.read() as tx:
        rows = tx.execute(
            select(grp.c.component, grp.c.error_type, func.count())
            .join(entry, entry.c.grp == grp.c.id)
            .where(_unsettled(drain))
            .group_by(grp.c.component, grp.c.error_type)
            .order_by(func.count().desc())
            .limit(1000)
        ).all()
    kinds: dict[str, Counter[str]] = defaultdict(Counter)
    for component, error_type, count in rows:
        kinds[component or "(not named)"][error_type] += count
    total = sum(sum(k.values()) for k in kinds.values()) or 1
    suspects = []
    for component, types in sorted(kinds.items(), key=lambda k: -sum(k[1].values()))[:5]:
        count = sum(types.values())
        kind, n = types.most_common(1)[0]
        lift = round(count / total * len(kinds), 2)
        said = f"{count} of {total} failures, {n} of them {kind}"
        suspects.append({"component": component, "count": count, "lift": lift, "said": said})
    rate = _success_rate(drain)
    said = (
        "; ".join(f"{s['component']}: {s['said']} (x{s['lift']})" for s in suspects[:3])
        or "nothing to explain"
    )
    drain.note("find_root_cause", f"{said}. {rate}", suspects=suspects)
    return {"suspects": suspects, "said": said, "orchestrator": rate}


def _success_rate(drain: Drain) -> str:
    if drain.orchestrator is None:
        return "No orchestrator is configured: its error rates are not known"
    try:
        rate = drain.orchestrator.success_rate(round(drain.config.slo.window))
        return f"Workflow success {rate.succeeded} of {rate.total} in the window"
    except DlqError as error:  # the root cause is a hint: its sources may be down with everything else
        return f"The orchestrator's error rates are not known: {error}"


def choose_remedies(drain: Drain) -> dict[str, Any]:
    """Which branches have work, from the reasons entries are open."""
    if drain.dry_run:
        branch = {"retry": "retry_transient", "hold": "held", **dict.fromkeys(FIXES, "fix_permanent")}
        would: Counter[str] = Counter()
        for group in _foreseen(drain):
            would[branch.get(group["remedy"], "manual_review")] += group["count"]
        return _chosen(drain, would)
    with drain.ledger.read() as tx:
        rows = tx.execute(
            select(entry.c.reason, grp.c.remedy, func.count())
            .join(grp, grp.c.id == entry.c.grp)
            .where(entry.c.queue == drain.queue, entry.c.state.in_(("open", "ambiguous")))
            .group_by(entry.c.reason, grp.c.remedy)
        ).all()
    why: Counter[str] = Counter()
    forbidden = limits.forbids(drain) is not None
    for reason, remedy, count in rows:
        to_be_sent = reason in planning.READY or (reason == "waiting_for_fix" and remedy in FIXES)
        if reason in WAITING_ALONE or (forbidden and to_be_sent):
            why["held"] += count
        elif reason in planning.READY:
            why["retry_transient"] += count
        elif reason == "waiting_for_fix" and remedy in FIXES:
            why["fix_permanent"] += count
        else:
            why["manual_review"] += count
    return _chosen(drain, why)


def _chosen(drain: Drain, why: Counter[str]) -> dict[str, Any]:
    branches = [b for b in ("retry_transient", "fix_permanent", "manual_review") if why[b]] or [
        "nothing_to_do"
    ]
    said = ", ".join(f"{b}: {why[b]} entries" for b in (*branches, "held") if why[b]) or "nothing is open"
    drain.note("choose_remedies", said, branches=branches, why=dict(why))
    return {"branches": branches, "why": dict(why), "said": said}
