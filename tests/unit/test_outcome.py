"""What became of a replay: known by the consuming group's progress or the orchestrator's word, never guessed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import pytest
from tests.memory_rig import TOPIC, MemoryRig

from dlq import outcome, plan
from dlq.drain import Drain
from dlq.errors import Overtaken
from dlq.intake import Intake
from dlq.jobs import JobRun
from dlq.orchestrator import OrchestratorBusy
from dlq.outcome import Outcomes, Tally

Make = Callable[..., MemoryRig]
SOON = 1e12


def sent(queue: MemoryRig, count: int = 10, **how: Any) -> tuple[Drain, str]:
    """A drain that has sent ``count`` entries as one job and knows nothing of their outcome."""
    drain = queue.taken(count, **how)
    (job,) = plan.make(drain, "x", plan.ready(drain), who="w", saw="s", canary=False)
    with JobRun(drain, job.id) as run:
        run.send(job.size, 1e12)
        run.close("done", "ready")
    return drain, job.id


def look(drain: Drain, job: str, deadline: float = SOON) -> Tally:
    return Outcomes(drain).look(job, TOPIC, 0, 1_000, deadline)


def test_success_is_of_what_is_known() -> None:
    assert Tally(0, 0, 5).success is None
    assert Tally(3, 1, 6).success == 0.75
    assert Tally(3, 1, 6).known == 0.4
    assert (Tally(0, 0, 0).success, Tally(0, 0, 0).known) == (None, 1.0)


# By the group's progress


def test_while_the_group_has_not_passed_nothing_is_known(queue: MemoryRig) -> None:
    drain, job = sent(queue)
    queue.topics.positions[TOPIC] = {0: 0, 1: 0}
    assert look(drain, job) == Tally(0, 0, 10)
    assert queue.states() == {"replayed": 10}


def test_what_the_group_passed_without_a_dead_letter_succeeded(queue: MemoryRig) -> None:
    drain, job = sent(queue)
    queue.consume()
    assert look(drain, job) == Tally(10, 0, 0)
    assert queue.states() == {"confirmed": 10}


def test_what_came_back_is_a_return_and_its_new_entry_is_there(queue: MemoryRig) -> None:
    drain, job = sent(queue)
    queue.consume(lambda r: (r.value or b"")[-1:] in b"37")
    assert look(drain, job) == Tally(8, 2, 0)
    assert queue.states() == {"confirmed": 8, "returned": 2, "open": 2}
    assert (
        queue.one(
            "SELECT COUNT(*) FROM entry r JOIN entry o ON o.id = r.return_of WHERE o.state = 'returned'"
        )
        == 2
    )
    queue.check()


def test_a_look_too_early_waits_until_most_is_known(queue: MemoryRig) -> None:
    drain, job = sent(queue)
    queue.consume(most=5)
    assert look(drain, job) == Tally(0, 0, 10)
    queue.consume(most=4)
    assert look(drain, job) == Tally(9, 0, 1)


def test_at_the_deadline_what_has_passed_counts(queue: MemoryRig) -> None:
    drain, job = sent(queue)
    queue.consume(most=5)
    assert look(drain, job, time.monotonic() - 1) == Tally(5, 0, 5)


def test_nothing_is_confirmed_before_the_queue_was_read_to_its_end(
    queue: MemoryRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dead letter may lie there unread."""
    drain, job = sent(queue)
    queue.consume(lambda _: True)
    run = Intake.run
    monkeypatch.setattr(Intake, "run", lambda self, _deadline, **how: run(self, 0.0, **how))
    assert look(drain, job) == Tally(0, 0, 10)
    monkeypatch.setattr(Intake, "run", run)
    assert look(drain, job) == Tally(0, 10, 0)


