"""Plans and jobs in the ledger: frozen, approved all or none, settled from the target's cursor alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tests.ledger_rig import DRAIN, QUEUE, LedgerRig, sha

from dlq import clock
from dlq.errors import Fenced
from dlq.ledger import jobs
from dlq.ledger.jobs import Item, PlanStale
from dlq.ports import Delivered


def get(rig: LedgerRig, job: str) -> jobs.Job:
    with rig.read_tx() as tx:
        return jobs.get(tx, job)


def settle(rig: LedgerRig, job: str, cursor: int, *delivered: Delivered) -> int:
    with rig.write() as tx:
        return jobs.settle(tx, jobs.get(tx, job), DRAIN, cursor, delivered, "t")


def items(rig: LedgerRig, job: str, first: int = 0, until: int = 1_000, limit: int = 1_000) -> list[Item]:
    with rig.read_tx() as tx:
        return jobs.items(tx, job, first, until, limit)


def skip(rig: LedgerRig, job: str, ordinal: int, reason: str = "too_large", *, per_key: bool = False) -> int:
    (item,) = items(rig, job, ordinal, ordinal + 1)
    with rig.write() as tx:
        return jobs.skip(tx, jobs.get(tx, job), item, reason, per_key=per_key)


def states(rig: LedgerRig, ids: list[int]) -> list[str]:
    return [rig.state(e) for e in ids]


# Plans


def test_a_proposed_plan_changes_no_entry(ledger_rig: LedgerRig) -> None:
    ids = ledger_rig.entries(3)
    (job,) = ledger_rig.plan(ids)
    assert states(ledger_rig, ids) == ["open"] * 3
    assert get(ledger_rig, job).state == "proposed"
    assert (get(ledger_rig, job).size, get(ledger_rig, job).cursor) == (3, 0)


def test_a_plan_of_nothing_is_no_plan(ledger_rig: LedgerRig) -> None:
    assert jobs.propose(ledger_rig.ledger, QUEUE, 1, DRAIN, "s", [], expires_s=60) is None
    assert ledger_rig.one("SELECT COUNT(*) FROM plan WHERE withdrawn_at IS NULL") == 0


def test_approving_locks_the_entries_for_their_jobs(ledger_rig: LedgerRig) -> None:
    one, two = ledger_rig.entries(2), ledger_rig.entries(3)
    first, second = ledger_rig.plan(one, two)
    ledger_rig.approve(first)
    assert states(ledger_rig, one + two) == ["planned"] * 5
    assert [i.entry for i in items(ledger_rig, first)] == one
    assert [i.entry for i in items(ledger_rig, second)] == two
    assert (
        ledger_rig.one("SELECT COUNT(*) FROM plan WHERE decision IS NOT NULL AND approved_at IS NOT NULL")
        == 1
    )


def test_a_line_says_what_is_sent_under_which_key(ledger_rig: LedgerRig) -> None:
    number = ledger_rig.entry(place="41", pos=41, part=3, attempts=2, origin="t/0/1@g", key_hash="ab")
    again = ledger_rig.entry(place="42", pos=42, part=3)
    job = ledger_rig.job(number, again)
    first, second = items(ledger_rig, job)
    assert (first.ordinal, first.entry, first.ref, first.attempts) == (0, number, "kafka:c/t/3/41", 2)
    assert (first.origin, first.key_hash) == ("t/0/1@g", "ab")
    assert first.idem_key != second.idem_key
    assert len(first.idem_key) == 64


def test_the_key_of_an_entry_is_the_same_in_every_plan(ledger_rig: LedgerRig) -> None:
    number = ledger_rig.entry()
    keys = set()
    for _ in range(2):
        job = ledger_rig.job(number)
        keys.add(items(ledger_rig, job)[0].idem_key)
        jobs.close(ledger_rig.ledger, QUEUE, 1, job, "deadline", "ready")
    assert len(keys) == 1


def test_an_approval_is_for_one_hash(ledger_rig: LedgerRig) -> None:
    ids = ledger_rig.entries(2)
    (job,) = ledger_rig.plan(ids)
    with pytest.raises(PlanStale, match="not the one that was approved"):
        ledger_rig.approve(job, "another hash")
    assert states(ledger_rig, ids) == ["open"] * 2


def test_an_approval_that_comes_too_late_starts_nothing(ledger_rig: LedgerRig) -> None:
    ids = ledger_rig.entries(2)
    (job,) = ledger_rig.plan(ids, expires_s=-1)
    with pytest.raises(PlanStale, match="make a new plan"):
        ledger_rig.approve(job)
    assert states(ledger_rig, ids) == ["open"] * 2


def test_a_job_whose_approval_expired_before_it_began_never_starts(ledger_rig: LedgerRig) -> None:
    ids = ledger_rig.entries(2)
    job = ledger_rig.job(*ids)
    ledger_rig.execute("UPDATE plan SET expires_at = :t", t=clock.after(-1))
    with pytest.raises(PlanStale):
        jobs.start(ledger_rig.ledger, QUEUE, 1, job)
    assert get(ledger_rig, job).state == "closed"
    assert states(ledger_rig, ids) == ["open"] * 2
    assert {ledger_rig.reason(e) for e in ids} == {"approval_expired"}


def test_a_job_that_began_in_time_goes_on_after_its_approval_expired(ledger_rig: LedgerRig) -> None:
    job = ledger_rig.job(*ledger_rig.entries(2))
    jobs.start(ledger_rig.ledger, QUEUE, 1, job)
    ledger_rig.execute("UPDATE plan SET expires_at = :t", t=clock.after(-1))
    jobs.start(ledger_rig.ledger, QUEUE, 1, job)
    assert get(ledger_rig, job).state == "running"


@pytest.mark.parametrize("state", ["planned", "ambiguous", "confirmed", "discarded", "duplicate"])
def test_a_plan_is_locked_all_or_none(ledger_rig: LedgerRig, state: str) -> None:
    one, two = ledger_rig.entries(3), ledger_rig.entries(3)
    first, second = ledger_rig.plan(one, two)
    changed = ledger_rig.entry(state)
    other = ledger_rig.one("SELECT job FROM entry WHERE id = :e", e=changed)
    # one entry of the second job goes another way between plan and approval
    for step in {
        "confirmed": ["planned", "replayed", "confirmed"],
        "ambiguous": ["planned", "ambiguous"],
    }.get(state, [state]):
        ledger_rig.execute(
            "UPDATE entry SET state = :s, job = :j, settled_drain = :d WHERE id = :e",
            s=step,
            j=other or ledger_rig.job() if step not in ("discarded", "duplicate") else None,
            d=None if step in ("planned", "ambiguous") else DRAIN,
            e=two[1],
        )
    with pytest.raises(PlanStale, match="1 of its entries are no longer open"):
        ledger_rig.approve(first)
    assert states(ledger_rig, one) == ["open"] * 3
    assert states(ledger_rig, two) == ["open", state, "open"]
    assert {get(ledger_rig, j).state for j in (first, second)} == {"proposed"}


def test_two_plans_of_the_same_entries_only_one_is_approved(ledger_rig: LedgerRig) -> None:
    ids = ledger_rig.entries(2)
    (first,), (second,) = ledger_rig.plan(ids), ledger_rig.plan(ids)
    ledger_rig.approve(second)
    with pytest.raises(PlanStale):
        ledger_rig.approve(first)
    assert [i.entry for i in items(ledger_rig, second)] == ids
    assert items(ledger_rig, first) == []


def test_the_same_plan_can_be_made_again_after_a_try_that_died(ledger_rig: LedgerRig) -> None:
    ids = ledger_rig.entries(2)
    (first,) = ledger_rig.plan(ids)
    jobs.withdraw(ledger_rig.ledger, QUEUE, 1, get(ledger_rig, first).plan)
    (second,) = ledger_rig.plan(ids)
    assert get(ledger_rig, first).plan_hash != get(ledger_rig, second).plan_hash
    ledger_rig.approve(second)


def test_a_withdrawn_plan_is_never_approved_and_an_approved_one_never_withdrawn(
    ledger_rig: LedgerRig,
) -> None:
    ids = ledger_rig.entries(2)
    (first,) = ledger_rig.plan(ids)
    jobs.withdraw(ledger_rig.ledger, QUEUE, 1, get(ledger_rig, first).plan)
    with pytest.raises(PlanStale):
        ledger_rig.approve(first)
    assert get(ledger_rig, first).state == "closed"
    (second,) = ledger_rig.plan(ids)
    ledger_rig.approve(second)
    jobs.withdraw(ledger_rig.ledger, QUEUE, 1, get(ledger_rig, second).plan)
    assert get(ledger_rig, second).state == "approved"
    assert states(ledger_rig, ids) == ["planned"] * 2


def test_a_plan_that_a_dead_try_left_half_made_is_never_approved(ledger_rig: LedgerRig) -> None:
    class Died(Exception):
        pass

    def lines() -> Any:
        yield ledger_rig.line(first)
        raise Died

    first = ledger_rig.entry()
    with pytest.raises(Died):
        jobs.propose(ledger_rig.ledger, QUEUE, 1, DRAIN, "s", [jobs.Cut("t", lines())], expires_s=60)
    assert ledger_rig.one("SELECT hash FROM plan").startswith("incomplete")
    assert ledger_rig.state(first) == "open"


@pytest.mark.parametrize("change", ["order", "payload", "target", "canary", "entry"])
def test_the_hash_is_of_everything_that_is_approved(ledger_rig: LedgerRig, change: str) -> None:
    """But for the plan's own id, which differs too: so the change is looked for in a plan under the same id."""
    ids = ledger_rig.entries(2)

    def hash_of(cut: jobs.Cut) -> str:
        plan_id = jobs.propose(ledger_rig.ledger, QUEUE, 1, DRAIN, "s", [cut], expires_s=60)
        found = str(ledger_rig.one("SELECT hash FROM plan WHERE id = :p", p=plan_id))
        for table in ("job_entry", "job", "plan"):
            with ledger_rig.write() as tx:
                tx.exec_driver_sql(
                    "DROP TRIGGER IF EXISTS job_entry_stay"
                    + (" ON job_entry" if ledger_rig.ledger.dialect == "postgresql" else "")
                )
                tx.exec_driver_sql(f"DELETE FROM {table}")
        return found

    lines = [ledger_rig.line(e) for e in ids]
    other = {
        "order": jobs.Cut("t", lines[::-1]),
        "payload": jobs.Cut("t", [(*lines[0][:6], sha("edited")), lines[1]]),
        "target": jobs.Cut("u", lines),
        "canary": jobs.Cut("t", lines, canary=True),
        "entry": jobs.Cut("t", lines[:1]),
    }[change]
    try:
        assert hash_of(jobs.Cut("t", lines)) == hash_of(jobs.Cut("t", lines))
        assert hash_of(jobs.Cut("t", lines)) != hash_of(other)
    finally:
        from dlq.ledger import schema

        for statement in schema.triggers(ledger_rig.ledger.dialect):
            if "TRIGGER job_entry_stay" in statement:
                with ledger_rig.write() as tx:
                    tx.exec_driver_sql(statement)


