"""Fix permanent failures: propose what the evidence calls for, apply what was approved, try it on a canary, roll
it back if that fails.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from sqlalchemy import ColumnElement, and_, func, select

from dlq import plan as planning
from dlq.drain import Drain
from dlq.errors import Refused
from dlq.ledger.schema import decision as decisions
from dlq.ledger.schema import drain as drains
from dlq.ledger.schema import entry, event, grp
from dlq.orchestrator import OrchestratorError, PluginChanged
from dlq.pace import CANARY
from dlq.remedies import REMEDIES, Fix, Remedy
from dlq.replay import Ran, ready_now, run_jobs


def _waiting(drain: Drain, remedy: str) -> dict[str, dict[str, Any]]:
    """By plugin: the groups that wait for this remedy and how many entries they have."""
    with drain.ledger.read() as tx:
        rows = tx.execute(
            select(grp.c.id, grp.c.component, func.count())
            .join(entry, entry.c.grp == grp.c.id)
            .where(
                entry.c.queue == drain.queue,
                entry.c.state == "open",
                entry.c.reason == "waiting_for_fix",
                grp.c.remedy == remedy,
            )
            .group_by(grp.c.id, grp.c.component)
        ).all()
    plugins: dict[str, dict[str, Any]] = defaultdict(lambda: {"groups": [], "entries": 0})
    for group, component, count in rows:
        plugin = plugins[(component or "").split(".")[0]]
        plugin["groups"].append(group)
        plugin["entries"] += count
    return dict(plugins)


def propose_fix(drain: Drain) -> dict[str, Any]:
    """What to change, what was seen and what policy allows. Proposes nothing it has no evidence for."""
    fixes: list[Fix] = []
    left: list[str] = []
    for name, remedy in REMEDIES.items():
        if waiting := _waiting(drain, name):
            for plugin, found in _proposed(drain, remedy, waiting):
                if isinstance(found, str):
                    left.append(f"{plugin}: {found}" if plugin else found)
                else:
                    work = waiting[plugin]
                    fixes.append({"remedy": name, "plugin": plugin, **found, **work})
    return _proposal(drain, fixes, "; ".join(left))


def _proposed(
    drain: Drain, remedy: Remedy, waiting: dict[str, dict[str, Any]]
) -> Iterator[tuple[str, Fix | str]]:
    """By plugin the fix, or why there is none; without a plugin: why there can be none."""
    orchestrator = drain.orchestrator
    if orchestrator is None:
        yield "", f"no orchestrator is configured: {remedy.level} are changed by hand, the entries wait"
        return
    try:
        if remedy.level not in orchestrator.capabilities():
            yield "", f"the orchestrator offers no {remedy.level}: they are changed by hand, the entries wait"
            return
        evidence = remedy.evidence(orchestrator)
    except OrchestratorError as error:
        yield "", f"{remedy.level} can't be read: {error}"
        return
    for plugin in sorted(waiting):
        if plugin:
            yield plugin, remedy.propose(plugin, evidence.get(plugin), drain.config)
        else:
            yield "", f"{waiting[plugin]['entries']} entries don't name the component that failed"


def _proposal(drain: Drain, fixes: list[Fix], left: str) -> dict[str, Any]:
    digest = hashlib.sha256(json.dumps([drain.id, fixes], sort_keys=True).encode()).hexdigest()
    lines = [f"{fix['says']}: frees {fix['entries']} entries" for fix in fixes]
    said = "; ".join(lines) or "nothing can be proposed"
    drain.note("propose_fix", said + (f". Left: {left}" if left else ""), fixes=fixes, hash=digest)
    within = bool(fixes) and all(f["within_policy"] for f in fixes)
    return {
        "fixes": fixes,
        "hash": digest,
        "summary": "\n".join(f"- {line}" for line in lines),
        "said": said,
        "left": left,
        "within_policy": within,
    }


def apply_fix(drain: Drain, digest: str, decision: int | None) -> dict[str, Any]:
    """Apply the proposal with this hash, as approved by ``decision``.

    :raises Refused: when the newest proposal is another one than was approved, or nobody approved it.
    """
    proposal = drain.noted("propose_fix") or {}
    if proposal.get("hash") != digest:
        raise Refused(
            f"the proposal changed since it was approved ({digest[:12]}): clear propose_fix with its "
            "downstream and look again"
        )
    orchestrator = drain.orchestrator
    if not proposal["fixes"] or orchestrator is None or drain.dry_run:
        return {"applied": [], "said": "nothing to apply"}
    who = _approved_by(drain, digest, decision)
    if who is None:
        raise Refused(
            f"proposal {digest[:12]} was not approved by decision {decision}: clear approve_fix with its downstream "
            "and decide; a task that is marked as done decides nothing"
        )
    # Said before it is done: who dies between a change and its canary leaves one that nobody tried, to be taken back.
    drain.note("apply_fix", "about to apply what was approved", applied=proposal["fixes"], decision=decision)
    said = []
    for fix in proposal["fixes"]:
        key = f"{drain.id}:{drain.epoch}:{digest[:16]}:{fix['remedy']}:{fix['plugin']}"
        try:
            said.append(REMEDIES[fix["remedy"]].apply(orchestrator, fix, who, key))
        except PluginChanged as error:
            raise Refused(
                f"{fix['plugin']} is not what it was when the patch was proposed: clear propose_fix with its "
                f"downstream and look again ({error})"
            ) from None
    drain.note("apply_fix", "; ".join(said), applied=proposal["fixes"], decision=decision)
    return {"applied": proposal["fixes"], "said": "; ".join(said)}


def _approved_by(drain: Drain, digest: str, decision: int | None) -> str | None:
    with drain.ledger.read() as tx:
        return tx.execute(
            select(decisions.c.who).where(
                decisions.c.id == decision,
                decisions.c.drain == drain.id,
                decisions.c.kind == "approve_fix",
                decisions.c.subject == digest,
                decisions.c.choice == "approve",
            )
        ).scalar_one_or_none()


def canary_fix(drain: Drain, deadline_s: float) -> dict[str, Any]:
    """Replay a canary of what waited for each applied fix: free the rest if it passes, roll the fix back if not."""
    applied = (drain.noted("apply_fix") or {}).get("applied", [])
    if drain.dry_run or not applied:
        return {"passed": True, "rolled_back": [], "freed": 0, "said": "no fix was applied"}
    deadline = time.monotonic() + deadline_s
    freed, rolled_back, said = 0, [], []
    for fix in applied:
        ours = and_(entry.c.reason == "waiting_for_fix", entry.c.grp.in_(fix["groups"]))
        ran = _try(drain, fix, ours, deadline)
        if all(r.ended == "done" for r in ran) and any(r.tally.confirmed for r in ran):
            n = ready_now(drain, ours, "fixed")
            freed += n
            said.append(
                f"{fix['plugin']}: canary of {sum(r.sent for r in ran)} passed, {n} more are free to be replayed"
            )
            continue
        rolled_back.append(fix["plugin"])
        if any(r.ended == "gate_failed" for r in ran):
            said.append(f"{fix['plugin']}: the canary failed; {_roll_back(drain, fix)}")
            ready_now(drain, ours, "fix_failed")
        else:
            stopped = next((r.ended for r in ran if r.ended != "done"), "nothing could be sent")
            said.append(
                f"{fix['plugin']}: could not be tried ({stopped.replace('_', ' ')}), so the entries wait on; "
                f"{_roll_back(drain, fix)}"
            )
    drain.note(
        "canary_fix",
        "; ".join(said),
        level="warning" if rolled_back else "info",
        rolled_back=rolled_back,
        freed=freed,
    )
    return {"passed": not rolled_back, "rolled_back": rolled_back, "freed": freed, "said": "; ".join(said)}


def take_back_untried(drain: Drain) -> list[str]:
    """Roll back the fixes of the queue's last drains that were applied, or about to be, and that no canary tried;
    returns what was done, in words.
    """
    of_queue = select(event.c.id, event.c.data).join(drains, drains.c.id == event.c.drain)
    of_queue = of_queue.where(drains.c.queue == drain.queue).order_by(event.c.id.desc()).limit(1)
    with drain.ledger.read() as tx:
        made = tx.execute(of_queue.where(event.c.stage == "apply_fix")).first()
        tried = tx.execute(of_queue.where(event.c.stage == "canary_fix")).first()
    applied = json.loads(made.data)["applied"] if made and (tried is None or tried.id < made.id) else []
    if not applied:
        return []
    said = [f"{fix['plugin']}: no canary tried its fix; {_roll_back(drain, fix)}" for fix in applied]
    drain.note(
        "canary_fix", "; ".join(said), level="warning", rolled_back=[f["plugin"] for f in applied], freed=0
    )
    return said


def _try(drain: Drain, fix: Fix, ours: ColumnElement[bool], deadline: float) -> list[Ran]:
    """The canary's jobs and how they ended; a retry goes on with those there are, and judges no others."""
    stage = f"canary_fix:{fix['plugin']}:{fix['change']}"
    if jobs := planning.made(drain, stage):
        return run_jobs(drain, jobs, deadline)
    may = and_(planning.sendable(drain), planning.heads(drain), ours)
    with drain.ledger.read() as tx:
        ids = list(
            tx.execute(select(entry.c.id).where(may).order_by(entry.c.id).limit(sum(CANARY))).scalars()
        )
    jobs = planning.make(
        drain,
        stage,
        and_(may, entry.c.id.in_(ids)),
        who=f"policy:{drain.queue}.yaml@{drain.config.sha}",
        saw=f"{fix['plugin']} with {fix['change']}",
    )
    return run_jobs(drain, jobs, deadline)


def _roll_back(drain: Drain, fix: Fix) -> str:
    if drain.orchestrator is None:
        return f"NOT rolled back from {fix['change']}: no orchestrator is configured"
    # The epoch: to an orchestrator that remembers keys, a cleared drain's second roll back is none of its first.
    key = f"{drain.id}:{drain.epoch}:roll back:{fix['remedy']}:{fix['plugin']}"
    try:
        return REMEDIES[fix["remedy"]].undo(drain.orchestrator, fix, key)
    except OrchestratorError as error:
        return f"NOT rolled back from {fix['change']}: {error}"
