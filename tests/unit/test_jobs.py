"""A job's run: whatever it is killed by, wherever it sleeps, each entry has its effect at most once."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from tests.memory_rig import TOPIC, Killed, MemoryRig, Sleeper, Tripwire, failure, wire

from dlq import clock, outbox, plan
from dlq.drain import Drain
from dlq.errors import Fenced, Refused, TargetError
from dlq.jobs import CursorLost, JobRun
from dlq.ledger import jobs as ledger
from dlq.ledger.jobs import PlanStale
from dlq.opening import finish_earlier
from dlq.ports import Output
from dlq.replay import drain_remaining
from dlq.targets.memory import MemoryWriter
from dlq.triage import assign

Make = Callable[..., MemoryRig]
FOREVER = 1e12


def plan_all(drain: Drain, **how: Any) -> ledger.Job:
    """All that is ready as one job, approved."""
    jobs = plan.make(
        drain, "retry_transient", plan.ready(drain), who="policy", saw="a test", **{"canary": False, **how}
    )
    return jobs[0]


@pytest.fixture
def ready(queue: MemoryRig) -> tuple[MemoryRig, Drain, ledger.Job]:
    """A job of ten entries that has not begun."""
    drain = queue.taken(10)
    return queue, drain, plan_all(drain)


def finish(queue: MemoryRig, drain: Drain, job: str, *, records: int = 3) -> None:
    """Run a job to its end, as a retry does."""
    if queue.one("SELECT state FROM job WHERE id = :j", j=job) == "closed":
        return
    with JobRun(drain, job, records=records) as run:
        run.send(run.job.size, FOREVER)
        run.close("done", "ready")
    queue.check()


def order(queue: MemoryRig) -> list[int]:
    return sorted(int(dict(r.headers)["dlq-ordinal"] or b"") for r in queue.delivered())


def cursor(queue: MemoryRig, job: str) -> Any:
    return queue.topics.cursors.get(job, (None,))[0]


# What it does


def test_a_job_sends_each_entry_once_and_keeps_where_it_went(
    ready: tuple[MemoryRig, Drain, ledger.Job],
) -> None:
    queue, drain, job = ready
    finish(queue, drain, job.id)
    assert order(queue) == list(range(10))
    assert queue.states() == {"replayed": 10}
    places = {(r.part, r.pos) for r in queue.delivered()}
    assert {(p, o) for p, o in queue.rows("SELECT part, pos FROM delivery")} == places
    assert queue.one("SELECT state, cursor, ended FROM job") == ("closed", 10, "done")


def test_a_replayed_record_is_the_original_with_our_headers_for_those_of_earlier_hops(
    queue: MemoryRig,
) -> None:
    own = (("tenant", b"t"), ("correlation-id", b"c"), ("tenant", b"again"), ("null", None))
    queue.put(
        1,
        key=b"\xff",
        value=b"\x00\x80",
        headers=(*own, *failure(1), ("dlq-job", b"an earlier one"), ("dlq-key", b"x")),
    )
    drain = queue.taken()
    job = plan_all(drain)
    finish(queue, drain, job.id)
    (record,) = queue.delivered()
    assert (record.key, record.value) == (b"\xff", b"\x00\x80")
    assert record.timestamp_ms == queue.log.read(0, 0, 1)[0].timestamp_ms
    ours = {name: value for name, value in record.headers if name.startswith("dlq-")}
    theirs = tuple(h for h in record.headers if not h[0].startswith("dlq-"))
    assert theirs == (*own, ("correlation-id", b"c-1"))
    assert not any(name.startswith("wf-") for name, _ in record.headers)
    assert ours == {
        "dlq-drain": drain.id.encode(),
        "dlq-group": b"workers",
        "dlq-job": job.id.encode(),
        "dlq-ordinal": b"0",
        "dlq-entry": f"{drain.source.uri}/0/0".encode(),
        "dlq-key": queue.one("SELECT idem_key FROM job_entry").encode(),
        "dlq-retry-count": b"1",
        "dlq-original-timestamp": b"%d" % (record.timestamp_ms or 0),
    }


def test_a_job_goes_on_step_by_step(ready: tuple[MemoryRig, Drain, ledger.Job]) -> None:
    queue, drain, job = ready
    with JobRun(drain, job.id, records=3) as run:
        assert run.send(1, FOREVER) == 1
        assert order(queue) == [0]
        assert run.send(6, FOREVER) == 6
        assert order(queue) == list(range(6))
        assert run.send(99, FOREVER) == 10
    assert queue.states() == {"replayed": 10}


def test_after_the_deadline_nothing_more_is_sent(ready: tuple[MemoryRig, Drain, ledger.Job]) -> None:
    queue, drain, job = ready
    with JobRun(drain, job.id) as run:
        assert run.send(10, time.monotonic() - 1) == 0
        assert queue.delivered() == []


def test_a_pause_holds_between_transactions(
    ready: tuple[MemoryRig, Drain, ledger.Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    queue, drain, job = ready
    commit = MemoryWriter.commit

    def and_pause(self: MemoryWriter, at: int) -> Any:
        done = commit(self, at)
        if at == 3:
            queue.write("UPDATE queue SET paused_by = 'somebody'")
        return done

    monkeypatch.setattr(MemoryWriter, "commit", and_pause)
    with JobRun(drain, job.id, records=3) as run:
        assert run.send(10, FOREVER) == 3
        assert run.send(10, FOREVER) == 3
        queue.write("UPDATE queue SET paused_by = NULL")
        assert run.send(10, FOREVER) == 10


def test_transactions_are_bounded_in_records_and_bytes(
    queue: MemoryRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "MAX_BYTES", 1_000)
    sizes: list[tuple[int, int]] = []
    produce = MemoryWriter.produce

    def count(self: MemoryWriter, outputs: list[Output]) -> None:
        sizes.append((len(outputs), sum(len(o.value or b"") for o in outputs)))
        produce(self, outputs)

    for size in (300, 300, 300, 5_000, 10, 10, 10, 10, 990, 990):
        queue.put(1, value=b"x" * size)
    drain = queue.taken()
    job = plan_all(drain)
    monkeypatch.setattr(MemoryWriter, "produce", count)
    finish(queue, drain, job.id, records=4)
    assert order(queue) == list(range(10))
    for records, size in sizes:
        assert records <= 4
        assert size <= 1_000 or records == 1


# Killed


def test_killed_at_any_step_the_retry_sends_the_rest_and_nothing_twice(make_queue: Make) -> None:
    at = random.randrange(2)  # every other step, the rest another time
    before_commit = after_commit = 0
    killed = True
    while killed:
        queue = make_queue()
        queue.begin()
        drain = queue.taken(10)
        job = plan_all(drain)
        try:
            with JobRun(wire(drain, Tripwire(at)), job.id, records=3) as run:
                run.send(10, FOREVER)
                run.close("done", "ready")
            killed = False
        except Killed:
            done = cursor(queue, job.id)
            before_commit += done == 0
            settled = queue.states().get("replayed", 0)
            after_commit += bool(done and done > settled)
            finish(queue, queue.attach(), job.id)
        assert order(queue) == list(range(10)), f"killed at step {at}"
        assert queue.one("SELECT COUNT(*) FROM delivery") == 10, f"killed at step {at}"
        queue.check()
        at += 2
    assert at > 30
    assert before_commit, "no kill came before the first commit"
    assert after_commit, "no kill came between a commit and its settling"


def test_killed_at_any_step_the_next_drain_closes_the_job_and_replays_the_rest(make_queue: Make) -> None:
    at, killed = random.randrange(4), True  # every fourth step, others another time
    while killed:
        queue = make_queue()
        queue.begin()
        drain = queue.taken(6)
        job = plan_all(drain)
        try:
            with JobRun(wire(drain, Tripwire(at)), job.id, records=2) as run:
                run.send(6, FOREVER)
                run.close("done", "ready")
            killed = False
        except Killed:
            pass
        queue.expire_lease()
        second = queue.open("r2")
        assert queue.one("SELECT state FROM job WHERE id = :j", j=job.id) == "closed"
        queue.check()
        sent = len(queue.delivered())
        assign(second)
        assert queue.states().get("open", 0) == 6 - sent
        if sent < 6:
            finish(queue, second, plan_all(second).id)
        assert len(queue.delivered()) == 6, f"killed at step {at}"
        queue.check()
        at += 4


def test_killed_twice_in_a_row_it_still_comes_out_right(make_queue: Make) -> None:
    for first in range(12, 40, 7):
        for second in range(4, 30, 7):
            queue = make_queue()
            queue.begin()
            drain = queue.taken(6)
            job = plan_all(drain)
            for at in (first, second):
                try:
                    with JobRun(wire(queue.attach(), Tripwire(at)), job.id, records=2) as run:
                        run.send(6, FOREVER)
                except Killed:
                    pass
            finish(queue, queue.attach(), job.id)
            assert len(queue.delivered()) == 6, f"killed at steps {first} and {second}"


def test_a_commit_in_doubt_is_looked_up(
    ready: tuple[MemoryRig, Drain, ledger.Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer of a commit is lost, once after it was done and once before: the cursor says which."""
    queue, drain, job = ready
    monkeypatch.setattr(time, "sleep", lambda _s: None)
    commit = MemoryWriter.commit
    lost = {3: "after", 6: "before"}

    def answer(self: MemoryWriter, at: int) -> Any:
        how = lost.pop(at, None)
        if how == "before":
            raise TargetError("no answer")
        done = commit(self, at)
        if how == "after":
            raise TargetError("no answer")
        return done

    monkeypatch.setattr(MemoryWriter, "commit", answer)
    finish(queue, drain, job.id)
    assert lost == {}
    assert order(queue) == list(range(10))
    assert queue.one("SELECT COUNT(*) FROM delivery") == 10