# Settling


def test_what_the_cursor_passed_is_sent_and_nothing_else(ledger_rig: LedgerRig) -> None:
    ids = ledger_rig.entries(5)
    job = ledger_rig.job(*ids)
    assert settle(ledger_rig, job, 3, *(Delivered(n, 0, 10 + n) for n in range(3))) == 3
    assert states(ledger_rig, ids) == ["replayed"] * 3 + ["planned"] * 2
    assert get(ledger_rig, job).cursor == 3
    assert ledger_rig.rows("SELECT ordinal, pos FROM delivery ORDER BY ordinal") == [
        (0, 10),
        (1, 11),
        (2, 12),
    ]
    assert ledger_rig.rows("SELECT DISTINCT settled_drain FROM entry WHERE state = 'replayed'") == [(DRAIN,)]


def test_settling_again_or_late_changes_nothing(ledger_rig: LedgerRig) -> None:
    ids = ledger_rig.entries(5)
    job = ledger_rig.job(*ids)
    settle(ledger_rig, job, 4, Delivered(0, 0, 10))
    assert settle(ledger_rig, job, 4, Delivered(0, 0, 99)) == 0
    assert settle(ledger_rig, job, 2) == 0
    assert get(ledger_rig, job).cursor == 4
    assert ledger_rig.rows("SELECT pos FROM delivery") == [(10,)]


