"""Canary, ramp, rounds: each step gated by the outcome of the one before; killed anywhere, nothing is sent twice."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tests.memory_rig import TOPIC, Killed, MemoryRig, Tripwire, wire

from dlq import plan, replay
from dlq.drain import Drain, dry
from dlq.entry import Record
from dlq.errors import Fenced, Refused
from dlq.intake import take_custody
from dlq.jobs import JobRun
from dlq.ledger import jobs as ledger
from dlq.ports import Connection
from dlq.replay import drain_remaining, replay_batches, replay_canary, run_job
from dlq.triage import assign, categorize

Make = Callable[..., MemoryRig]
STAGE = "retry_transient"


def ordinals(queue: MemoryRig) -> list[int]:
    return [int(dict(r.headers)["dlq-ordinal"] or b"") for r in queue.delivered()]


def effects(queue: MemoryRig) -> Counter[bytes | None]:
    """How often each entry came to the target."""
    return Counter(dict(r.headers)["dlq-entry"] for r in queue.delivered())


def fails(*endings: bytes) -> Callable[[Record], bool]:
    return lambda r: (r.value or b"").endswith(endings)


@pytest.fixture
def steps(queue: MemoryRig, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many entries each call to send asked for."""
    sizes: list[int] = []
    send = JobRun.send

    def count(self: JobRun, until: int, deadline: float) -> int:
        sizes.append(until - self.cursor)
        return send(self, until, deadline)

    monkeypatch.setattr(JobRun, "send", count)
    return sizes


# One job


def test_a_canary_then_batches_that_double(queue: MemoryRig, steps: list[int]) -> None:
    queue.consumer()
    drain = queue.taken(26 + 100 + 200 + 400)
    said = replay_canary(drain, STAGE, 60)
    assert (said["passed"], said["gate"], len(said["jobs"])) == (True, 1.0, 1)
    assert steps == [1, 5, 20]
    done = replay_batches(drain, said["jobs"][0], 60)
    assert steps[3:] == [100, 200, 400]
    assert (done["sent"], done["confirmed"], done["ended"]) == (700, 700, "done")
    assert queue.states() == {"confirmed": 726}
    queue.check()


def test_a_burst_of_returns_stops_a_job_in_the_middle_of_a_step(make_queue: Make) -> None:
    queue = make_queue(limits={"batch": 5_000})
    queue.begin()
    drain = queue.taken(5_200)
    (job,) = plan.make(drain, STAGE, plan.ready(drain), who="w", saw="s", canary=False)
    queue.consumer(lambda _: True)
    done = replay_batches(drain, job.id, 60)
    assert (done["sent"], done["returned"], done["ended"]) == (500, 500, "burst_of_returns")
    assert queue.reasons() == {"gate_failed": 4_700, "returned": 500}
    assert "stopped: burst of returns" in queue.one("SELECT text FROM event WHERE stage = 'replay_batches'")
    queue.check()


def test_a_few_returns_in_the_middle_of_a_step_are_its_gates_to_judge(make_queue: Make) -> None:
    queue = make_queue(limits={"batch": 1_000})
    queue.begin()
    drain = queue.taken(1_000)
    (job,) = plan.make(drain, STAGE, plan.ready(drain), who="w", saw="s", canary=False)
    queue.consumer(fails(b"3", b"7"))
    done = replay_batches(drain, job.id, 60)
    assert (done["sent"], done["confirmed"], done["returned"]) == (1_000, 800, 200)
    queue.check()


def test_consumers_that_lag_are_sent_no_more_than_the_bound_and_the_next_drain_goes_on(
    make_queue: Make,
) -> None:
    queue = make_queue(limits={"batch": 1_000, "lag": 100}, outcome={"deadline": "50ms", "grace": 0})
    queue.begin()
    queue.topics.positions[TOPIC] = {0: 0, 1: 0}
    drain = queue.taken(400)
    (job,) = plan.make(drain, STAGE, plan.ready(drain), who="w", saw="s", canary=False)
    done = replay_batches(drain, job.id, 60)
    assert (done["sent"], done["ended"]) == (100, "consumers_lag")
    assert queue.reasons() == {"consumers_lag": 300}
    said = queue.one("SELECT text FROM event WHERE stage = 'replay'")
    assert said == f"the consumers of {TOPIC} are 102 behind, limits.lag is 100", (
        "a marker in each partition counts"
    )
    queue.release(drain)
    queue.consumer()
    drain_remaining(queue.taken(run="r2"), 60)
    assert queue.states() == {"confirmed": 400}
    queue.check()


