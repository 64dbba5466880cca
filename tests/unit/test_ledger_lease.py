"""The queue's lease: one holder, a grace for the clocks, an epoch that fences the ones before."""

from __future__ import annotations

import threading

import pytest
from sqlalchemy.exc import SQLAlchemyError
from tests.ledger_rig import DRAIN, QUEUE, LedgerRig

from dlq import clock
from dlq.errors import Fenced, QueueBusy
from dlq.ledger import Ledger, lease

OTHER = "orders-000000000002"


def until(rig: LedgerRig, seconds: float) -> None:
    """Have the lease end ``seconds`` from now."""
    rig.execute("UPDATE queue SET lease_until = :u", u=clock.after(seconds))


def test_the_first_lease_has_epoch_one(ledger_rig: LedgerRig) -> None:
    assert ledger_rig.epoch == 1
    assert ledger_rig.one("SELECT holder, epoch FROM queue") == (DRAIN, 1)


def test_while_one_holds_the_queue_it_is_busy_for_every_other(ledger_rig: LedgerRig) -> None:
    with pytest.raises(QueueBusy, match=DRAIN):
        ledger_rig.acquire(OTHER)
    assert ledger_rig.one("SELECT holder, epoch FROM queue") == (DRAIN, 1)


def test_a_take_over_waits_out_the_grace(ledger_rig: LedgerRig) -> None:
    until(ledger_rig, -lease.GRACE_S + 5)
    with pytest.raises(QueueBusy):
        ledger_rig.acquire(OTHER)
    until(ledger_rig, -lease.GRACE_S - 1)
    assert ledger_rig.acquire(OTHER) == 2


def test_a_lease_taken_under_a_clock_far_ahead_holds_nobody_off(ledger_rig: LedgerRig) -> None:
    until(ledger_rig, 365 * 86_400)
    assert ledger_rig.acquire(OTHER) == 2
    with pytest.raises(Fenced):
        lease.held(ledger_rig.ledger, QUEUE, DRAIN, 1)


def test_no_lease_is_so_long_that_it_would_pass_for_one_of_a_wrong_clock(ledger_rig: LedgerRig) -> None:
    lease.extend(ledger_rig.ledger, QUEUE, 1, 365 * 86_400)
    with pytest.raises(QueueBusy):
        ledger_rig.acquire(OTHER)


def test_the_one_taken_over_is_fenced(ledger_rig: LedgerRig) -> None:
    until(ledger_rig, -60)
    ledger_rig.acquire(OTHER)
    with pytest.raises(Fenced), ledger_rig.ledger.write(QUEUE, 1):
        pass
    with pytest.raises(Fenced):
        lease.held(ledger_rig.ledger, QUEUE, DRAIN, 1)
    with pytest.raises(Fenced):
        lease.extend(ledger_rig.ledger, QUEUE, 1, 600)
    lease.held(ledger_rig.ledger, QUEUE, OTHER, 2)


def test_a_holder_that_asks_again_gets_a_new_epoch_which_fences_its_older_try(ledger_rig: LedgerRig) -> None:
    assert ledger_rig.acquire() == 2
    with pytest.raises(Fenced), ledger_rig.ledger.write(QUEUE, 1):
        pass
    assert ledger_rig.one("SELECT COUNT(*) FROM drain") == 1


def test_a_released_queue_is_free_at_once_and_releasing_twice_is_fine(ledger_rig: LedgerRig) -> None:
    for _ in range(2):
        lease.release(ledger_rig.ledger, QUEUE, DRAIN, 1, "green")
    assert ledger_rig.one("SELECT verdict, phase FROM drain") == ("green", "closed")
    assert ledger_rig.acquire(OTHER) == 2


def test_a_zombies_release_does_not_free_the_queue_of_its_successor(ledger_rig: LedgerRig) -> None:
    until(ledger_rig, -60)
    ledger_rig.acquire(OTHER)
    lease.release(ledger_rig.ledger, QUEUE, DRAIN, 1, "red")
    assert ledger_rig.one("SELECT holder, epoch FROM queue") == (OTHER, 2)


def test_an_older_trys_release_does_not_close_the_newer_one(ledger_rig: LedgerRig) -> None:
    ledger_rig.acquire()
    lease.release(ledger_rig.ledger, QUEUE, DRAIN, 1, "refused")
    assert ledger_rig.one("SELECT holder, epoch FROM queue") == (DRAIN, 2)
    assert ledger_rig.one("SELECT closed_at, verdict FROM drain") == (None, None)