def test_what_was_left_out_is_not_settled_by_the_cursor_that_passes_it(ledger_rig: LedgerRig) -> None:
    ids = ledger_rig.entries(4)
    job = ledger_rig.job(*ids)
    assert skip(ledger_rig, job, 1) == 1
    settle(ledger_rig, job, 4)
    assert states(ledger_rig, ids) == ["replayed", "open", "replayed", "replayed"]
    assert ledger_rig.reason(ids[1]) == "too_large"


def test_an_entry_planned_anew_is_not_settled_by_the_job_it_left(ledger_rig: LedgerRig) -> None:
    ids = ledger_rig.entries(2)
    old = ledger_rig.job(*ids)
    jobs.close(ledger_rig.ledger, QUEUE, 1, old, "deadline", "ready")
    new = ledger_rig.job(*ids)
    assert settle(ledger_rig, old, 2) == 0
    assert states(ledger_rig, ids) == ["planned"] * 2
    assert [i.entry for i in items(ledger_rig, new)] == ids


def test_a_restore_settles_as_handed_back(ledger_rig: LedgerRig) -> None:
    ids = ledger_rig.entries(2)
    job = ledger_rig.job(*ids, kind="hand_back")
    settle(ledger_rig, job, 2)
    assert states(ledger_rig, ids) == ["handed_back"] * 2