def test_a_job_is_not_sent_where_the_guard_forbids_it_whoever_planned_it(queue: MemoryRig) -> None:
    queue.consumer()
    drain = queue.taken(30)
    (job,) = plan.make(drain, STAGE, plan.ready(drain), who="w", saw="s", canary=False)
    drain.note("guard_data_loss", "over", next="invoke_dr_plan")
    with pytest.raises(Refused, match=r"job .* is not sent: more is outstanding than limits\.dr"):
        run_job(drain, job.id, time.monotonic() + 60)
    assert queue.delivered() == []
    drain.note("approve_dr", "yes", choice="Approve")
    assert run_job(drain, job.id, time.monotonic() + 60).sent == 30
    queue.check()


def test_each_step_waits_for_the_outcome_of_the_one_before(queue: MemoryRig) -> None:
    sent_when_asked: list[int] = []

    def live() -> None:
        sent_when_asked.append(len(queue.delivered()))
        queue.consume()

    queue.topics.live = live
    replay_canary(queue.taken(26), STAGE, 60)
    assert sorted(set(sent_when_asked)) == [0, 1, 6, 26]


def test_a_failing_canary_stops_and_its_plan_goes_no_further(queue: MemoryRig) -> None:
    queue.consumer(lambda _: True)
    drain = queue.taken(100)
    said = replay_canary(drain, STAGE, 60)
    assert (said["passed"], said["gate"], said["jobs"]) == (False, 0.0, [])
    assert len(queue.delivered()) == 1
    assert queue.states() == {"returned": 1, "open": 100}
    assert queue.reasons() == {"gate_failed": 25, "canary_failed": 74, "returned": 1}
    queue.check()


def test_one_failing_entry_of_a_canary_step_is_enough(queue: MemoryRig) -> None:
    drain = queue.taken(100)
    first = queue.log.read(0, 0, 5)
    queue.consumer(lambda r: r.value == first[3].value)
    said = replay_canary(drain, STAGE, 60)
    assert not said["passed"]
    assert len(queue.delivered()) == 6, "1, then 5"


def test_a_job_slows_down_at_the_gate_and_stops_at_the_second_miss(
    queue: MemoryRig, steps: list[int]
) -> None:
    drain = queue.taken(400, part=0)
    (job,) = plan.make(drain, STAGE, plan.ready(drain), who="w", saw="s", canary=False)
    queue.consumer(fails(b"3"))
    done = replay_batches(drain, job.id, 60)
    assert steps == [100, 50]
    assert done["ended"] == "gate_failed"
    assert queue.reasons() == {"gate_failed": 250, "returned": 15}
    queue.check()


def test_a_burst_of_returns_stops_the_first_step(queue: MemoryRig) -> None:
    drain = queue.taken(300)
    (job,) = plan.make(drain, STAGE, plan.ready(drain), who="w", saw="s", canary=False)
    queue.consumer(lambda _: True)
    assert replay_batches(drain, job.id, 60)["ended"] == "gate_failed"
    assert len(queue.delivered()) == 100
    assert queue.reasons() == {"gate_failed": 200, "returned": 100}


def test_without_an_outcome_nothing_more_is_sent(make_queue: Make) -> None:
    queue = make_queue(outcome={"deadline": "100ms", "grace": 0})
    queue.begin()
    queue.topics.positions[TOPIC] = {0: 0, 1: 0}
    drain = queue.taken(50)
    said = replay_canary(drain, STAGE, 60)
    assert not said["passed"]
    assert len(queue.delivered()) == 1
    assert queue.reasons() == {"outcome_unknown": 49}
    assert queue.states() == {"replayed": 1, "open": 49}


def test_where_nobody_consumes_the_target_nothing_is_sent(queue: MemoryRig) -> None:
    drain = queue.taken(50)
    said = replay_canary(drain, STAGE, 60)
    assert not said["passed"]
    assert queue.delivered() == []
    assert queue.reasons() == {"nobody_consumes": 50}


