"""The verdict: green means that the run did its duty, provably. Whether the world is well is the incident's state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import func, select, update

from dlq import alerts, clock, slo
from dlq.conservation import accounts
from dlq.drain import Drain
from dlq.errors import DlqError
from dlq.fixes import take_back_untried
from dlq.ledger import lease
from dlq.ledger.schema import drain as drains
from dlq.ledger.schema import entry, grp, incident, intake
from dlq.review import file_work

_NOT_DECIDING = {"escalate", "wait_threshold", "find_root_cause", "acknowledge_alert"}
"""Tasks whose failure says nothing of the drain's duty."""

_FAILED = {"failed", "upstream_failed"}


def close_drain(drain: Drain, states: Mapping[str, str | None] | None = None) -> dict[str, Any]:
    """Read the accounts, give the verdict, write it down, free the queue; what was given stands.

    :param states: the run's task states by task id; None where there are no tasks (the command line).
    """
    if drain.dry_run:
        failed = _tasks(states or {})
        said = "; ".join(failed) or "dry run: nothing was changed"
        verdict = "red" if failed else "green"
        return {"verdict": verdict, "reasons": failed, "open": [], "incident": "none", "said": said}
    if (given := earlier(drain)) is not None:
        return given
    untried = take_back_untried(drain)
    work = file_work(drain)
    reasons = [
        *untried,
        *_tasks(states or {}),
        *_accounts(drain),
        *_proof(drain),
        *_routing(drain),
        *_golden(drain),
    ]
    alerts.end_acknowledgement(drain)
    world = _incident(drain)
    verdict = "red" if reasons else "green"
    left = [
        {
            "group": f"{w['error_type']} in {w['component']}",
            "count": w["count"],
            "reason": w["reason"],
            "owner": w["owner"],
            "work": w["id"],
        }
        for w in work
    ]
    data: dict[str, Any] = {"verdict": verdict, "reasons": reasons, "open": left[:50], "incident": world}
    result = _result(data)
    drain.note("close_drain", result["said"], level="info" if verdict == "green" else "error", **data)
    lease.release(drain.ledger, drain.queue, drain.id, drain.epoch, verdict)
    return result


def earlier(drain: Drain) -> dict[str, Any] | None:
    """The verdict that was given since the drain was opened last, None where it is to be given.

    The queue may be another's by now: a try that died behind its verdict can only say it again.
    """
    if drain.dry_run:
        return None
    with drain.ledger.read() as tx:
        closed = tx.execute(select(drains.c.closed_at).where(drains.c.id == drain.id)).scalar()
    data = drain.noted("close_drain") if closed is not None else None
    return None if data is None else _result(data)


def _result(data: Mapping[str, Any]) -> dict[str, Any]:
    why = "; ".join(data["reasons"]) or "the run did its duty, provably"
    said = f"{data['verdict']}: {why}. {data['incident']['said']}"
    return {**data, "incident": data["incident"]["state"], "said": said}


def _tasks(states: Mapping[str, str | None]) -> list[str]:
    """A skip is never trusted, and a failure is a reason, whatever came after."""
    return [
        f"task {task} is {state}"
        for task, state in sorted(states.items())
        if state in _FAILED and task.split(".")[-1].split("__")[0] not in _NOT_DECIDING
    ]