def test_a_return_that_was_taken_before_its_replay_was_settled_is_seen_when_it_is(
    ledger_rig: LedgerRig,
) -> None:
    """The consumer can be faster than our bookkeeping: its dead letter may be in custody first."""
    first = ledger_rig.entry()
    job = ledger_rig.job(first)
    ledger_rig.entry(reason="returned", return_of=first)
    settle(ledger_rig, job, 1, Delivered(0, 0, 5))
    assert ledger_rig.state(first) == "returned"


def test_what_was_sent_without_a_known_place_is_noticed(ledger_rig: LedgerRig) -> None:
    job = ledger_rig.job(*ledger_rig.entries(2))
    with ledger_rig.read_tx() as tx:
        assert not jobs.undelivered(tx, job)
    settle(ledger_rig, job, 2, Delivered(0, 0, 1))
    with ledger_rig.read_tx() as tx:
        assert jobs.undelivered(tx, job)
    with ledger_rig.write() as tx:
        jobs.add_deliveries(tx, job, [Delivered(0, 0, 1), Delivered(1, 0, 2)], "t")
    with ledger_rig.read_tx() as tx:
        assert not jobs.undelivered(tx, job)


# Lines


def test_lines_come_in_order_within_bounds_and_only_those_still_planned(ledger_rig: LedgerRig) -> None:
    ids = ledger_rig.entries(6)
    job = ledger_rig.job(*ids[::-1])
    assert [i.entry for i in items(ledger_rig, job)] == ids[::-1]
    assert [i.ordinal for i in items(ledger_rig, job, 2, 5)] == [2, 3, 4]
    assert [i.ordinal for i in items(ledger_rig, job, 2, limit=2)] == [2, 3]
    skip(ledger_rig, job, 3)
    assert [i.ordinal for i in items(ledger_rig, job, 2)] == [2, 4, 5]
    settle(ledger_rig, job, 5)
    assert [i.ordinal for i in items(ledger_rig, job)] == [5]


def test_leaving_one_out_leaves_out_the_later_ones_of_its_key(ledger_rig: LedgerRig) -> None:
    ids = [ledger_rig.entry(key_hash=k) for k in ("a", "b", "a", None, "a")]
    job = ledger_rig.job(*ids)
    settle(ledger_rig, job, 1)
    assert skip(ledger_rig, job, 2, per_key=True) == 2
    assert states(ledger_rig, ids) == ["replayed", "planned", "open", "planned", "open"]
    assert [ledger_rig.reason(ids[n]) for n in (2, 4)] == ["too_large", "earlier_entry_of_key"]


def test_leaving_one_out_leaves_out_the_later_ones_of_its_key_in_the_plans_jobs_to_come(
    ledger_rig: LedgerRig,
) -> None:
    """A canary holds the heads of keys, the jobs after it their followers."""
    head, other = ledger_rig.entry(key_hash="a"), ledger_rig.entry(key_hash="b")
    follower, free = ledger_rig.entry(key_hash="a"), ledger_rig.entry(key_hash="b")
    canary, rest = ledger_rig.plan([head, other], [follower, free])
    ledger_rig.approve(canary)
    assert skip(ledger_rig, canary, 0, per_key=True) == 2
    assert states(ledger_rig, [head, other, follower, free]) == ["open", "planned", "open", "planned"]
    assert ledger_rig.reason(follower) == "earlier_entry_of_key"
    assert [i.entry for i in items(ledger_rig, rest)] == [free]