def test_at_the_deadline_the_rest_is_ready_for_the_next_stage(queue: MemoryRig) -> None:
    queue.consumer()
    drain = queue.taken(150)
    (job,) = plan.make(drain, STAGE, plan.ready(drain), who="w", saw="s", canary=False)
    now = time.monotonic()
    send = JobRun.send

    def slow(self: JobRun, until: int, deadline: float) -> int:
        sent = send(self, until, deadline)
        time.sleep(max(0.0, now + 0.5 - time.monotonic()))
        return sent

    JobRun.send = slow  # type: ignore[method-assign]
    try:
        ran = run_job(drain, job.id, now + 0.4)
    finally:
        JobRun.send = send  # type: ignore[method-assign]
    assert ran.ended == "deadline"
    assert queue.reasons() == {"ready": 50}


def test_a_paused_queue_ends_the_job_and_says_so(queue: MemoryRig) -> None:
    queue.consumer()
    drain = queue.taken(50)
    queue.write("UPDATE queue SET paused_by = 'somebody'")
    said = replay_canary(drain, STAGE, 60)
    assert not said["passed"]
    assert queue.delivered() == []
    assert queue.reasons() == {"ready": 50}


def test_a_job_of_which_all_was_left_out_is_done(queue: MemoryRig) -> None:
    queue.consumer()
    queue.topics.unproducible = lambda _o: "too_large"
    drain = queue.taken(10)
    said = replay_canary(drain, STAGE, 60)
    assert said["passed"]
    assert queue.reasons() == {"too_large": 10}
    assert queue.one("SELECT state, ended, cursor FROM job") == ("closed", "done", 10)


def test_a_closed_job_says_again_how_it_ended(queue: MemoryRig) -> None:
    queue.consumer(lambda _: True)
    drain = queue.taken(5)
    (job,) = plan.make(drain, STAGE, plan.ready(drain), who="w", saw="s", canary=False)
    first = run_job(drain, job.id, 1e12)
    again = run_job(queue.attach(), job.id, 1e12)
    assert (again.ended, again.tally, again.sent) == (first.ended, first.tally, first.sent)
    assert len(queue.delivered()) == 5


def test_twins_are_settled_with_the_job_that_sent_their_twin(queue: MemoryRig) -> None:
    queue.put(1, value=b"same", key=b"k", headers=queue_headers())
    queue.put(2, value=b"same", key=b"k", headers=queue_headers())
    queue.consumer()
    drain = queue.taken()
    assert queue.reasons() == {"ready": 1, "twin_not_sent": 2}
    replay_canary(drain, STAGE, 60)
    assert queue.states() == {"confirmed": 1, "duplicate": 2}
    assert len(queue.delivered()) == 1
    queue.check()


def queue_headers() -> Any:
    from tests.memory_rig import failure

    return failure(1, dedupe="d-1")


# Retried


def test_what_a_killed_try_sent_is_judged_before_anything_more_goes(queue: MemoryRig) -> None:
    drain = queue.taken(300)
    queue.consumer(lambda _: True)
    (job,) = plan.make(drain, STAGE, plan.ready(drain), who="w", saw="s", canary=False)
    with JobRun(drain, job.id) as run:  # killed after the first step, before its gate
        run.send(100, 1e12)
    assert run_job(queue.attach(), job.id, 1e12).ended == "gate_failed"
    assert len(queue.delivered()) == 100