def test_a_target_that_does_not_come_back_ends_the_try(
    ready: tuple[MemoryRig, Drain, ledger.Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    queue, drain, job = ready
    monkeypatch.setattr(time, "sleep", lambda _s: None)
    with monkeypatch.context() as patch:
        patch.setattr(MemoryWriter, "produce", lambda *_: (_ for _ in ()).throw(TargetError("down")))
        queue.topics.cursors[job.id] = (0, about(queue, job))  # it began before
        with JobRun(drain, job.id) as run, pytest.raises(TargetError, match="down"):
            run.send(10, FOREVER)
    assert queue.states() == {"planned": 10}
    finish(queue, queue.attach(), job.id)


def about(queue: MemoryRig, job: ledger.Job) -> str:
    """The metadata of a job's cursor."""
    return json.dumps({"ledger": queue.ledger.id, "plan": job.plan_hash[:16], "size": job.size})


# What can't be sent


@pytest.mark.parametrize("bad", [{0}, {9}, {4}, {3, 4}, {0, 5, 9}, set(range(10))])
def test_what_can_never_be_produced_is_left_out_and_the_rest_is_sent(
    ready: tuple[MemoryRig, Drain, ledger.Job], bad: set[int]
) -> None:
    queue, drain, job = ready
    queue.topics.unproducible = lambda o: "too_large_for_the_target" if o.ordinal in bad else None
    with JobRun(drain, job.id, records=4) as run:
        assert run.send(10, FOREVER) == 10
        assert run.skipped == len(bad)
        run.close("done", "ready")
    assert order(queue) == [n for n in range(10) if n not in bad]
    assert queue.reasons() == {"too_large_for_the_target": len(bad)}
    queue.check()


def test_a_skip_is_written_down_before_the_cursor_passes_it(make_queue: Make) -> None:
    """Killed anywhere: what was left out is never settled as sent."""
    at, killed = random.randrange(6), True  # every sixth step, others another time
    while killed:
        queue = make_queue()
        queue.begin()
        queue.topics.unproducible = lambda o: "too_large" if o.ordinal in (1, 4) else None
        drain = queue.taken(6)
        job = plan_all(drain)
        try:
            with JobRun(wire(drain, Tripwire(at)), job.id, records=3) as run:
                run.send(6, FOREVER)
                run.close("done", "ready")
            killed = False
        except Killed:
            finish(queue, queue.attach(), job.id)
        assert order(queue) == [0, 2, 3, 5], f"killed at step {at}"
        assert queue.states() == {"replayed": 4, "open": 2}, f"killed at step {at}"
        queue.check()
        at += 6


def test_ordered_by_key_what_follows_an_unproducible_entry_waits(make_queue: Make) -> None:
    queue = make_queue(ordering="per_key", partitions=1)
    queue.begin()
    for key in (b"a", b"b", b"a", b"b", b"a", b"c"):
        queue.put(1, key=key)
    queue.topics.unproducible = lambda o: "too_large" if o.ordinal == 2 else None
    drain = queue.taken()
    job = plan_all(drain)
    finish(queue, drain, job.id)
    assert order(queue) == [0, 1, 3, 5]
    assert queue.reasons() == {"too_large": 1, "earlier_entry_of_key": 1}


def test_an_entry_whose_archived_bytes_changed_is_left_out(
    ready: tuple[MemoryRig, Drain, ledger.Job],
) -> None:
    queue, drain, job = ready
    queue.write("DROP TRIGGER job_entry_keep")
    queue.write("UPDATE job_entry SET payload_sha = 'another' WHERE ordinal = 4")
    finish(queue, drain, job.id)
    assert order(queue) == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    assert queue.reasons() == {"archive_broken": 1}


def test_a_missing_segment_leaves_out_its_entries_and_says_so(
    ready: tuple[MemoryRig, Drain, ledger.Job],
) -> None:
    queue, drain, job = ready
    (uri,) = [u for (u,) in queue.rows("SELECT uri FROM segment")]
    (drain.archive.root / uri).unlink()
    finish(queue, drain, job.id)
    assert queue.delivered() == []
    assert queue.reasons() == {"archive_broken": 10}
    assert any(uri in text for (text,) in queue.rows("SELECT text FROM event WHERE level = 'error'"))


# The cursor


def test_a_cursor_that_is_gone_puts_what_was_planned_in_doubt(
    ready: tuple[MemoryRig, Drain, ledger.Job],
) -> None:
    queue, drain, job = ready
    with JobRun(drain, job.id) as run:
        run.send(4, FOREVER)
    queue.topics.cursors.clear()
    with pytest.raises(CursorLost, match="6 entries are in doubt"):
        JobRun(queue.attach(), job.id).__enter__()
    assert queue.states() == {"replayed": 4, "ambiguous": 6}
    assert len(queue.delivered()) == 4
    queue.check()


def test_a_cursor_that_went_back_is_no_cursor(ready: tuple[MemoryRig, Drain, ledger.Job]) -> None:
    """Somebody reset the group's offset: how far it had really come nobody knows."""
    queue, drain, job = ready
    with JobRun(drain, job.id) as run:
        run.send(4, FOREVER)
    queue.topics.cursors[job.id] = (2, about(queue, job))
    with pytest.raises(CursorLost, match="went back"):
        JobRun(queue.attach(), job.id).__enter__()
    assert queue.states() == {"replayed": 4, "ambiguous": 6}


def test_a_cursor_of_another_ledgers_job_settles_nothing(ready: tuple[MemoryRig, Drain, ledger.Job]) -> None:
    """A ledger that was lost had a job of this name: its cursor says nothing of these entries."""
    queue, drain, job = ready
    queue.topics.cursors[job.id] = (10, '{"ledger": "a lost one"}')
    with pytest.raises(Refused):
        JobRun(drain, job.id).__enter__()
    assert queue.states() == {"open": 10}
    assert queue.reasons() == {"ready": 10}
    assert queue.delivered() == []
    finish(queue, drain, plan_all(drain).id)
    assert len(queue.delivered()) == 10


def test_a_running_job_whose_cursor_became_another_ledgers_is_in_doubt(
    ready: tuple[MemoryRig, Drain, ledger.Job],
) -> None:
    queue, drain, job = ready
    with JobRun(drain, job.id) as run:
        run.send(4, FOREVER)
    queue.topics.cursors[job.id] = (10, '{"ledger": "another"}')
    with pytest.raises(CursorLost):
        JobRun(queue.attach(), job.id).__enter__()
    assert queue.states() == {"replayed": 4, "ambiguous": 6}


# Others


def sleepers(make_queue: Make, meanwhile: Callable[[MemoryRig, ledger.Job, list[Drain]], None]) -> int:
    """Have a job's writer fall asleep at each of its steps in turn, and wake after ``meanwhile``; returns how many."""
    at, slept = random.randrange(4) - 2, True  # every fourth step, others another time
    while slept:
        at += 4
        queue = make_queue()
        queue.begin()
        drain = queue.taken(6)
        job = plan_all(drain)
        others: list[Drain] = []
        sleeper = Sleeper(at, lambda queue=queue, job=job, others=others: meanwhile(queue, job, others))  # type: ignore[misc]
        try:
            with JobRun(wire(drain, sleeper, within=False), job.id, records=2) as run:
                run.send(6, FOREVER)
                run.close("deadline", "ready")
        except Fenced:
            pass
        slept = sleeper.slept
        if not slept:
            break
        last = others[-1]
        for left in plan.unfinished(last, "retry_transient"):
            finish(queue, last, left.id)
        assign(last)
        while queue.states().get("open"):
            finish(queue, last, plan_all(last).id)
        effects = Counter(dict(r.headers)["dlq-entry"] for r in queue.delivered())
        assert len(effects) == 6, f"slept at step {at}"
        assert set(effects.values()) == {1}, f"slept at step {at}"
        queue.check()
    return at


def test_a_writer_that_sleeps_while_a_newer_drain_closes_its_job_sends_nothing_more(make_queue: Make) -> None:
    def take_over(queue: MemoryRig, job: ledger.Job, others: list[Drain]) -> None:
        queue.expire_lease()
        others.append(queue.open("r2"))

    assert sleepers(make_queue, take_over) > 20


def test_a_writer_that_sleeps_while_a_newer_drain_replays_the_rest_sends_nothing_more(
    make_queue: Make,
) -> None:
    def take_over(queue: MemoryRig, job: ledger.Job, others: list[Drain]) -> None:
        queue.expire_lease()
        others.append(queue.open("r2"))
        assign(others[0])
        if queue.states().get("open"):
            finish(queue, others[0], plan_all(others[0]).id)

    assert sleepers(make_queue, take_over) > 20


def test_a_writer_that_sleeps_while_its_retry_goes_on_sends_nothing_more(make_queue: Make) -> None:
    def retry(queue: MemoryRig, job: ledger.Job, others: list[Drain]) -> None:
        others.append(queue.attach())
        with JobRun(others[0], job.id, records=2) as run:
            run.send(4, FOREVER)

    assert sleepers(make_queue, retry) > 20


def test_a_writer_that_sleeps_through_its_retry_cannot_close_the_job(make_queue: Make) -> None:
    def retry(queue: MemoryRig, job: ledger.Job, others: list[Drain]) -> None:
        others.append(queue.attach())
        run = JobRun(others[0], job.id, records=2)
        run.__enter__()
        run.send(2, FOREVER)
        others[0].__dict__["still running"] = run

    assert sleepers(make_queue, retry) > 20


def test_a_job_that_was_closed_is_never_written_again(ready: tuple[MemoryRig, Drain, ledger.Job]) -> None:
    queue, drain, job = ready
    late = JobRun(drain, job.id)
    finish(queue, queue.attach(), job.id)
    with pytest.raises(Fenced, match="closed"):
        late.__enter__()
    assert order(queue) == list(range(10))


def test_a_job_that_was_settled_by_another_goes_on_from_there(
    ready: tuple[MemoryRig, Drain, ledger.Job],
) -> None:
    queue, drain, job = ready
    with JobRun(queue.attach(), job.id) as run:
        run.send(4, FOREVER)
    with JobRun(drain, job.id) as run:
        assert run.cursor == 4
        run.send(10, FOREVER)
    assert order(queue) == list(range(10))


# Approvals, and what is left of a job


def test_an_approval_that_expired_before_the_job_began_starts_nothing(
    ready: tuple[MemoryRig, Drain, ledger.Job],
) -> None:
    queue, drain, job = ready
    queue.write("UPDATE plan SET expires_at = :t", t=clock.after(-1))
    with pytest.raises(PlanStale):
        JobRun(drain, job.id).__enter__()
    assert queue.delivered() == []
    assert queue.reasons() == {"approval_expired": 10}


def test_an_approval_that_expires_in_mid_job_lets_it_go_on(
    ready: tuple[MemoryRig, Drain, ledger.Job],
) -> None:
    queue, drain, job = ready
    with JobRun(drain, job.id) as run:
        run.send(4, FOREVER)
    queue.write("UPDATE plan SET expires_at = :t", t=clock.after(-1))
    finish(queue, queue.attach(), job.id)
    assert order(queue) == list(range(10))


@pytest.mark.parametrize("began", [False, True])
def test_the_next_drain_opens_again_what_a_job_left(
    ready: tuple[MemoryRig, Drain, ledger.Job], began: bool
) -> None:
    queue, drain, job = ready
    if began:
        with JobRun(drain, job.id) as run:
            run.send(4, FOREVER)
    queue.release(drain)
    queue.open("r2")
    assert queue.states() == ({"replayed": 4, "open": 6} if began else {"open": 10})
    assert queue.one("SELECT state FROM job") == "closed"
    queue.check()


def test_a_drain_opened_again_opens_again_what_its_own_jobs_left(
    ready: tuple[MemoryRig, Drain, ledger.Job],
) -> None:
    """Cleared in the UI it decides anew: nobody would ever look for what its earlier life had planned."""
    queue, drain, job = ready
    with JobRun(drain, job.id) as run:
        run.send(4, FOREVER)
    again = queue.open()
    assert again.id == drain.id
    assert queue.states() == {"replayed": 4, "open": 6}
    queue.check()


@pytest.mark.parametrize("what", ["cursor gone", "approval expired", "another's cursor"])
def test_a_job_that_can_not_be_finished_does_not_keep_the_queue_from_opening(
    ready: tuple[MemoryRig, Drain, ledger.Job], what: str
) -> None:
    queue, drain, job = ready
    if what == "cursor gone":
        with JobRun(drain, job.id) as run:
            run.send(4, FOREVER)
        queue.topics.cursors.clear()
    elif what == "approval expired":
        queue.write("UPDATE plan SET expires_at = :t", t=clock.after(-1))
    else:
        queue.topics.cursors[job.id] = (10, '{"ledger": "a lost one"}')
    queue.release(drain)
    second = queue.open("r2")
    assert queue.one("SELECT state FROM job") == "closed"
    assert "planned" not in queue.states()
    assert queue.rows("SELECT 1 FROM event WHERE drain = :d AND level = 'error'", d=second.id)
    queue.check()


@pytest.mark.parametrize(
    ("stage", "rest"), [("review:work 1", "waiting_for_person"), ("retry_transient", "ready")]
)
def test_what_a_person_let_go_is_theirs_again_when_the_job_is_left(
    queue: MemoryRig, stage: str, rest: str
) -> None:
    """Their approval was for that plan: policy does not send the rest of it."""
    drain = queue.taken(5)
    plan.make(drain, stage, plan.ready(drain), who="person", saw="s", canary=False)
    queue.release(drain)
    second = queue.open("r2")
    assert queue.reasons() == {rest: 5}
    assign(second)
    assert queue.reasons() == {rest: 5}


def test_proposed_plans_of_earlier_drains_are_withdrawn(queue: MemoryRig) -> None:
    drain = queue.taken(5)
    from dlq.ledger.jobs import Cut

    lines = list(plan.by_id(drain, [plan.ready(drain)]))
    ledger.propose(
        drain.ledger,
        drain.queue,
        drain.epoch,
        drain.id,
        "retry_transient",
        [Cut(TOPIC, lines)],
        expires_s=600,
    )
    queue.release(drain)
    second = queue.open("r2")
    finish_earlier(second)
    assert queue.one("SELECT state, ended FROM job") == ("closed", "withdrawn")
    assert queue.states() == {"open": 5}


def without_the_target(queue: MemoryRig) -> None:
    """The topic is deleted, and the queue's file names another."""
    del queue.topics.topics[TOPIC]
    queue.topics.cursors.clear()
    queue.topics.create("orders.retry")
    target = queue.config.target.model_copy(update={"allow": ("orders.retry",)})
    queue.config = queue.config.model_copy(update={"target": target})


def test_a_running_job_whose_target_is_gone_is_in_doubt_and_blocks_no_opening(queue: MemoryRig) -> None:
    drain = queue.taken(5)
    (job,) = plan.make(drain, "retry_transient", plan.ready(drain), who="p", saw="s", canary=False)
    with JobRun(drain, job.id) as run:
        run.send(2, FOREVER)
    queue.release(drain)
    without_the_target(queue)
    queue.open("r2")
    assert queue.states() == {"replayed": 2, "ambiguous": 3}


def test_a_job_that_never_began_and_whose_target_is_gone_lets_its_entries_go(queue: MemoryRig) -> None:
    drain = queue.taken(5)
    plan.make(drain, "retry_transient", plan.ready(drain), who="p", saw="s", canary=False)
    queue.release(drain)
    without_the_target(queue)
    queue.open("r2")
    assert queue.reasons() == {"target_gone": 5}


def test_replays_to_a_target_that_is_gone_stay_unconfirmed_and_stop_no_drain(queue: MemoryRig) -> None:
    drain = queue.taken(5)
    (job,) = plan.make(drain, "retry_transient", plan.ready(drain), who="p", saw="s", canary=False)
    with JobRun(drain, job.id) as run:
        run.send(5, FOREVER)
        run.close("done", "ready")
    queue.release(drain)
    without_the_target(queue)
    second = queue.open("r2")
    assert drain_remaining(second, 10)["rounds"] == 1
    assert queue.states() == {"replayed": 5}