def test_the_grace_is_waited_out_before_the_queue_is_read(
    make_queue: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The group commits its position, the dead letter comes a moment later."""
    queue = make_queue(outcome={"grace": "3s"})
    queue.begin()
    drain, job = sent(queue, 3)
    queue.consume()
    late = queue.delivered()[0]
    waited: list[float] = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        queue.log.append(0, late.key, late.value, late.headers)

    monkeypatch.setattr(time, "sleep", sleep)
    assert look(drain, job) == Tally(2, 1, 0)
    assert waited == [3.0]


def test_a_dead_letter_that_comes_after_all_makes_a_return_of_what_was_confirmed(queue: MemoryRig) -> None:
    drain, job = sent(queue, 3)
    queue.consume()
    assert look(drain, job) == Tally(3, 0, 0)
    late = queue.delivered()[0]
    queue.log.append(0, late.key, late.value, late.headers)
    queue.take(drain)
    assert look(drain, job) == Tally(2, 1, 0)
    queue.check()


def test_what_was_left_out_is_not_waited_for(queue: MemoryRig) -> None:
    queue.topics.unproducible = lambda o: "too_large" if o.ordinal % 2 else None
    drain, job = sent(queue)
    queue.consume()
    assert look(drain, job) == Tally(5, 0, 0)


def test_a_range_of_ordinals_is_looked_at_alone(queue: MemoryRig) -> None:
    drain, job = sent(queue)
    queue.consume()
    assert Outcomes(drain).look(job, TOPIC, 2, 5, SOON) == Tally(3, 0, 0)
    assert queue.states() == {"confirmed": 3, "replayed": 7}


def test_a_topic_nobody_consumes_tells_nothing(queue: MemoryRig) -> None:
    drain, job = sent(queue)
    assert not Outcomes(drain).consumed(TOPIC)
    assert look(drain, job) == Tally(0, 0, 10)
    queue.consume(most=0)
    assert Outcomes(drain).consumed(TOPIC)


def test_waiting_ends_when_enough_is_known(queue: MemoryRig) -> None:
    drain, job = sent(queue)
    left = [9]

    def step() -> None:
        if left[0]:
            left[0] -= 1
            queue.consume(most=1)

    queue.topics.live = step
    tally = Outcomes(drain).wait(job, TOPIC, 0, 10, SOON)
    assert tally.known >= outcome.KNOWN
    assert tally.awaited > 0


def test_waiting_ends_at_the_outcomes_own_deadline(make_queue: Make) -> None:
    queue = make_queue(outcome={"deadline": "200ms", "grace": 0})
    queue.begin()
    drain, job = sent(queue, 3)
    queue.consume(most=0)
    began = time.monotonic()
    assert Outcomes(drain).wait(job, TOPIC, 0, 3, SOON) == Tally(0, 0, 3)
    assert 0.15 < time.monotonic() - began < 5


def test_at_the_outcomes_own_deadline_what_has_passed_counts(make_queue: Make) -> None:
    """Three of ten are known to have succeeded: that is more than nothing, and the gate is told both numbers."""
    queue = make_queue(outcome={"deadline": "200ms", "grace": 0})
    queue.begin()
    drain, job = sent(queue)
    queue.consume(most=3)
    assert Outcomes(drain).wait(job, TOPIC, 0, 10, SOON) == Tally(3, 0, 7)


def test_a_sibling_that_takes_the_returns_first_is_no_trouble(
    queue: MemoryRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Jobs of one plan run side by side in processes of their own, each looking for its returns."""
    drain, job = sent(queue)
    queue.consume(lambda r: (r.value or b"")[-1:] == b"7")
    run, overtaken = Intake.run, [2]

    def raced(self: Intake, *arguments: Any, **more: Any) -> Any:
        if overtaken[0]:
            overtaken[0] -= 1
            run(Intake(queue.attach()), *arguments, **more)
            raise Overtaken("a sibling was faster")
        return run(self, *arguments, **more)

    monkeypatch.setattr(Intake, "run", raced)
    assert look(drain, job) == Tally(9, 1, 0)
    queue.check()


# By the orchestrator's word


class Orchestrator:
    """Answers outcomes as the contract says: a state for each key it is asked for."""

    def __init__(self, *capabilities: str) -> None:
        self._capabilities = frozenset(capabilities)
        self.states: dict[str, str] = {}
        self.asked: list[int] = []

    def capabilities(self) -> frozenset[str]:
        return self._capabilities

    def outcomes(self, keys: Iterable[str]) -> dict[str, Any]:
        keys = list(keys)
        self.asked.append(len(keys))
        return {key: SimpleNamespace(state=self.states.get(key, "unknown")) for key in keys}


@pytest.fixture
def asked(queue: MemoryRig) -> tuple[MemoryRig, Drain, str, Orchestrator]:
    drain, job = sent(queue)
    orchestrator = Orchestrator("outcome")
    drain.__dict__["orchestrator"] = orchestrator
    return queue, drain, job, orchestrator


def keys(queue: MemoryRig) -> list[str]:
    return [k for (k,) in queue.rows("SELECT idem_key FROM job_entry ORDER BY ordinal")]


def test_the_orchestrator_is_asked_where_there_is_one(
    asked: tuple[MemoryRig, Drain, str, Orchestrator],
) -> None:
    queue, drain, job, orchestrator = asked
    assert Outcomes(drain).consumed(TOPIC)
    orchestrator.states = dict(
        zip(keys(queue), ["succeeded"] * 6 + ["pending"] * 2 + ["unknown"] * 2, strict=True)
    )
    assert look(drain, job) == Tally(6, 0, 4)
    orchestrator.states = dict.fromkeys(keys(queue), "succeeded")
    assert look(drain, job) == Tally(10, 0, 0)
    assert orchestrator.asked == [10, 4], "what is known is not asked for again"


def test_a_failure_is_a_return_only_once_its_dead_letter_is_in_custody(
    asked: tuple[MemoryRig, Drain, str, Orchestrator],
) -> None:
    queue, drain, job, orchestrator = asked
    orchestrator.states = dict.fromkeys(keys(queue), "succeeded") | {keys(queue)[4]: "failed"}
    assert look(drain, job) == Tally(9, 0, 1), "the dead letter has not come yet"
    failed = next(r for r in queue.delivered() if dict(r.headers)["dlq-ordinal"] == b"4")
    queue.log.append(0, failed.key, failed.value, failed.headers)
    assert look(drain, job) == Tally(9, 1, 0)
    queue.check()


def test_an_orchestrator_that_is_busy_is_asked_again_when_it_said(
    asked: tuple[MemoryRig, Drain, str, Orchestrator], monkeypatch: pytest.MonkeyPatch
) -> None:
    queue, drain, job, orchestrator = asked
    orchestrator.states = dict.fromkeys(keys(queue), "succeeded")
    outcomes, busy = orchestrator.outcomes, [7.0, None]

    def ask(some: Any) -> Any:
        if busy:
            raise OrchestratorBusy("429", busy.pop(0))
        return outcomes(some)

    orchestrator.outcomes = ask  # type: ignore[method-assign]
    waits: list[float] = []
    monkeypatch.setattr("dlq.outcome.time.sleep", waits.append)
    assert Outcomes(drain).wait(job, TOPIC, 0, 10, SOON).confirmed == 10
    assert 1.0 < waits[0] <= 5.0, "what it asked for, within outcome.deadline"
    assert len(waits) == 2
    busy[:] = [7.0]
    assert Outcomes(drain).glance(job, TOPIC, 0, 10, SOON) == Tally(10, 0, 0), "a glance waits for nobody"


def test_an_orchestrator_that_knows_no_outcomes_leaves_the_group_to_tell(queue: MemoryRig) -> None:
    drain, job = sent(queue)
    drain.__dict__["orchestrator"] = Orchestrator("routing")
    queue.consume()
    assert look(drain, job) == Tally(10, 0, 0)


def test_keys_are_asked_for_a_thousand_at_a_time(queue: MemoryRig) -> None:
    drain, job = sent(queue, 1_100)
    orchestrator = Orchestrator("outcome")
    drain.__dict__["orchestrator"] = orchestrator
    Outcomes(drain).look(job, TOPIC, 0, 2_000, SOON)
    assert orchestrator.asked == [1_000, 100]
