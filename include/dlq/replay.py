"""Replay: canary, ramp, and what is left, each step gated by the outcome of the one before."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, and_, func, select, update

from dlq import expiry, limits, rehearsal
from dlq import plan as planning
from dlq.drain import Drain
from dlq.errors import NotFound, Refused
from dlq.intake import Intake
from dlq.ledger import duplicates
from dlq.ledger import jobs as ledger
from dlq.ledger.schema import entry, job
from dlq.outcome import KNOWN, Outcomes, Tally
from dlq.pace import Pacer
from dlq.sending import Run, running

Progress = Callable[[int, int], None]
"""Called with (sent, of)."""

_LAST_WORD_S = 15.0
"""How long a job's end waits for the outcomes still under way; later ones are settled by the next stage or drain."""

_LAG_POLL_S = 0.5

_REST = {
    "gate_failed": "gate_failed",
    "burst_of_returns": "gate_failed",
    "consumers_lag": "consumers_lag",
    "no_outcome": "outcome_unknown",
    "deadline": "ready",
    "paused": "ready",
    "nobody_consumes": "nobody_consumes",
    "canary_failed": "canary_failed",
}
"""Why what a job didn't send is open again, by how the job ended."""


@dataclass(frozen=True)
class Ran:
    """What a job did in this run: ``ended`` is ``done`` or why it stopped."""

    job: str
    sent: int
    skipped: int
    tally: Tally
    ended: str

    def __str__(self) -> str:
        success = (
            f"{self.tally.success:.1%} success" if self.tally.success is not None else "no outcome known"
        )
        known = f"{self.tally.confirmed} confirmed, {self.tally.returned} returned, {self.tally.awaited} unconfirmed"
        said = f"job {self.job}: {self.sent} sent, {known} ({success})"
        if self.skipped:
            said += f", {self.skipped} left out"
        return said if self.ended == "done" else f"{said}; stopped: {self.ended.replace('_', ' ')}"

    def data(self) -> dict[str, Any]:
        return {
            "job": self.job,
            "sent": self.sent,
            "skipped": self.skipped,
            "confirmed": self.tally.confirmed,
            "returned": self.tally.returned,
            "unconfirmed": self.tally.awaited,
            "gate": self.tally.success,
            "ended": self.ended,
        }


def run_job(drain: Drain, job_id: str, deadline: float, progress: Progress | None = None) -> Ran:
    """Send a job to its end in steps, each followed by its gate; ``deadline`` is monotonic.

    :raises Fenced: when a newer try or drain took over.
    :raises Refused: when nothing may be replayed now (:func:`dlq.limits.forbids`); nothing of it was sent.
    """
    outcomes = Outcomes(drain)
    with drain.ledger.read() as tx:
        found = ledger.get(tx, job_id)
    if found.state == "closed":
        tally = outcomes.known(job_id, 0, found.size)
        return Ran(job_id, _sent(tally), 0, tally, found.ended or "done")
    if found.kind == "replay" and (why := limits.forbids(drain)) is not None:
        raise Refused(f"queue {drain.queue}: job {job_id} is not sent: {why}; its entries stay in custody")
    pacer = Pacer(drain.config.limits.batch, drain.config.limits.gate, canary=found.canary)
    ended: str | None = None
    with running(drain, job_id) as run:
        if not outcomes.consumed(run.job.target):
            ended = "nobody_consumes"
        elif run.cursor:  # what an earlier try sent is judged before anything more goes
            tally = outcomes.wait(job_id, run.job.target, 0, run.cursor, deadline)
            ended = _judged(pacer, tally, last=run.cursor == run.job.size)
        while ended is None and run.cursor < run.job.size:
            first = run.cursor
            ended = _step(drain, run, outcomes, pacer, deadline)
            last = run.cursor
            if progress is not None:
                progress(last, run.job.size)
            if ended is not None:
                break
            tally = outcomes.wait(job_id, run.job.target, first, last, deadline)
            ended = _judged(pacer, tally, last=last == run.job.size)
            if ended is None and run.cursor < run.job.size and time.monotonic() >= deadline:
                ended = "deadline"
            elif ended is None and last == first:
                ended = "paused"
        ended = ended or "done"
        # The last word on what is still under way, so that the next stage begins with what is known.
        last_word = time.monotonic() + (_LAST_WORD_S if ended == "done" else 0.0)
        tally = outcomes.wait(job_id, run.job.target, 0, run.cursor, min(deadline, last_word), share=1.0)
        run.close(ended, run.job.rest(_REST.get(ended, "ready")))
        done = Ran(job_id, _sent(tally), run.skipped, tally, ended)
    with drain.ledger.write(drain.queue, drain.epoch) as tx:
        duplicates.settle(tx, drain.queue, drain.id)
    return done