def _accounts(drain: Drain) -> list[str]:
    with drain.ledger.read() as tx:
        short = (
            tx.execute(
                select(intake.c.part)
                .where(intake.c.drain == drain.id, intake.c.cutoff.is_not(None))
                .group_by(intake.c.part)
                .having(
                    func.max(func.coalesce(intake.c.to_pos, intake.c.from_pos)) < func.max(intake.c.cutoff)
                )
            )
            .scalars()
            .all()
        )
        by_state: dict[str, int] = {
            str(state): int(n)
            for state, n in tx.execute(
                select(entry.c.state, func.count())
                .where(entry.c.queue == drain.queue, entry.c.settled_drain.is_(None))
                .group_by(entry.c.state)
            )
        }
        outcome: dict[str, int] = {
            str(state): int(n)
            for state, n in tx.execute(
                select(entry.c.state, func.count())
                .where(entry.c.settled_drain == drain.id)
                .group_by(entry.c.state)
            )
        }
        unowned = tx.execute(
            select(func.count())
            .select_from(entry)
            .where(entry.c.queue == drain.queue, entry.c.settled_drain.is_(None), entry.c.work.is_(None))
        ).scalar_one()
        took = tx.execute(
            select(func.count()).select_from(intake).where(intake.c.drain == drain.id)
        ).scalar_one()
        kind = tx.execute(select(drains.c.kind).where(drains.c.id == drain.id)).scalar_one()
    reasons = []
    if short:
        reasons.append(f"partition(s) {', '.join(map(str, short))} were not read to their cut-off")
    if kind == "drain" and not took:
        reasons.append("nothing was taken into custody: the queue was not read")
    if unfinished := by_state.get("planned", 0) + by_state.get("sending", 0):
        reasons.append(f"{unfinished} entries are still planned or being sent")
    confirmed, returned = outcome.get("confirmed", 0), outcome.get("returned", 0)
    if confirmed + returned and confirmed / (confirmed + returned) < drain.config.limits.gate:
        reasons.append(
            f"replay success {confirmed / (confirmed + returned):.1%} is below {drain.config.limits.gate:.0%}"
        )
    if outcome.get("replayed") and not confirmed + returned:
        reasons.append(f"no outcome is known of {outcome['replayed']} replays")
    if unowned:
        reasons.append(f"{unowned} unsettled entries have no filed work")
    return reasons


def _proof(drain: Drain) -> list[str]:
    """An older proof proves nothing of a cleared run, nor of what a stage cleared alone did since."""
    proof = drain.noted("verify_conservation")
    if proof is None:
        return ["conservation was not verified (verify_conservation did not run since the drain was opened)"]
    if not proof["proven"]:
        return [f"conservation is not proven: {len(proof['broken'])} finding(s)"]
    with drain.ledger.read() as tx:
        now = accounts(drain, tx)
    if any(proof["accounts"][name] != now[name] for name in ("taken", "settled", "unsettled")):
        return ["entries were taken or sent after conservation was verified: clear verify_conservation"]
    return []


def _routing(drain: Drain) -> list[str]:
    isolated = drain.noted("isolate")
    if isolated is None or isolated.get("isolation") != "routing":
        return []
    restored = drain.noted("restore_routing")
    return (
        []
        if restored and restored.get("restored")
        else ["routing was not given back (its lease will end by itself)"]
    )


def _golden(drain: Drain) -> list[str]:
    if drain.config.golden_flows is None or drain.kind != "drain":
        return []
    golden = drain.noted("verify_golden_flows")
    if golden is None:
        return ["golden flows did not run (verify_golden_flows)"]
    already = golden.get("broken_before", [])
    broken = sorted(f["flow"] for f in golden["flows"] if not f["passed"] and f["flow"] not in already)
    return (
        []
        if golden["passed"]
        else [f"golden flows are not green: {', '.join(broken) or 'they could not be run'}"]
    )


def _incident(drain: Drain) -> dict[str, Any]:
    """Close the incident where the world is well: nothing outstanding, or less than the alert's share."""
    try:
        now = slo.standing(drain)
    except DlqError as error:
        return {"state": "open", "said": f"the queue can't be looked at: {error}"}
    well = now.outstanding == 0 or (now.ratio is not None and now.ratio < drain.config.slo.alert)
    with drain.ledger.write(drain.queue, drain.epoch) as tx:
        number = tx.execute(select(drains.c.incident).where(drains.c.id == drain.id)).scalar()
        if number is None:
            return {"state": "none", "said": str(now)}
        if well:
            tx.execute(update(incident).where(incident.c.id == number).values(closed_at=clock.now()))
            return {"state": "closed", "said": f"incident {number} is closed: {now}"}
        still = [
            f"{r.n} {r.reason.replace('_', ' ')} ({r.owner})"
            for r in tx.execute(
                select(entry.c.reason, grp.c.owner, func.count().label("n"))
                .join(grp, grp.c.id == entry.c.grp)
                .where(entry.c.queue == drain.queue, entry.c.settled_drain.is_(None))
                .group_by(entry.c.reason, grp.c.owner)
                .order_by(func.count().desc())
                .limit(8)
            )
        ]
        return {
            "state": "open",
            "said": f"incident {number} stays open, the SLO is still broken: {now}: {', '.join(still)}",
        }