def test_where_order_does_not_matter_only_the_one_is_left_out(ledger_rig: LedgerRig) -> None:
    ids = [ledger_rig.entry(key_hash="a") for _ in range(3)]
    job = ledger_rig.job(*ids)
    assert skip(ledger_rig, job, 0) == 1
    assert states(ledger_rig, ids) == ["open", "planned", "planned"]


# Writers


def test_the_newest_try_is_the_jobs_writer(ledger_rig: LedgerRig) -> None:
    job = ledger_rig.job(ledger_rig.entry())

    def claim(token: str, *, fresh: bool = False) -> None:
        jobs.claim_writer(ledger_rig.ledger, QUEUE, 1, job, token, fresh=fresh)

    claim("one", fresh=True)
    claim("one")
    claim("two", fresh=True)
    claim("two")
    with pytest.raises(Fenced, match="newer try"):
        claim("one")


def test_an_older_try_cannot_close_the_job_under_its_successor(ledger_rig: LedgerRig) -> None:
    """It would open again what the other has under way, and the next plan would send it twice."""
    ids = ledger_rig.entries(2)
    job = ledger_rig.job(*ids)
    jobs.claim_writer(ledger_rig.ledger, QUEUE, 1, job, "older", fresh=True)
    jobs.claim_writer(ledger_rig.ledger, QUEUE, 1, job, "newer", fresh=True)
    with pytest.raises(Fenced):
        jobs.close(ledger_rig.ledger, QUEUE, 1, job, "deadline", "ready", writer="older")
    assert states(ledger_rig, ids) == ["planned"] * 2
    jobs.close(ledger_rig.ledger, QUEUE, 1, job, "deadline", "ready", writer="newer")
    assert states(ledger_rig, ids) == ["open"] * 2


def test_a_job_that_runs_is_closed_by_its_writer_only(ledger_rig: LedgerRig) -> None:
    """Whoever closes it without having read its cursor can't know what was sent."""
    ids = ledger_rig.entries(2)
    job = ledger_rig.job(*ids)
    jobs.claim_writer(ledger_rig.ledger, QUEUE, 1, job, "token", fresh=True)
    jobs.start(ledger_rig.ledger, QUEUE, 1, job)
    with pytest.raises(Fenced):
        jobs.close(ledger_rig.ledger, QUEUE, 1, job, "canary_failed", "canary_failed")
    assert states(ledger_rig, ids) == ["planned"] * 2


WRITES: list[Callable[[LedgerRig, str], object]] = [
    lambda rig, job: jobs.claim_writer(rig.ledger, QUEUE, 1, job, "t", fresh=True),
    lambda rig, job: jobs.claim_writer(rig.ledger, QUEUE, 1, job, "t", fresh=False),
    lambda rig, job: jobs.start(rig.ledger, QUEUE, 1, job),
    lambda rig, job: jobs.mark_from(rig.ledger, QUEUE, 1, job, {0: 1}),
    lambda rig, job: jobs.close(rig.ledger, QUEUE, 1, job, "done", "ready"),
    lambda rig, job: jobs.doubt(rig.ledger, QUEUE, 1, job),
    lambda rig, job: jobs.approve(rig.ledger, QUEUE, 1, "p", "h", 1),
    lambda rig, job: jobs.withdraw(rig.ledger, QUEUE, 1, "p"),
    lambda rig, job: jobs.propose(rig.ledger, QUEUE, 1, DRAIN, "s", [], expires_s=60),
]


@pytest.mark.parametrize("write", WRITES)
def test_every_write_of_an_older_holder_is_fenced(
    ledger_rig: LedgerRig, write: Callable[[LedgerRig, str], object]
) -> None:
    ids = ledger_rig.entries(2)
    job = ledger_rig.job(*ids)
    before = ledger_rig.rows("SELECT * FROM job"), ledger_rig.rows("SELECT * FROM entry")
    ledger_rig.acquire()
    with pytest.raises(Fenced):
        write(ledger_rig, job)
    assert before == (ledger_rig.rows("SELECT * FROM job"), ledger_rig.rows("SELECT * FROM entry"))


# The end


