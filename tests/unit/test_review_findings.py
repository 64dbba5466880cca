"""What a review found: runs that were green unproven, retries that refused, sends that nobody had decided on."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from tests.memory_rig import TOPIC, Killed, MemoryRig, Tripwire, wire

from dlq import drafts, fixes, review, routing, verdict
from dlq import plan as planning
from dlq.conservation import verify_conservation
from dlq.decisions import record
from dlq.drain import Drain
from dlq.ledger import jobs as ledger
from dlq.memory import dead_letter
from dlq.ports import Connection
from dlq.replay import drain_remaining, replay_canary
from dlq.triage import categorize

Make = Callable[..., MemoryRig]


class Quotas:
    """An orchestrator of which only quotas and routing are asked; it writes down what it was told."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []
        self._limit = 10.0

    def capabilities(self) -> set[str]:
        return {"quotas", "routing"}

    def quotas(self) -> list[Any]:
        return [
            SimpleNamespace(plugin="payments", resource="m", limit=self._limit, peak_need=20, ceiling=100)
        ]

    def set_quota(self, plugin: str, limit: float, _key: str, _resource: str) -> Any:
        self.told.append((plugin, limit))
        self._limit = limit
        return SimpleNamespace(limit=limit)

    def pause_routing(self, _holder: str, seconds: int) -> Any:
        self.told.append(("pause", seconds))
        return SimpleNamespace(until_ms=1, paused=True, mode="held")

    def resume_routing(self, _holder: str) -> Any:
        return SimpleNamespace(paused=False, mode="auto")


def drained(rig: MemoryRig, run: str = "r1") -> Drain:
    drain = rig.open(run)
    rig.take(drain)
    categorize(drain)
    return drain


def apply(drain: Drain) -> None:
    """Propose a fix, approve it, apply it."""
    digest = fixes.propose_fix(drain)["hash"]
    approved = record(
        drain, drain.queue, who="ann", kind="approve_fix", subject=digest, saw="", choice="approve"
    )
    fixes.apply_fix(drain, digest, approved)


def with_fix(rig: MemoryRig, count: int) -> tuple[Drain, Quotas]:
    """A drain in which a quota was raised for ``count`` entries."""
    rig.put(count, "QuotaExceeded")
    drain = drained(rig)
    orchestrator = Quotas()
    drain.__dict__["orchestrator"] = orchestrator
    apply(drain)
    return drain, orchestrator


def reviewed(rig: MemoryRig) -> tuple[Drain, dict[str, dict[str, str]]]:
    """A review, and the choice to replay all that waits."""
    drain = rig.open("review", kind="review")
    offered = review.proposals(drain, drain.queue)
    return drain, {each["subject"]: {"choice": "replay", "hash": each["hash"]} for each in offered}


# The verdict


def test_what_was_sent_after_the_proof_is_not_proven(queue: MemoryRig) -> None:
    queue.consumer()
    drain = queue.taken(3)
    verify_conservation(drain)
    drain_remaining(drain, 30)  # cleared alone
    said = verdict.close_drain(drain, {})
    assert said["verdict"] == "red"
    assert "after conservation was verified" in said["said"]


def test_what_an_earlier_life_of_a_drain_said_is_not_of_this_one(queue: MemoryRig) -> None:
    orchestrator = Quotas()
    for _ in range(2):
        drain = queue.open("r1")
        drain.__dict__["orchestrator"] = orchestrator
        assert drain.noted("isolate") is None
        routing.isolate(drain, 300)
        routing.extend_isolation(drain, 3600)
        routing.restore_routing(drain)
    assert orchestrator.told == [("pause", 300), ("pause", 3600)] * 2


# Review


@pytest.mark.parametrize("at", [12, 20, 30, 40, 50, 60, 70, 85, 100])
def test_a_review_killed_anywhere_goes_on(queue: MemoryRig, at: int) -> None:
    queue.consumer()
    queue.put(5, "DataCorruption")
    drain = drained(queue)
    review.file_work(drain)
    queue.release(drain)
    drain, choices = reviewed(queue)
    try:
        review.apply_review(wire(drain, Tripwire(at)), choices, "ann", 60)
    except Killed:
        done = review.apply_review(queue.attach("review"), choices, "ann", 60)
        assert (done["refused"], done["replayed"]) == ([], 5)
    assert queue.states() == {"confirmed": 5}
    assert queue.one("SELECT COUNT(*) FROM decision WHERE kind = 'review:replay'") == 1
    queue.check()


def test_where_a_draft_cannot_be_sent_its_entry_is_not_sent_as_it_was(queue: MemoryRig) -> None:
    queue.consumer()
    queue.topics.unproducible = lambda output: "too_large" if output.value == b"mended" else None
    ((part, pos),) = queue.put(1, "DataCorruption")
    drain = drained(queue)
    review.file_work(drain)
    queue.release(drain)
    drafts.edit(queue.config, f"{part}/{pos}", b"mended", "ann", Connection)
    drain, choices = reviewed(queue)
    done = review.apply_review(drain, choices, "ann", 60)
    assert (done["refused"], done["replayed"]) == ([], 0)
    assert queue.delivered() == []
    assert queue.states() == {"open": 1}


# Fixes


def test_a_fix_whose_canary_passed_stays_though_the_stage_was_killed(queue: MemoryRig) -> None:
    queue.consumer()
    drain, orchestrator = with_fix(queue, 5)
    note = drain.note

    def killed(stage: str, *said: Any, **data: Any) -> None:
        if stage == "canary_fix":
            raise Killed
        note(stage, *said, **data)

    drain.note = killed  # type: ignore[method-assign]
    with pytest.raises(Killed):
        fixes.canary_fix(drain, 30)
    drain.note = note  # type: ignore[method-assign]
    assert fixes.canary_fix(drain, 30)["passed"]
    assert orchestrator.told == [("payments", 25)]


