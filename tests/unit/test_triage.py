"""Inspect, categorize, find the root cause, choose the remedies: why each entry is open, and which branch has work."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from tests.memory_rig import MemoryRig, failure

from dlq.drain import Drain
from dlq.orchestrator import OrchestratorError
from dlq.replay import drain_remaining
from dlq.triage import assign, categorize, choose_remedies, find_root_cause, groups, inspect_sample

Make = Callable[..., MemoryRig]


def new(queue: MemoryRig, run: str = "r1") -> Drain:
    """A drain that has taken what is there and has not looked at it."""
    drain = queue.open(run)
    queue.take(drain)
    return drain


# Reasons


@pytest.mark.parametrize(
    ("error_type", "reason"),
    [
        ("TransientNetwork", "ready"),
        ("RateLimit", "ready"),
        ("QuotaExceeded", "waiting_for_fix"),
        ("ScopeViolation", "waiting_for_fix"),
        ("DataCorruption", "waiting_for_person"),
        ("NobodyKnowsThis", "waiting_for_person"),
    ],
)
def test_an_entry_waits_for_what_its_remedy_needs(queue: MemoryRig, error_type: str, reason: str) -> None:
    headers = tuple((n, b"it broke" if n == "wf-error-message" else v) for n, v in failure(1, error_type))
    queue.put(1, headers=headers)
    assign(new(queue))
    assert queue.reasons() == {reason: 1}


def test_no_entry_stays_without_a_reason(queue: MemoryRig) -> None:
    for error_type in ("TransientNetwork", "QuotaExceeded", "DataCorruption", "", "?"):
        queue.put(3, error_type)
    queue.put(2, headers=())
    queue.log.append(0, None, None)
    categorize(new(queue))
    assert "new" not in queue.reasons()
    assert queue.one("SELECT COUNT(*) FROM entry WHERE owner IS NULL") == 0


def test_assigning_again_changes_nothing(queue: MemoryRig) -> None:
    for error_type in ("TransientNetwork", "QuotaExceeded", "DataCorruption"):
        queue.put(3, error_type)
    drain = new(queue)
    assign(drain)
    before = queue.rows("SELECT id, state, reason, duplicate_of FROM entry")
    for _ in range(3):
        assign(drain)
    assert queue.rows("SELECT id, state, reason, duplicate_of FROM entry") == before


def test_an_entry_that_may_go_nowhere_says_so(queue: MemoryRig) -> None:
    queue.put(2)
    drain = new(queue)
    queue.write("UPDATE entry SET target = NULL WHERE id = 1")
    assert assign(drain)["target_not_allowed"] == 1
    assert queue.reasons() == {"target_not_allowed": 1, "ready": 1}


@pytest.mark.parametrize("count", [b"3", b"99"])
def test_what_was_replayed_too_often_waits_for_a_person(queue: MemoryRig, count: bytes) -> None:
    queue.put(1, headers=failure(1, retry_count=count))
    queue.put(1, headers=failure(2, retry_count=b"2"))
    assert assign(new(queue))["returns_limit"] == 1
    assert queue.reasons() == {"returns_limit": 1, "ready": 1}


def test_twins_and_conflicts_are_marked(queue: MemoryRig) -> None:
    same = failure(1, dedupe="d-1")
    queue.put(2, value=b"one", key=b"k", headers=same)
    queue.put(1, value=b"two", key=b"k", headers=same)
    marks = assign(new(queue))
    assert (marks["twins"], marks["conflicts"]) == (1, 1)
    assert queue.reasons() == {"ready": 1, "twin_not_sent": 1, "conflict": 1}


def test_a_twin_that_comes_after_its_twin_was_sent_is_settled_when_it_is_looked_at(queue: MemoryRig) -> None:
    same = failure(1, dedupe="d-1")
    queue.put(1, value=b"one", key=b"k", headers=same)
    queue.consumer()
    drain = queue.taken()
    drain_remaining(drain, 60)
    queue.release(drain)
    queue.put(1, value=b"one", key=b"k", headers=same)
    categorize(new(queue, "r2"))
    assert queue.states() == {"confirmed": 1, "duplicate": 1}
    queue.check()


def test_a_return_waits_for_the_drain_after_the_one_that_sent_it(queue: MemoryRig) -> None:
    queue.consumer(lambda r: (r.value or b"").endswith(b" 49"))
    drain = queue.taken(60)
    drain_remaining(drain, 60)
    for _ in range(2):
        assign(drain)
    assert queue.reasons() == {"returned": 1}
    queue.release(drain)
    assign(queue.open("r2"))
    assert queue.reasons() == {"ready": 1}


@pytest.mark.parametrize(
    "reason", ["gate_failed", "canary_failed", "outcome_unknown", "nobody_consumes", "approval_expired"]
)
def test_what_an_earlier_drain_stopped_at_is_ready_for_the_next_one(queue: MemoryRig, reason: str) -> None:
    drain = queue.taken(2)
    categorize(drain)
    queue.write("UPDATE entry SET reason = :r", r=reason)
    categorize(drain)
    assert queue.reasons() == {reason: 2}, "not for the drain that stopped"
    queue.release(drain)
    categorize(queue.open("r2"))
    assert queue.reasons() == {"ready": 2}


@pytest.mark.parametrize(
    "reason",
    [
        "waiting_for_person",
        "conflict",
        "returns_limit",
        "twin_discarded",
        "hand_back_unfinished",
        "first_intake",
    ],
)
def test_what_waits_for_a_person_is_freed_by_no_drain(queue: MemoryRig, reason: str) -> None:
    drain = queue.taken(2)
    queue.write("UPDATE entry SET reason = :r", r=reason)
    queue.release(drain)
    for run in ("r2", "r3"):
        drain = queue.open(run)
        queue.take(drain)
        categorize(drain)
        assert queue.reasons() == {reason: 2}
        queue.release(drain)


# Groups


def test_groups_come_largest_first_with_a_few_correlation_ids(queue: MemoryRig) -> None:
    queue.put(7, "TransientNetwork")
    queue.put(2, "DataCorruption")
    drain = new(queue)
    said = categorize(drain)
    first, second = said["groups"]
    assert (first["error_type"], first["count"], first["remedy"]) == ("TransientNetwork", 7, "retry")
    assert (second["error_type"], second["count"], second["category"]) == ("DataCorruption", 2, "manual")
    assert len(first["correlation_ids"]) == 5
    assert set(second["correlation_ids"]) == {"c-7", "c-8"}
    assert said["by_category"] == {"transient": 7, "manual": 2}


def test_settled_entries_are_no_longer_in_a_group(queue: MemoryRig) -> None:
    queue.consumer()
    drain = queue.taken(5)
    drain_remaining(drain, 60)
    assert groups(drain) == []
    assert categorize(drain)["said"] == "nothing is unsettled"


# The sample


def test_a_sample_has_the_first_of_each_group_before_the_second_of_any(queue: MemoryRig) -> None:
    queue.put(60, "TransientNetwork")
    queue.put(3, "RateLimit")
    queue.put(1, "DataCorruption")
    said = inspect_sample(new(queue))
    kinds = [s["error_type"] for s in said["sample"]]
    assert len(kinds) == 50
    assert set(kinds[:3]) == {"TransientNetwork", "RateLimit", "DataCorruption"}
    assert kinds.count("RateLimit") == 3
    assert said["sample"][0]["message"] == "HTTP 503 from upstream"
    assert "3 kinds of failure" in said["said"]


def test_a_sample_is_redacted_and_shows_no_payload(queue: MemoryRig) -> None:
    secret = b"token=sk_live_0123456789abcdefghijkl user=jane@example.com"
    headers = tuple((n, b"rejected: " + secret if n == "wf-error-message" else v) for n, v in failure(1))
    queue.put(1, headers=headers, value=b"payload: " + secret)
    drain = new(queue)
    said = repr(inspect_sample(drain))
    noted = repr(queue.rows("SELECT text, data FROM event"))
    for text in (said, noted):
        assert "sk_live_0123456789abcdefghijkl" not in text
        assert "jane@example.com" not in text
        assert "payload:" not in text


def test_a_broken_segment_costs_the_sample_its_messages_and_no_more(queue: MemoryRig) -> None:
    queue.put(3)
    drain = new(queue)
    (uri,) = [u for (u,) in queue.rows("SELECT uri FROM segment")]
    (drain.archive.root / uri).write_bytes(b"not parquet")
    said = inspect_sample(drain)
    assert [s["message"] for s in said["sample"]] == [""] * 3
    assert queue.rows("SELECT 1 FROM event WHERE level = 'error'")


# Root cause


def test_suspects_are_those_that_fail_more_than_their_share(queue: MemoryRig) -> None:
    for count, component in ((18, b"payments.charge"), (1, b"mail.send"), (1, b"search.index")):
        for n in range(count):
            queue.put(1, headers=tuple((k, component if k == "wf-component" else v) for k, v in failure(n)))
    said = find_root_cause(new(queue))
    first = said["suspects"][0]
    assert (first["component"], first["count"], first["lift"]) == ("payments.charge", 18, 2.7)
    assert "18 of 20 failures" in said["said"]
    assert "No orchestrator is configured" in said["orchestrator"]


def test_the_root_cause_of_nothing_is_nothing(queue: MemoryRig) -> None:
    assert find_root_cause(queue.open())["said"] == "nothing to explain"


class Orchestrator:
    def __init__(self, answer: Any) -> None:
        self._answer = answer

    def success_rate(self, _window: int) -> Any:
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (SimpleNamespace(succeeded=98, total=100), "98 of 100"),
        (OrchestratorError("it is down"), "not known: it is down"),
    ],
)
def test_the_orchestrators_word_is_a_hint_and_its_silence_no_failure(
    queue: MemoryRig, answer: Any, said: str
) -> None:
    drain = queue.taken(1)
    drain.__dict__["orchestrator"] = Orchestrator(answer)
    assert said in find_root_cause(drain)["orchestrator"]


# Branches


def test_each_branch_that_has_work_is_chosen(queue: MemoryRig) -> None:
    for count, error_type in (
        (5, "TransientNetwork"),
        (3, "QuotaExceeded"),
        (2, "DataCorruption"),
        (1, "ScopeViolation"),
    ):
        queue.put(count, error_type)
    drain = new(queue)
    categorize(drain)
    said = choose_remedies(drain)
    assert said["branches"] == ["retry_transient", "fix_permanent", "manual_review"]
    assert said["why"] == {"retry_transient": 5, "fix_permanent": 4, "manual_review": 2}


@pytest.mark.parametrize(
    ("error_type", "branch"),
    [
        ("TransientNetwork", "retry_transient"),
        ("QuotaExceeded", "fix_permanent"),
        ("DataCorruption", "manual_review"),
    ],
)
def test_a_branch_without_work_is_not_chosen(queue: MemoryRig, error_type: str, branch: str) -> None:
    queue.put(2, error_type)
    drain = new(queue)
    categorize(drain)
    assert choose_remedies(drain)["branches"] == [branch]


def test_where_nothing_is_open_there_is_nothing_to_do(queue: MemoryRig) -> None:
    drain = new(queue)
    categorize(drain)
    assert choose_remedies(drain)["branches"] == ["nothing_to_do"]


def test_what_is_in_doubt_or_a_first_intake_is_a_persons_work(make_queue: Make) -> None:
    queue = make_queue()
    queue.put(3)
    drain = new(queue)
    categorize(drain)
    assert choose_remedies(drain)["branches"] == ["manual_review"]
    queue.write("UPDATE entry SET state = 'ambiguous'")
    assert choose_remedies(drain)["why"] == {"manual_review": 3}