def test_a_lease_is_extended_and_never_shortened(ledger_rig: LedgerRig) -> None:
    before = ledger_rig.one("SELECT lease_until FROM queue")
    lease.extend(ledger_rig.ledger, QUEUE, 1, 1)
    assert ledger_rig.one("SELECT lease_until FROM queue") == before
    lease.extend(ledger_rig.ledger, QUEUE, 1, 3600)
    assert ledger_rig.one("SELECT lease_until FROM queue") > before


def test_an_epoch_is_higher_than_any_seen_outside(ledger_rig: LedgerRig) -> None:
    """After a rebuild the archive may know more epochs than the ledger."""
    assert ledger_rig.acquire(floor=41) == 42


def test_a_queue_opened_again_keeps_its_account(ledger_rig: LedgerRig) -> None:
    """unsettled before + taken = settled + unsettled, also when the drain was opened a second time in its middle."""
    lease.release(ledger_rig.ledger, QUEUE, DRAIN, 1, "green")
    for state in ("open", "planned", "confirmed"):
        ledger_rig.entry(state)
    ledger_rig.acquire(OTHER)
    before = ledger_rig.one("SELECT open_before FROM drain WHERE id = :d", d=OTHER)
    assert before == 2
    ledger_rig.entry(taken_drain=OTHER)
    ledger_rig.entry("confirmed", taken_drain=OTHER, settled_drain=OTHER)
    ledger_rig.entry("discarded", settled_drain=OTHER)  # one of those before, settled by this drain
    ledger_rig.acquire(OTHER)
    again = ledger_rig.one("SELECT open_before FROM drain WHERE id = :d", d=OTHER)
    taken = ledger_rig.one("SELECT COUNT(*) FROM entry WHERE taken_drain = :d", d=OTHER)
    settled = ledger_rig.one("SELECT COUNT(*) FROM entry WHERE settled_drain = :d", d=OTHER)
    unsettled = ledger_rig.one("SELECT COUNT(*) FROM entry WHERE settled_drain IS NULL")
    assert again + taken == settled + unsettled


def test_only_one_of_many_gets_a_free_queue(ledger_rig: LedgerRig) -> None:
    lease.release(ledger_rig.ledger, QUEUE, DRAIN, 1, "green")
    got: list[int] = []
    busy: list[str] = []
    barrier = threading.Barrier(4)

    def take(holder: str) -> None:
        ledger = Ledger.open(ledger_rig.url)
        barrier.wait(30)
        try:
            got.append(
                lease.acquire(ledger, QUEUE, holder, run_id=holder, kind="drain", seconds=300, config="{}")
            )
        except QueueBusy:
            busy.append(holder)
        finally:
            ledger.close()

    threads = [threading.Thread(target=take, args=(f"orders-{n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert got == [2]
    assert len(busy) == 3


def test_only_one_of_many_gets_a_queue_nobody_ever_held(ledger_url: str) -> None:
    outcomes: list[str] = []
    barrier = threading.Barrier(4)

    def take(holder: str) -> None:
        ledger = Ledger.open(ledger_url)
        barrier.wait(30)
        try:
            lease.acquire(ledger, QUEUE, holder, run_id=holder, kind="drain", seconds=300, config="{}")
            outcomes.append("held")
        except (QueueBusy, SQLAlchemyError) as error:
            outcomes.append(type(error).__name__)
        finally:
            ledger.close()

    threads = [threading.Thread(target=take, args=(f"orders-{n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(outcomes) == ["QueueBusy", "QueueBusy", "QueueBusy", "held"]


def test_an_incident_is_opened_with_the_first_drain_and_joined_by_the_next(ledger_rig: LedgerRig) -> None:
    lease.release(ledger_rig.ledger, QUEUE, DRAIN, 1, "green")
    ledger_rig.acquire(OTHER)
    assert ledger_rig.one("SELECT COUNT(*) FROM incident") == 1
    lease.release(ledger_rig.ledger, QUEUE, OTHER, 2, "green")
    ledger_rig.execute("UPDATE incident SET closed_at = :t", t=clock.now())
    ledger_rig.acquire("orders-review", kind="review")
    assert ledger_rig.one("SELECT incident FROM drain WHERE id = 'orders-review'") is None
    lease.release(ledger_rig.ledger, QUEUE, "orders-review", 3, "green")
    ledger_rig.acquire("orders-000000000003")
    assert ledger_rig.one("SELECT COUNT(*) FROM incident") == 2