def test_what_a_canary_forbade_stays_forbidden_for_its_retry(
    queue: MemoryRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the canary was closed, before the rest of the plan was."""
    queue.consumer(lambda _: True)
    drain = queue.taken(100)
    with monkeypatch.context() as patch:
        patch.setattr(replay, "_stop", lambda *_: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            replay_canary(drain, STAGE, 60)
    assert queue.states().get("planned") == 74
    said = replay_canary(queue.attach(), STAGE, 60)
    assert (said["passed"], said["jobs"]) == (False, [])
    assert len(queue.delivered()) == 1
    assert "planned" not in queue.states()


def test_a_retried_canary_hands_on_the_jobs_of_its_own_plan(queue: MemoryRig) -> None:
    queue.consumer()
    drain = queue.taken(100)
    first = replay_canary(drain, STAGE, 60)
    again = replay_canary(queue.attach(), STAGE, 60)
    assert again["jobs"] == first["jobs"]
    assert again["plan"] == first["plan"]
    assert len(queue.delivered()) == 26


def tasks(drain: Callable[[], Drain]) -> Iterator[Callable[[], Any]]:
    """The tasks of a run that replay, each attaching to the drain as a process of its own."""
    yield lambda: take_custody(drain(), 60)
    yield lambda: categorize(drain())
    jobs: list[str] = []
    yield lambda: jobs.extend(replay_canary(drain(), STAGE, 60)["jobs"])
    yield lambda: [replay_batches(drain(), job, 60) for job in dict.fromkeys(jobs)]
    yield lambda: drain_remaining(drain(), 60)


def test_a_whole_run_killed_at_any_step_of_any_task_sends_each_entry_once(make_queue: Make) -> None:
    at, killed = 3, True
    while killed:
        queue = make_queue(limits={"batch": 10, "gate": 0.5})
        queue.begin()
        queue.put(40)
        queue.consumer(fails(b" 7"))
        drain = queue.open()
        wired: list[Tripwire] = [Tripwire(at)]
        killed = False

        def attach(queue: MemoryRig = queue, wired: list[Tripwire] = wired) -> Drain:
            return wire(queue.attach(), wired[0])

        for task in tasks(attach):
            try:
                task()
            except Killed:
                killed = True
                wired[0] = Tripwire()  # the retry lives
                task()
        assert effects(queue) == Counter(dict.fromkeys(effects(queue), 1)), f"killed at step {at}"
        assert queue.states() == {"confirmed": 39, "returned": 1, "open": 1}, f"killed at step {at}"
        queue.check()
        queue.release(drain)
        at += 17
    assert at > 150


# Rounds


def test_the_rest_is_drained_until_the_queue_is_empty_and_nothing_is_ready(queue: MemoryRig) -> None:
    queue.consumer()
    drain = queue.taken(50)
    queue.put(30)
    said = drain_remaining(drain, 60)
    assert (said["taken"], said["replayed"], said["confirmed"]) == (30, 80, 80)
    assert (said["depth"], said["outstanding"]) == (0, 0)
    assert said["why_stopped"] == "the queue is empty and nothing is ready"
    queue.check()


def test_a_queue_that_grows_while_it_is_drained_is_drained_too(queue: MemoryRig) -> None:
    more = [20, 10, 5]

    def grow() -> None:
        queue.consume()
        if more:
            queue.put(more.pop(0))

    queue.topics.live = grow
    said = drain_remaining(queue.taken(50), 60)
    assert (said["replayed"], said["depth"], said["outstanding"]) == (85, 0, 0)
    queue.check()


def test_what_came_back_is_not_replayed_by_the_drain_that_sent_it(queue: MemoryRig) -> None:
    broken = [True]
    queue.consumer(lambda r: broken[0] and (r.value or b"").endswith(b"39"))
    drain = queue.taken(60)
    said = drain_remaining(drain, 60)
    assert (said["returned"], said["outstanding"]) == (1, 1)
    assert queue.reasons() == {"returned": 1}
    queue.release(drain)
    broken[0] = False
    second = queue.open("r2")
    said = drain_remaining(second, 60)
    assert (said["replayed"], said["confirmed"], said["outstanding"]) == (1, 1, 0)
    assert queue.states() == {"confirmed": 60, "returned": 1}
    queue.check()


def test_what_keeps_failing_stops_at_its_limit_and_waits_for_a_person(make_queue: Make) -> None:
    queue = make_queue(limits={"returns": 2})
    queue.begin()
    queue.consumer(lambda r: (r.value or b"").endswith(b"39"))
    queue.put(60)
    for run in range(4):
        drain = queue.open(f"r{run}")
        drain_remaining(drain, 60)
        queue.release(drain)
        queue.check()
    assert queue.reasons() == {"returns_limit": 1}
    tries = [
        n for ref, n in Counter(r.value for r in queue.delivered()).items() if (ref or b"").endswith(b"39")
    ]
    assert tries == [2]


def test_a_replay_that_stops_ends_the_rounds(queue: MemoryRig) -> None:
    queue.consumer(lambda _: True)
    said = drain_remaining(queue.taken(50), 60)
    assert "a replay stopped: gate failed" in said["why_stopped"]
    assert len(queue.delivered()) == 1


def test_what_an_earlier_drain_stopped_at_is_tried_again_by_the_next(queue: MemoryRig) -> None:
    broken = [True]
    queue.consumer(lambda _: broken[0])
    drain = queue.taken(50)
    drain_remaining(drain, 60)
    queue.release(drain)
    broken[0] = False
    said = drain_remaining(queue.open("r2"), 60)
    assert (said["replayed"], said["outstanding"]) == (50, 0)


def test_late_outcomes_are_settled_by_the_next_round(make_queue: Make) -> None:
    queue = make_queue(outcome={"deadline": "50ms", "grace": 0})
    queue.begin()
    queue.topics.positions[TOPIC] = {0: 0, 1: 0}
    drain = queue.taken(5)
    replay_canary(drain, STAGE, 60)
    assert queue.states() == {"replayed": 1, "open": 4}
    queue.release(drain)
    queue.consumer()
    said = drain_remaining(queue.open("r2"), 60)
    assert queue.states() == {"confirmed": 5}
    assert said["outstanding"] == 0


def test_what_waits_for_a_fix_or_a_person_is_left_alone(queue: MemoryRig) -> None:
    queue.consumer()
    queue.put(5, "QuotaExceeded")
    queue.put(5, "DataCorruption")
    said = drain_remaining(queue.taken(), 60)
    assert (said["replayed"], said["outstanding"]) == (0, 10)
    assert queue.reasons() == {"waiting_for_fix": 5, "waiting_for_person": 5}


def test_order_within_a_key_holds_from_the_queue_to_the_target(make_queue: Make) -> None:
    queue = make_queue(ordering="per_key", limits={"batch": 7, "jobs": 3}, target_partitions=3)
    queue.begin()
    for n in range(120):
        queue.put(1, key=b"key %d" % (n % 11), part=(n % 11) % 2)
    queue.consumer()
    drain = queue.taken()
    said = replay_canary(drain, STAGE, 60)
    for job in said["jobs"]:
        replay_batches(drain, job, 60)
    by_key: dict[bytes | None, list[int]] = {}
    for record in queue.delivered():
        by_key.setdefault(record.key, []).append(int((record.value or b"").split()[1]))
    assert sum(map(len, by_key.values())) == 120
    assert all(seen == sorted(seen) for seen in by_key.values())
    queue.check()


def test_a_dry_run_changes_nothing_and_says_what_it_would_replay(queue: MemoryRig) -> None:
    drain = queue.taken(30)
    queue.consumer()
    before = (
        queue.rows("SELECT * FROM entry"),
        queue.rows("SELECT * FROM job"),
        queue.rows("SELECT * FROM event"),
    )
    with dry(queue.config, run_id="d", connections=Connection) as look:
        assert replay_canary(look, STAGE, 60)["would"][0]["entries"] == 30
        assert drain_remaining(look, 60)["would"][0]["entries"] == 30
    assert before == (
        queue.rows("SELECT * FROM entry"),
        queue.rows("SELECT * FROM job"),
        queue.rows("SELECT * FROM event"),
    )
    assert queue.delivered() == []
    assert drain.id


def test_a_fenced_drain_replays_nothing(queue: MemoryRig) -> None:
    queue.consumer()
    old = queue.taken(30)
    (job,) = plan.make(old, STAGE, plan.ready(old), who="w", saw="s", canary=False)
    queue.expire_lease()
    queue.open("r2")
    for act in (
        lambda: replay_canary(old, STAGE, 60),
        lambda: replay_batches(old, job.id, 60),
        lambda: drain_remaining(old, 60),
        lambda: assign(old),
        lambda: ledger.close(old.ledger, old.queue, old.epoch, job.id, "done", "ready"),
    ):
        with pytest.raises(Fenced):
            act()
    assert queue.delivered() == []


def test_progress_counts_up_to_the_jobs_size(queue: MemoryRig) -> None:
    queue.consumer()
    drain = queue.taken(150)
    seen: list[tuple[int, int]] = []
    (job,) = plan.make(drain, STAGE, plan.ready(drain), who="w", saw="s", canary=False)
    replay_batches(drain, job.id, 60, lambda done, of: seen.append((done, of)))
    assert seen == [(100, 150), (150, 150)]


def test_ordinals_of_a_job_are_sent_in_order(queue: MemoryRig) -> None:
    queue.consumer()
    drain = queue.taken(20, part=0, key=b"one key")
    replay_canary(drain, STAGE, 60)
    assert ordinals(queue) == list(range(20))