def _step(drain: Drain, run: Run, outcomes: Outcomes, pacer: Pacer, deadline: float) -> str | None:
    """Send one step, looking at what is known of it on the way; returns why the job must stop in its middle.

    No more is sent than leaves the consumers ``limits.lag`` behind.
    """
    job, first, until = run.job, run.cursor, min(run.cursor + pacer.size, run.job.size)
    room = 0
    for look in pacer.looks:
        sent = run.cursor
        while run.cursor < min(sent + look, until):
            if room <= 0 and (room := _room(drain, job.target, deadline)) <= 0:
                return "consumers_lag"
            before = run.cursor
            room -= run.send(min(sent + look, until, before + room), deadline) - before
            if run.cursor == before:  # the deadline, or a person's pause
                return None
        if run.cursor >= until:
            return None
        tally = outcomes.glance(job.id, job.target, first, run.cursor, deadline)
        if pacer.bursts(tally.confirmed, tally.returned):
            return "burst_of_returns"
    return None


def _room(drain: Drain, target: str, deadline: float) -> int:
    """How many entries may go until the consumers' lag is to be looked at again; waits while it is too great, 0 where
    that did not help.
    """
    until = min(deadline, time.monotonic() + drain.config.outcome.deadline)
    most = drain.config.limits.lag
    while (lag := drain.target.lag(target)) is not None and lag >= most:
        if time.monotonic() >= until:
            drain.note(
                "replay", f"the consumers of {target} are {lag} behind, limits.lag is {most}", level="warning"
            )
            return 0
        time.sleep(_LAG_POLL_S)
    return most - (lag or 0)


def _sent(tally: Tally) -> int:
    """The cursor counts what was left out, too."""
    return tally.confirmed + tally.returned + tally.awaited


def _judged(pacer: Pacer, tally: Tally, *, last: bool) -> str | None:
    """Why a job must stop; a step of which all was left out says nothing. Too little is known for going on below
    :data:`KNOWN`: behind the last step of a job nothing comes that it could let through, but behind a canary's does.
    """
    ended = pacer.judge(tally.success) if _sent(tally) else None
    if ended is None and tally.known < KNOWN and (pacer.canary or not last):
        return "no_outcome"
    return ended


