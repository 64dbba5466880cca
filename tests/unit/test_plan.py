"""Which entries a plan takes, in what order, cut into which jobs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from tests.memory_rig import MemoryRig, failure

from dlq import clock, plan
from dlq.drain import Drain
from dlq.ledger import jobs as ledger
from dlq.pace import CANARY
from dlq.triage import assign

Make = Callable[..., MemoryRig]


def make(drain: Drain, **how: Any) -> list[ledger.Job]:
    return plan.make(drain, "retry_transient", plan.ready(drain), who="policy", saw="a test", **how)


def lines(rig: MemoryRig, job: ledger.Job) -> list[int]:
    """The entries of a job in sending order."""
    return [e for (e,) in rig.rows("SELECT entry FROM job_entry WHERE job = :j ORDER BY ordinal", j=job.id)]


def ready(rig: MemoryRig, drain: Drain) -> list[int]:
    from sqlalchemy import select

    from dlq.ledger.schema import entry

    with drain.ledger.read() as tx:
        return list(tx.execute(select(entry.c.id).where(plan.ready(drain)).order_by(entry.c.id)).scalars())


def test_nothing_ready_is_no_plan(queue: MemoryRig) -> None:
    drain = queue.taken(3, error_type="DataCorruption")
    assert make(drain) == []
    assert queue.one("SELECT COUNT(*) FROM plan WHERE withdrawn_at IS NULL") == 0


def test_a_plan_is_a_canary_and_the_rest_each_entry_once_in_order_of_intake(queue: MemoryRig) -> None:
    drain = queue.taken(100)
    canary, rest = make(drain)
    assert (canary.canary, rest.canary) == (True, False)
    assert (canary.size, rest.size) == (sum(CANARY), 100 - sum(CANARY))
    both = [lines(queue, j) for j in (canary, rest)]
    assert sorted(both[0] + both[1]) == [e for (e,) in queue.rows("SELECT id FROM entry ORDER BY id")]
    assert all(ids == sorted(ids) for ids in both)
    assert queue.states() == {"planned": 100}


def test_a_plan_smaller_than_a_canary_is_all_canary(queue: MemoryRig) -> None:
    (canary,) = make(queue.taken(7))
    assert (canary.canary, canary.size) == (True, 7)


def test_a_canary_has_entries_of_every_group(queue: MemoryRig) -> None:
    for error_type, count in (("TransientNetwork", 200), ("RateLimit", 40), ("PluginTimeout", 2)):
        queue.put(count, error_type)
    canary, _ = make(queue.taken())
    of_group = Counter(
        kind
        for (kind,) in queue.rows(
            "SELECT g.error_type FROM job_entry je JOIN entry e ON e.id = je.entry JOIN grp g ON g.id = e.grp "
            "WHERE je.job = :j",
            j=canary.id,
        )
    )
    assert of_group == {"TransientNetwork": 12, "RateLimit": 12, "PluginTimeout": 2}


def test_without_a_canary_there_is_one_job(queue: MemoryRig) -> None:
    (job,) = make(queue.taken(50), canary=False)
    assert (job.canary, job.size) == (False, 50)


def test_the_decision_says_who_and_for_which_hash(queue: MemoryRig) -> None:
    drain = queue.taken(5)
    (job,) = make(drain)
    who, kind, subject, choice = queue.one("SELECT who, kind, subject, choice FROM decision")
    assert (who, kind, subject) == ("policy", "replay", job.plan)
    assert job.plan_hash[:12] in choice


# What is ready


REASONS = (
    "new",
    "first_intake",
    "waiting_for_person",
    "waiting_for_fix",
    "hold",
    "conflict",
    "twin_not_sent",
    "returns_limit",
    "gate_failed",
)


@pytest.mark.parametrize("reason", REASONS)
def test_what_waits_is_not_planned(queue: MemoryRig, reason: str) -> None:
    drain = queue.taken(2)
    queue.write("UPDATE entry SET reason = :r WHERE id = 1", r=reason)
    assert ready(queue, drain) == [2]


@pytest.mark.parametrize(
    ("column", "value"),
    [("target", None), ("attempts", 3), ("hold_until", "2999-01-01T00:00:00.000+00:00"), ("duplicate_of", 2)],
)
def test_what_may_not_be_sent_is_not_planned(queue: MemoryRig, column: str, value: object) -> None:
    drain = queue.taken(2)
    queue.write(f"UPDATE entry SET {column} = :v WHERE id = 1", v=value)
    assert ready(queue, drain) == [2]


def test_a_hold_that_is_over_holds_no_more(queue: MemoryRig) -> None:
    drain = queue.taken(1)
    queue.write("UPDATE entry SET hold_until = :t", t=clock.after(-1))
    assert ready(queue, drain) == [1]


def test_a_forged_origin_chooses_no_target(make_queue: Make) -> None:
    """The twin's target takes all; what matters is that none is taken from a header that isn't allowed."""
    queue = make_queue()
    queue.begin()
    queue.put(1, headers=failure(1, topic="__consumer_offsets"))
    drain = queue.taken()
    assert queue.one("SELECT target FROM entry") == "orders"
    assert [j.target for j in make(drain)] == ["orders"]


# Retries


def test_a_retry_goes_on_with_the_jobs_that_are_there(queue: MemoryRig) -> None:
    drain = queue.taken(60)
    made = make(drain)
    again = plan.unfinished(queue.attach(), "retry_transient")
    assert [j.id for j in again] == [j.id for j in made]
    assert plan.unfinished(drain, "drain_remaining") == []


def test_a_try_that_died_before_it_approved_leaves_no_entry_locked(queue: MemoryRig) -> None:
    drain = queue.taken(60)
    approve = ledger.approve

    class Died(Exception):
        pass

    def die(*_: Any) -> None:
        raise Died

    for _ in range(2):
        ledger.approve = die  # type: ignore[assignment]
        try:
            with pytest.raises(Died):
                make(drain)
        finally:
            ledger.approve = approve
    assert queue.states() == {"open": 60}
    assert plan.unfinished(drain, "retry_transient") == []
    assert sum(j.size for j in make(drain)) == 60
    assert queue.one("SELECT COUNT(*) FROM plan WHERE approved_at IS NULL AND withdrawn_at IS NULL") == 0


def test_two_tries_that_plan_together_lock_each_entry_once(queue: MemoryRig) -> None:
    drain = queue.taken(60)
    propose = ledger.propose

    def both(*arguments: Any, **how: Any) -> Any:
        ledger.propose = propose
        mine = propose(*arguments, **how)
        make(queue.attach())  # the other try comes between plan and approval
        return mine

    ledger.propose = both  # type: ignore[assignment]
    try:
        with pytest.raises(ledger.PlanStale):
            make(drain)
    finally:
        ledger.propose = propose
    assert queue.states() == {"planned": 60}
    assert queue.one("SELECT COUNT(*) FROM plan WHERE approved_at IS NOT NULL") == 1


# Cuts


@pytest.mark.parametrize("jobs", [2, 3, 7])
def test_a_plan_is_cut_by_place_into_the_jobs_the_file_allows(make_queue: Make, jobs: int) -> None:
    queue = make_queue(limits={"jobs": jobs})
    queue.begin()
    drain = queue.taken(100 + sum(CANARY))
    _, *rest = make(drain)
    assert len(rest) == jobs
    assert max(j.size for j in rest) - min(j.size for j in rest) <= 1
    cut = [lines(queue, j) for j in rest]
    assert [e for ids in cut for e in ids] == sorted(e for ids in cut for e in ids)
    assert sum(map(len, cut)) == 100


def test_more_jobs_than_entries_is_no_harm(make_queue: Make) -> None:
    queue = make_queue(limits={"jobs": 64})
    queue.begin()
    drain = queue.taken(sum(CANARY) + 3)
    _, *rest = make(drain)
    assert sum(j.size for j in rest) == 3
    assert all(j.size for j in rest)


@pytest.mark.parametrize("jobs", [2, 5, 16, 64])
def test_a_plan_ordered_by_key_is_cut_by_key_and_leaves_nothing_out(make_queue: Make, jobs: int) -> None:
    queue = make_queue(limits={"jobs": jobs}, ordering="per_key")
    queue.begin()
    for n in range(240):
        queue.put(1, key=b"key %d" % (n % 60), part=0)
    queue.write_keyless(3)
    drain = queue.taken()
    made = make(drain)
    assert sum(j.size for j in made) == queue.one("SELECT COUNT(*) FROM entry")
    where: dict[str, set[str]] = {}
    for job in (j for j in made if not j.canary):
        for (key,) in queue.rows(
            "SELECT DISTINCT e.key_hash FROM job_entry je JOIN entry e ON e.id = je.entry "
            "WHERE je.job = :j AND e.key_hash IS NOT NULL",
            j=job.id,
        ):
            where.setdefault(key, set()).add(job.id)
    assert all(len(ids) == 1 for ids in where.values()), "a key lies in several jobs"
    assert len({next(iter(ids)) for ids in where.values()}) > 1, "nothing was cut"


# Order within a key


@pytest.fixture
def keyed(make_queue: Make) -> MemoryRig:
    queue = make_queue(ordering="per_key", partitions=1)
    queue.begin()
    return queue


def test_while_an_earlier_entry_of_its_key_waits_a_later_one_waits_too(keyed: MemoryRig) -> None:
    for key, error_type in ((b"a", "DataCorruption"), (b"b", "TransientNetwork"), (b"a", "TransientNetwork")):
        keyed.put(1, error_type, key=key)
    drain = keyed.taken()
    assert ready(keyed, drain) == [2]
    assert keyed.reasons() == {"waiting_for_person": 1, "ready": 1, "earlier_entry_of_key": 1}


@pytest.mark.parametrize(
    "change", ["planned", "ambiguous", "target", "duplicate_of", "attempts", "hold_until"]
)
def test_whatever_keeps_an_earlier_entry_back_keeps_the_later_ones_back(
    keyed: MemoryRig, change: str
) -> None:
    keyed.put(1, key=b"b")
    keyed.put(3, key=b"a")
    drain = keyed.taken()
    assert ready(keyed, drain) == [1, 2, 3, 4]
    if change in ("planned", "ambiguous"):
        plan.make(drain, "x", plan.sendable(drain) & _id(2), who="w", saw="s")
        if change == "ambiguous":
            keyed.write("UPDATE entry SET state = 'ambiguous' WHERE id = 2")
    else:
        value = {"target": None, "duplicate_of": 1, "attempts": 3, "hold_until": clock.after(60)}[change]
        keyed.write(f"UPDATE entry SET {change} = :v WHERE id = 2", v=value)
    assert ready(keyed, drain) == [1]


def _id(number: int) -> Any:
    from dlq.ledger.schema import entry

    return entry.c.id == number


@pytest.mark.parametrize("settled", ["discarded", "replayed"])
def test_once_the_earlier_entry_is_settled_the_later_ones_go(keyed: MemoryRig, settled: str) -> None:
    """In the same drain: what waited for a fix, or a person, held the others of its key."""
    keyed.put(1, "DataCorruption", key=b"a")
    keyed.put(3, key=b"a")
    drain = keyed.taken()
    assert ready(keyed, drain) == []
    assert keyed.reasons() == {"waiting_for_person": 1, "earlier_entry_of_key": 3}
    if settled == "discarded":
        keyed.write("UPDATE entry SET state = 'discarded', settled_drain = :d WHERE id = 1", d=drain.id)
    else:
        keyed.write("UPDATE entry SET reason = 'fixed' WHERE id = 1")
    assign(drain)
    assert ready(keyed, drain) == ([2, 3, 4] if settled == "discarded" else [1, 2, 3, 4])
    assert "earlier_entry_of_key" not in keyed.reasons()


def test_one_that_waits_again_blocks_again(keyed: MemoryRig) -> None:
    keyed.put(3, key=b"a")
    drain = keyed.taken()
    keyed.write("UPDATE entry SET reason = 'waiting_for_person' WHERE id = 2")
    assign(drain)
    assert ready(keyed, drain) == [1]
    assert keyed.rows("SELECT id, reason FROM entry ORDER BY id") == [
        (1, "ready"),
        (2, "waiting_for_person"),
        (3, "earlier_entry_of_key"),
    ]


def test_entries_without_a_key_wait_for_nobody(keyed: MemoryRig) -> None:
    keyed.put(1, "DataCorruption", key=b"a")
    keyed.write_keyless(2)
    drain = keyed.taken()
    assert ready(keyed, drain) == [2, 3]


def test_a_canary_takes_only_the_heads_of_keys(keyed: MemoryRig) -> None:
    for _ in range(4):
        for key in (b"a", b"b", b"c"):
            keyed.put(1, key=key)
    canary, rest = make(keyed.taken())
    assert lines(keyed, canary) == [1, 2, 3]
    assert lines(keyed, rest) == list(range(4, 13))


def test_where_order_does_not_matter_nothing_waits_for_its_key(queue: MemoryRig) -> None:
    queue.put(1, "DataCorruption", key=b"a")
    queue.put(1, key=b"a")
    drain = queue.taken()
    assert len(ready(queue, drain)) == 1


def test_a_summary_counts_by_group_and_target(queue: MemoryRig) -> None:
    queue.put(5, "TransientNetwork")
    queue.put(2, "RateLimit")
    queue.put(9, "DataCorruption")
    drain = queue.taken()
    assert [(g["error_type"], g["target"], g["entries"]) for g in plan.summary(drain)] == [
        ("TransientNetwork", "orders", 5),
        ("RateLimit", "orders", 2),
    ]