def test_closing_opens_again_what_was_not_sent(ledger_rig: LedgerRig) -> None:
    ids = ledger_rig.entries(4)
    job = ledger_rig.job(*ids)
    settle(ledger_rig, job, 2)
    assert jobs.close(ledger_rig.ledger, QUEUE, 1, job, "gate_failed", "gate_failed") == 2
    assert states(ledger_rig, ids) == ["replayed"] * 2 + ["open"] * 2
    assert {ledger_rig.reason(e) for e in ids[2:]} == {"gate_failed"}
    assert ledger_rig.rows("SELECT job FROM entry WHERE state = 'open'") == [(None,), (None,)]
    assert (get(ledger_rig, job).state, get(ledger_rig, job).ended) == ("closed", "gate_failed")


def test_a_lost_cursor_puts_what_was_planned_in_doubt(ledger_rig: LedgerRig) -> None:
    ids = ledger_rig.entries(4)
    job = ledger_rig.job(*ids)
    settle(ledger_rig, job, 2)
    assert jobs.doubt(ledger_rig.ledger, QUEUE, 1, job) == 2
    assert states(ledger_rig, ids) == ["replayed"] * 2 + ["ambiguous"] * 2
    assert get(ledger_rig, job).state == "closed"


# Outcomes


def sent(rig: LedgerRig) -> tuple[str, list[int]]:
    ids = rig.entries(4)
    job = rig.job(*ids)
    settle(rig, job, 4, *(Delivered(n, n % 2, 100 + n) for n in range(4)))
    return job, ids


def test_what_the_group_passed_is_confirmed_partition_by_partition(ledger_rig: LedgerRig) -> None:
    job, ids = sent(ledger_rig)
    with ledger_rig.write() as tx:
        assert jobs.passed_below(tx, job, 0, 4, {0: 101, 1: 103}) == 2
        assert jobs.confirm_below(tx, job, 0, 4, {0: 101, 1: 103}) == 2
    assert states(ledger_rig, ids) == ["confirmed", "confirmed", "replayed", "replayed"]


def test_a_position_on_a_record_has_not_passed_it(ledger_rig: LedgerRig) -> None:
    job, _ = sent(ledger_rig)
    with ledger_rig.write() as tx:
        assert jobs.confirm_below(tx, job, 0, 4, {0: 100, 1: 101}) == 0


def test_only_the_ordinals_asked_for_are_confirmed(ledger_rig: LedgerRig) -> None:
    job, ids = sent(ledger_rig)
    with ledger_rig.write() as tx:
        assert jobs.confirm_below(tx, job, 1, 3, {0: 999, 1: 999}) == 2
    assert states(ledger_rig, ids) == ["replayed", "confirmed", "confirmed", "replayed"]


def test_a_returned_entry_is_never_confirmed(ledger_rig: LedgerRig) -> None:
    job, ids = sent(ledger_rig)
    ledger_rig.execute("UPDATE entry SET state = 'returned' WHERE id = :e", e=ids[0])
    with ledger_rig.write() as tx:
        jobs.confirm_below(tx, job, 0, 4, {0: 999, 1: 999})
        jobs.confirm(tx, job, range(4))
    assert states(ledger_rig, ids) == ["returned", "confirmed", "confirmed", "confirmed"]


def test_keys_are_asked_for_until_their_outcome_is_known(ledger_rig: LedgerRig) -> None:
    job, ids = sent(ledger_rig)
    with ledger_rig.write() as tx:
        keys = jobs.awaited(tx, job, 0, 4, 100)
        assert list(keys.values()) == [0, 1, 2, 3]
        assert jobs.confirm(tx, job, [0]) == 1
        assert list(jobs.awaited(tx, job, 0, 4, 100).items()) == list(keys.items())[1:]
        assert list(jobs.awaited(tx, job, 0, 4, 2).values()) == [1, 2]
        assert list(jobs.awaited(tx, job, 2, 3, 100).values()) == [2]
    assert states(ledger_rig, ids)[0] == "confirmed"


def test_outcomes_count_only_what_the_job_still_holds(ledger_rig: LedgerRig) -> None:
    ids = ledger_rig.entries(4)
    job = ledger_rig.job(*ids)
    skip(ledger_rig, job, 0)
    settle(ledger_rig, job, 3)
    with ledger_rig.read_tx() as tx:
        assert jobs.outcomes(tx, job, 0, 4) == {"replayed": 2, "planned": 1}
        assert jobs.outcomes(tx, job, 0, 2) == {"replayed": 1}