def replay_canary(
    drain: Drain, stage: str, deadline_s: float, progress: Progress | None = None
) -> dict[str, Any]:
    """Plan what is ready and send the canary: 1, 5, then 20 entries, from every group."""
    if drain.dry_run:
        return {
            "plan": None,
            "hash": None,
            "gate": None,
            "passed": True,
            "jobs": [],
            "would": [*planning.summary(drain), *rehearsal.plan(drain)],
        }
    if (why := limits.not_started(drain)) is not None:
        drain.note(stage, f"nothing is replayed: {why}", level="warning", plan=None)
        return {"plan": None, "hash": None, "gate": None, "passed": False, "jobs": []}
    drain.phase(stage)
    jobs = planning.unfinished(drain, stage) or planning.make(
        drain,
        stage,
        planning.ready(drain),
        who=f"policy:{drain.queue}.yaml@{drain.config.sha}",
        saw="groups with remedy retry",
    )
    if not jobs:
        drain.note(stage, "nothing is ready to be replayed", plan=None)
        return {"plan": None, "hash": None, "gate": None, "passed": True, "jobs": []}
    size = sum(j.size for j in jobs)
    with drain.ledger.read() as tx:
        saved = expiry.in_custody(tx, entry.c.job.in_([j.id for j in jobs]))
    dies = f"; {words}" if (words := expiry.said(None, saved)) else ""
    drain.note(
        stage,
        f"plan {jobs[0].plan_hash[:12]}: {size} entries in {len(jobs)} job(s) to "
        f"{', '.join(sorted({j.target for j in jobs}))}{dies}",
        plan=jobs[0].plan,
        entries=size,
        first_to_expire=saved,
    )
    passed, gate = True, None
    deadline = time.monotonic() + deadline_s
    for one in (j for j in jobs if j.canary):
        ran = run_job(drain, one.id, deadline, progress)
        gate = ran.tally.success
        drain.note(stage, f"canary {ran}", level="info" if ran.ended == "done" else "warning", **ran.data())
        if ran.ended != "done":
            passed = False
            _stop(drain, [j for j in jobs if not j.canary and j.target == one.target], ran.ended)
    rest = [j.id for j in jobs if not j.canary and _open(drain, j.id)]
    return {"plan": jobs[0].plan, "hash": jobs[0].plan_hash, "gate": gate, "passed": passed, "jobs": rest}


def _open(drain: Drain, job_id: str) -> bool:
    with drain.ledger.read() as tx:
        return ledger.get(tx, job_id).state != "closed"


def _stop(drain: Drain, jobs: Sequence[ledger.Job], ended: str) -> None:
    for one in jobs:
        ledger.close(
            drain.ledger,
            drain.queue,
            drain.epoch,
            one.id,
            "canary_failed",
            one.rest(_REST.get(ended if ended != "gate_failed" else "canary_failed", "ready")),
        )


def replay_batches(
    drain: Drain, job: str, deadline_s: float, progress: Progress | None = None
) -> dict[str, Any]:
    """Send one job of the plan: batches of ``limits.batch``, doubling while it goes well."""
    drain.phase("retry_transient")
    ran = run_job(drain, job, time.monotonic() + deadline_s, progress)
    drain.note("replay_batches", str(ran), level="info" if ran.ended == "done" else "warning", **ran.data())
    return ran.data()


def replay_now(
    drain: Drain,
    stage: str,
    condition: ColumnElement[bool],
    *,
    who: str,
    saw: str,
    deadline: float,
    progress: Progress | None = None,
    drafts: ColumnElement[bool] | None = None,
) -> list[Ran]:
    """Plan ``condition`` and run all its jobs, the canary first; ``drafts`` as :func:`dlq.plan.make` takes them."""
    jobs = planning.unfinished(drain, stage)
    jobs = jobs or planning.make(drain, stage, condition, who=who, saw=saw, drafts=drafts)
    return run_jobs(drain, jobs, deadline, progress)


def run_jobs(
    drain: Drain, jobs: Sequence[ledger.Job], deadline: float, progress: Progress | None = None
) -> list[Ran]:
    """Run jobs one after the other; where a canary stops, the others of its target are closed."""
    done: list[Ran] = []
    stopped: set[str] = set()
    for one in sorted(jobs, key=lambda j: not j.canary):
        if one.target in stopped:
            continue
        ran = run_job(drain, one.id, deadline, progress)
        done.append(ran)
        if one.canary and ran.ended != "done":
            stopped.add(one.target)
            _stop(drain, [j for j in jobs if not j.canary and j.target == one.target], ran.ended)
    return done


