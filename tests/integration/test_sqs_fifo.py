"""FIFO: the order of a message group is held through kills and failures, and nothing is swallowed unseen."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable

import pytest
from tests.integration.rig import finish, random_kills, seeded
from tests.integration.sqs_rig import Receiver, SqsRig
from tests.sqs_faults import SqsFaults

from dlq import plan, sending
from dlq.intake import take_custody
from dlq.replay import drain_remaining

Make = Callable[..., SqsRig]


def by_group(receiver: Receiver) -> dict[str, list[int]]:
    found: dict[str, list[int]] = defaultdict(list)
    for one in receiver.arrived:
        found[one.system["MessageGroupId"]].append(int(one.attributes["size"]["StringValue"]))
    return found


def received(rig: SqsRig) -> Receiver:
    receiver = rig.receiver()
    receiver.settle()
    return receiver


@pytest.mark.slow
def test_the_order_of_a_group_outlives_kills(make_sqs_rig: Make) -> None:
    """What a kill leaves in doubt is sent again under its id: nothing doubled, nothing in doubt, in order."""
    kills, entries = 24, 1_200
    choose, began = seeded("sqs fifo", 20_251_128), time.monotonic()
    rig = make_sqs_rig(fifo=True, tuning={"lease_s": 0.2, "batch": 100, "records": 40}, limits={"batch": 30})
    rig.begin()
    receiver = rig.receiver()
    points = ("received", "undeleted", "marked", "sending", "calling", "called", "sent", "answered")
    deaths = random_kills(choose, kills, points, most=6, seconds=3.0)
    fresh = [choose.random() < 0.5 for _ in range(kills + 1)]
    print(deaths)
    steps = ("take", "categorize", "canary", "batches", "remaining")
    killed = finish(
        rig,
        steps,
        deaths,
        new_drain=lambda n: fresh[n],
        before=lambda: rig.letters(entries // kills, groups=7),
    )
    for n in range(8):  # what waited for an earlier one of its group is ready in the next drain
        if rig.states() == {"confirmed": rig.count()} and rig.count() == rig.dead_lettered:
            break
        rig.worker(f"open:after{n}", *steps, "release").expect_done()
    after = rig.open("proof")
    take_custody(after, 60)
    receiver.settle()
    figures = rig.check_arrivals(receiver)
    print(f"{killed} of {kills} were killed at work, {time.monotonic() - began:.0f} s")
    assert (figures.sent, figures.ambiguous, figures.doubled) == (entries // kills * kills, 0, 0)
    groups = by_group(receiver)
    assert all(numbers == sorted(numbers) for numbers in groups.values())
    assert len(groups) == 7
    rig.check_same_figures(after)
    assert killed >= kills * 4 // 5


def test_equal_bodies_arrive_both_at_a_queue_that_deduplicates_by_content(make_sqs_rig: Make) -> None:
    rig = make_sqs_rig(fifo=True, queue_attributes={"ContentBasedDeduplication": "true"})
    drain = rig.taken(2, groups=1, body="the same")
    rig.send(drain)
    assert rig.states() == {"replayed": 2}
    assert by_group(received(rig)) == {"g0": [0, 1]}


@pytest.mark.parametrize("window", [6, 200])
def test_a_failure_holds_back_what_comes_later_in_its_group_and_in_no_other(
    make_sqs_rig: Make, sqs_faults: SqsFaults, monkeypatch: pytest.MonkeyPatch, window: int
) -> None:
    monkeypatch.setattr(sending, "WINDOW", window)
    rig = make_sqs_rig(fifo=True, endpoint=sqs_faults.endpoint)
    drain = rig.taken(30, groups=3)
    sqs_faults.next("fine_send", "sender_fault")  # the second wave's last
    rig.send(drain)
    assert rig.states() == {
        "replayed": 21,
        "open:refused:InvalidMessageContents": 1,
        "open:earlier_entry_of_key": 8,
    }
    receiver = received(rig)
    groups = by_group(receiver)
    assert sorted(len(numbers) for numbers in groups.values()) == [1, 10, 10]
    for call in sqs_faults.of("SendMessageBatch"):
        held = [entry["MessageGroupId"] for entry in call["Entries"]]
        assert len(held) == len(set(held)), "two of a group in one call"
    assert plan.make(drain, "s", plan.ready(drain), who="p", saw="s") == [], "a later one overtakes the first"
    # once that is settled, the others are sent in order
    rig.write("UPDATE entry SET reason = 'ready' WHERE reason LIKE 'refused%'")
    for _ in range(2):
        drain_remaining(drain, 60)
    receiver.settle()
    assert all(numbers == sorted(numbers) and len(numbers) == 10 for numbers in by_group(receiver).values())


def test_what_a_killed_try_sent_is_sent_again_within_the_time_of_deduplication(make_sqs_rig: Make) -> None:
    rig = make_sqs_rig(fifo=True, tuning={"records": 6, "lease_s": 0.2})
    rig.begin()
    receiver = rig.receiver()
    rig.letters(12, groups=3)
    rig.worker("open:r1", "take", "categorize", "canary", die="called:2").expect_killed()
    (marked,) = rig.sql("SELECT COUNT(*) FROM entry WHERE state = 'sending'")[0]
    assert marked
    drain = rig.open("r2")
    assert f"{marked} were sent again under the same deduplication ids" in rig.notes(drain)
    states = rig.states()
    assert "ambiguous" not in states
    assert "sending" not in states
    receiver.settle()
    assert rig.check_arrivals(receiver).doubled == 0


@pytest.mark.parametrize(("policy", "state"), [("hold", "ambiguous"), ("resend", "open:ready")])
def test_what_is_older_than_the_time_of_deduplication_is_in_doubt(
    make_sqs_rig: Make, policy: str, state: str
) -> None:
    rig = make_sqs_rig(fifo=True, tuning={"records": 6, "lease_s": 0.2}, target={"on_ambiguous": policy})
    rig.begin()
    rig.receiver()
    rig.letters(12, groups=12)
    rig.worker("open:r1", "take", "categorize", "canary", die="sent:2").expect_killed()
    marked = rig.count("state = 'sending'")
    rig.write("UPDATE delivery SET sent_at = '2025-01-01T00:00:00.000+00:00' WHERE ref IS NULL")
    rig.open("r2")
    assert rig.states()[state] >= marked
    assert rig.count("state = 'sending'") == 0


def test_a_send_that_was_swallowed_is_not_taken_for_one(
    make_sqs_rig: Make, sqs_faults: SqsFaults, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQS answers with the message that it had: the ledger has it, too."""
    monkeypatch.setattr(sending, "WINDOW", 1)
    rig = make_sqs_rig(fifo=True, endpoint=sqs_faults.endpoint)
    drain = rig.taken(3, groups=1)
    sqs_faults.next("fine_send", "swallowed")
    rig.send(drain)
    assert rig.states() == {"replayed": 1, "open:swallowed": 1, "open:earlier_entry_of_key": 1}
    assert len(received(rig).arrived) == 1


def test_a_zombie_of_fifo_changes_no_order(make_sqs_rig: Make) -> None:
    rig = make_sqs_rig(fifo=True, tuning={"records": 6})
    rig.begin()
    receiver = rig.receiver()
    rig.letters(30, groups=3)
    sleeper = rig.worker("open:r1", "take", "categorize", "canary", "batches", stop="calling:3")
    sleeper.wait_stopped()
    rig.expire_lease()
    after = rig.open("r2")
    take_custody(after, 60)
    for _ in range(3):
        drain_remaining(after, 60)
    sleeper.wake()
    sleeper.expect_fenced()
    receiver.settle()
    figures = rig.check_arrivals(receiver)
    assert (figures.sent, figures.doubled) == (30, 0)
    assert all(numbers == sorted(numbers) for numbers in by_group(receiver).values())