@pytest.mark.parametrize("seconds", [0.0, 5.0])
def test_a_fix_that_could_not_be_tried_frees_nothing(queue: MemoryRig, seconds: float) -> None:
    if not seconds:
        queue.consumer()  # else nobody consumes
    drain, orchestrator = with_fix(queue, 100)
    assert not fixes.canary_fix(drain, seconds)["passed"]
    assert queue.reasons() == {"waiting_for_fix": 100}
    assert orchestrator.told == [("payments", 25), ("payments", 10)]


def test_a_later_drain_does_not_free_what_a_fix_was_to_be_tried_on(queue: MemoryRig) -> None:
    drain, _ = with_fix(queue, 40)
    planning.make(drain, "canary_fix:payments:25", planning.sendable(drain), who="w", saw="s")
    queue.expire_lease()
    queue.open("r2")
    assert queue.reasons() == {"waiting_for_fix": 40}


def test_a_fix_is_tried_in_the_order_of_keys(make_queue: Make) -> None:
    rig = make_queue(ordering="per_key")
    rig.begin()
    rig.consumer()
    rig.put(1, "DataCorruption", part=0, key=b"k")
    rig.put(1, "QuotaExceeded", part=0, key=b"k")
    drain = drained(rig)
    orchestrator = Quotas()
    drain.__dict__["orchestrator"] = orchestrator
    apply(drain)
    fixes.canary_fix(drain, 30)
    assert rig.delivered() == []


# The gate


def test_a_canary_whose_last_step_is_hardly_known_does_not_pass(make_queue: Make) -> None:
    rig = make_queue(outcome={"grace": 0, "deadline": "300ms"})
    rig.begin()
    drain = rig.taken(200)

    def partition_1_hangs() -> None:
        ends = {part: rig.topics.topic(TOPIC).marks(part)[1] for part in range(2)}
        known = rig.topics.positions.setdefault(TOPIC, {})
        known.update(ends if len(rig.delivered()) <= 6 else {0: ends[0]})

    rig.topics.live = partition_1_hangs
    said = replay_canary(drain, "retry_transient", 20)
    assert (said["passed"], said["jobs"]) == (False, [])


# Plans and returns


def test_two_branches_make_plans_at_once(queue: MemoryRig) -> None:
    drain = queue.taken(30)

    def cuts(stages: int) -> Any:
        for number, share in enumerate((entry_ids[:10], entry_ids[10:])):
            yield ledger.Cut(TOPIC, share, canary=number == 0)
            if not number and stages:
                ledger.propose(drain.ledger, drain.queue, drain.epoch, drain.id, "b", cuts(0), expires_s=60)

    entry_ids = list(planning.by_id(drain, [planning.ready(drain)]))
    ledger.propose(drain.ledger, drain.queue, drain.epoch, drain.id, "a", cuts(1), expires_s=60)
    assert queue.one("SELECT COUNT(DISTINCT id) FROM job") == 4


def test_a_return_within_a_first_intake_waits_for_a_decision(queue: MemoryRig) -> None:
    queue.consumer()
    drain = queue.taken(1)
    replay_canary(drain, "retry_transient", 30)
    queue.release(drain)
    queue.write("UPDATE intake SET first = 1, cutoff = 1000 WHERE round = 1")  # as after adopt-source
    (sent,) = queue.delivered()
    for part in range(queue.log.partitions):
        queue.log.append(part, sent.key, sent.value, dead_letter(sent, TOPIC))
    for run in ("r2", "r3"):
        queue.release(drained(queue, run))
    assert "ready" not in queue.reasons()
    assert queue.reasons().get("first_intake")


# A fix that nobody tried


def test_a_raise_that_no_canary_tried_is_taken_back_at_the_end(queue: MemoryRig) -> None:
    drain, orchestrator = with_fix(queue, 3)
    said = verdict.close_drain(drain, {})
    assert "no canary tried its fix; rolled back to 10" in said["said"]
    assert orchestrator.told == [("payments", 25), ("payments", 10.0)]


def test_a_raise_whose_drain_died_is_taken_back_by_the_next(
    queue: MemoryRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Dying(Quotas):
        def set_quota(self, plugin: str, limit: float, key: str, resource: str) -> Any:
            super().set_quota(plugin, limit, key, resource)
            if len(self.told) == 1:
                raise Killed

    queue.put(3, "QuotaExceeded")
    orchestrator = Dying()
    monkeypatch.setattr(Drain, "orchestrator", orchestrator)
    drain = drained(queue)
    with pytest.raises(Killed):
        apply(drain)
    queue.release(drain)
    queue.release(queue.open("r2"))
    queue.open("r3")
    assert orchestrator.told == [("payments", 25), ("payments", 10.0)]


def test_what_a_person_leaves_is_a_decision_of_theirs(queue: MemoryRig) -> None:
    queue.put(3, "DataCorruption")
    drain = drained(queue)
    review.file_work(drain)
    queue.release(drain)
    again, choices = reviewed(queue)
    left = {subject: {**choice, "choice": "leave"} for subject, choice in choices.items()}
    for _ in range(2):  # a retry decides nothing anew
        assert review.apply_review(again, left, "somebody", 10)["left"] == 3
    found = queue.one("SELECT COUNT(*), MIN(who), MIN(choice) FROM decision WHERE kind = 'review:leave'")
    assert found == (1, "somebody", "leave")