def drain_remaining(drain: Drain, deadline_s: float, progress: Progress | None = None) -> dict[str, Any]:
    """Rounds of take and replay until the queue is empty to its cut-offs and nothing is ready, or the hour is up."""
    from dlq.triage import assign  # triage reads what replay leaves

    stage = "drain_remaining"
    if drain.dry_run:
        return {
            "rounds": 0,
            "taken": 0,
            "replayed": 0,
            "would": [*planning.summary(drain), *rehearsal.plan(drain)],
        }
    if (forbidden := limits.forbids(drain)) is not None:
        # What hangs on the go-ahead was skipped, but a skip is no failure: this stage runs all the same.
        drain.note(stage, f"nothing is replayed: {forbidden}", level="warning")
        return {"rounds": 0, "taken": 0, "replayed": 0, "why_stopped": forbidden}
    drain.phase(stage)
    deadline = time.monotonic() + deadline_s
    taken = rounds = 0
    ran: list[Ran] = []
    why = "the hour is up"

    def canary(stage: str, condition: ColumnElement[bool]) -> bool | None:
        who = f"policy:{drain.queue}.yaml@{drain.config.sha}"
        tried = replay_now(drain, stage, condition, who=who, saw="one that is held", deadline=deadline)
        ran.extend(tried)
        for one in tried:
            drain.note(stage, str(one), level="info" if one.ended == "done" else "warning", **one.data())
        return any(one.ended == "done" and one.tally.confirmed for one in tried)

    while time.monotonic() < deadline:
        rounds += 1
        took = Intake(drain).run(deadline - time.monotonic())
        taken += took.taken
        assign(drain, canary)
        _settle_late(drain, deadline)
        with drain.ledger.read() as tx:
            waiting = tx.execute(
                select(func.count()).select_from(entry).where(planning.ready(drain))
            ).scalar_one()
        done = []
        if waiting or planning.unfinished(drain, stage):
            done = replay_now(
                drain,
                stage,
                planning.ready(drain),
                who=f"policy:{drain.queue}.yaml@{drain.config.sha}",
                saw="what is ready after fixes",
                deadline=deadline,
                progress=progress,
            )
        ran.extend(done)
        for one in done:
            drain.note(stage, str(one), level="info" if one.ended == "done" else "warning", **one.data())
        if any(one.ended not in ("done", "deadline") for one in done):
            why = f"a replay stopped: {next(one.ended for one in done if one.ended != 'done').replace('_', ' ')}"
            break
        if not done and took.reached and drain.depth().entries == 0:
            why = "the queue is empty and nothing is ready"
            break
    planning.block_by_key(drain)
    depth, outstanding = drain.depth().entries, 0
    outstanding = depth + drain.unsettled()
    queued = expiry.in_queue(drain.source, drain.positions()) if depth else None
    dies = f"; {words}" if (words := expiry.said(queued, None)) else ""
    data: dict[str, Any] = {
        "rounds": rounds,
        "taken": taken,
        "replayed": sum(r.sent for r in ran),
        "confirmed": sum(r.tally.confirmed for r in ran),
        "returned": sum(r.tally.returned for r in ran),
        "depth": depth,
        "outstanding": outstanding,
        "why_stopped": why,
    }
    drain.note(
        stage,
        f"{rounds} round(s): {taken} taken, {data['replayed']} replayed; depth {depth}, outstanding "
        f"{outstanding}; {why}{dies}",
        **data,
    )
    return data


def _settle_late(drain: Drain, deadline: float) -> None:
    """Outcomes that were not known when their job ended."""
    with drain.ledger.read() as tx:
        late = select(entry.c.job).where(entry.c.queue == drain.queue, entry.c.state == "replayed").distinct()
        jobs = ledger.find(tx, job.c.id.in_(late))
    if jobs:
        outcomes = Outcomes(drain)
        for one in jobs:
            try:
                outcomes.look(one.id, one.target, 0, one.cursor, deadline)
            except NotFound as gone:  # nobody will ever tell; what was sent stays unconfirmed
                drain.note("drain_remaining", str(gone), level="warning")
        with drain.ledger.write(drain.queue, drain.epoch) as tx:
            duplicates.settle(tx, drain.queue, drain.id)


def ready_now(drain: Drain, condition: ColumnElement[bool], reason: str) -> int:
    """Free entries that waited: they are ready for the next replay."""
    with drain.ledger.write(drain.queue, drain.epoch) as tx:
        ids = select(entry.c.id).where(and_(entry.c.queue == drain.queue, entry.c.state == "open", condition))
        return int(tx.execute(update(entry).where(entry.c.id.in_(ids)).values(reason=reason)).rowcount)
