"""Each thing that AWS does to a client and an emulator does not, through a proxy that does it: against intake, and
against a replay.
"""

from __future__ import annotations

import json
import time
import uuid
from collections import Counter
from collections.abc import Callable

import pytest
from tests.integration.sqs_rig import SqsRig
from tests.sqs_faults import FAULTS, SqsFaults

from dlq import aws
from dlq.errors import ConfigError
from dlq.intake import take_custody
from dlq.outcome import Outcomes
from dlq.recovery.doubts import resolve
from dlq.selection import Selection
from dlq.triage import assign
from dlq_demo.elasticmq import arn

Make = Callable[..., SqsRig]


def arrived(rig: SqsRig) -> Counter[str]:
    """How often each dead letter's number arrived at the target."""
    receiver = rig.receiver()
    receiver.settle()
    receiver.stop()
    return Counter(one.attributes["size"]["StringValue"] for one in receiver.arrived)


# Replay


@pytest.mark.parametrize(
    ("fault", "state", "came"),
    [
        ("lost", {"ambiguous": 10}, 10),  # taken, and nobody said so
        ("unsent", {"ambiguous": 10}, 0),  # which looks the same
        ("send_500", {"ambiguous": 10}, 10),
        ("unlisted", {"replayed": 9, "ambiguous": 1}, 10),
        ("unlisted_unsent", {"replayed": 9, "ambiguous": 1}, 9),
        ("other_sum", {"replayed": 9, "ambiguous": 1}, 10),
        ("sender_fault", {"replayed": 9, "open:refused:InvalidMessageContents": 1}, 9),
        ("service_fault", {"replayed": 10}, 10),  # certainly not taken: asked again
        ("send_throttled", {"replayed": 10}, 10),
    ],
)
def test_what_a_send_answers(
    make_sqs_rig: Make, sqs_faults: SqsFaults, fault: str, state: dict[str, int], came: int
) -> None:
    rig = make_sqs_rig(endpoint=sqs_faults.endpoint)
    drain = rig.taken(10)
    sqs_faults.next(fault)
    rig.send(drain)
    assert sqs_faults.injected == {fault: 1}
    assert rig.states() == state
    got = arrived(rig)
    assert got.total() == len(got) == came, "something was sent twice"
    calls = sqs_faults.of("SendMessageBatch")
    sent_again = {"service_fault": [10, 1], "send_throttled": [10, 10]}
    assert [len(c["Entries"]) for c in calls] == sent_again.get(fault, [10]), (
        "the client repeated a call by itself"
    )
    rig.check_same_figures(drain)


@pytest.mark.parametrize(
    "fault", ["lost", "unsent", "send_500", "unlisted", "unlisted_unsent", "service_fault", "send_throttled"]
)
def test_what_a_send_to_fifo_leaves_in_doubt_is_sent_again_under_its_id(
    make_sqs_rig: Make, sqs_faults: SqsFaults, fault: str
) -> None:
    rig = make_sqs_rig(endpoint=sqs_faults.endpoint, fifo=True)
    drain = rig.taken(10, groups=10)
    sqs_faults.next(fault)
    rig.send(drain)
    assert rig.states() == {"replayed": 10}
    got = arrived(rig)
    assert got.total() == len(got) == 10
    first, second = sqs_faults.of("SendMessageBatch")
    ids = {e["Id"]: e["MessageDeduplicationId"] for e in first["Entries"]}
    assert ids.items() >= {e["Id"]: e["MessageDeduplicationId"] for e in second["Entries"]}.items()


@pytest.mark.parametrize(("fault", "doubled"), [("lost", 10), ("unsent", 0)])
def test_in_doubt_and_resent_by_policy(
    make_sqs_rig: Make, sqs_faults: SqsFaults, fault: str, doubled: int
) -> None:
    rig = make_sqs_rig(endpoint=sqs_faults.endpoint, target={"on_ambiguous": "resend"})
    drain = rig.taken(10)
    sqs_faults.next(fault)
    rig.send(drain)
    assert rig.states() == {"open:ready": 10}
    rig.send(drain)
    assert rig.states() == {"replayed": 10}
    receiver = rig.receiver()
    receiver.settle()
    figures = rig.check_arrivals(receiver)
    assert (figures.doubled, len(receiver.effects)) == (doubled, 10)


def test_what_may_have_been_sent_and_is_then_refused_stays_in_doubt(
    make_sqs_rig: Make, sqs_faults: SqsFaults
) -> None:
    """A refusal says nothing of the call before; once a person has, it is what it is."""
    rig = make_sqs_rig(endpoint=sqs_faults.endpoint, target={"on_ambiguous": "resend"})
    drain = rig.taken(10)
    sqs_faults.next("lost", "sender_fault", "sender_fault")
    rig.send(drain)
    rig.send(drain)
    assert rig.states() == {"replayed": 9, "ambiguous": 1}
    receiver = rig.receiver()
    receiver.settle()
    figures = rig.check_arrivals(receiver)
    assert (figures.ambiguous_arrived, figures.unrecorded, len(receiver.effects)) == (1, 0, 10)
    rig.check_same_figures(drain)
    resolve(drain, Selection(everything=True), "open", who="p", why="seen at the receiver")
    rig.write("UPDATE entry SET reason = 'ready' WHERE state = 'open'")
    rig.send(drain)
    assert rig.states() == {"replayed": 9, "open:refused:InvalidMessageContents": 1}


@pytest.mark.parametrize("fifo", [False, True])
def test_who_may_not_send_has_nothing_in_doubt(make_sqs_rig: Make, sqs_faults: SqsFaults, fifo: bool) -> None:
    rig = make_sqs_rig(endpoint=sqs_faults.endpoint, fifo=fifo)
    drain = rig.taken(30, groups=10)
    sqs_faults.next(*["send_denied"] * 30)
    with pytest.raises(ConfigError, match="grant sqs:SendMessage"):
        rig.send(drain)
    assert rig.count("state IN ('ambiguous', 'sending')") == 0
    assert arrived(rig).total() == 0


def test_what_was_sent_before_the_right_to_send_was_taken_away_is_known(
    make_sqs_rig: Make, sqs_faults: SqsFaults
) -> None:
    rig = make_sqs_rig(endpoint=sqs_faults.endpoint)
    drain = rig.taken(30)
    sqs_faults.next("fine_send", *["send_denied"] * 30)
    rig.send(drain)
    assert rig.states() == {"replayed": 10, "open:ready": 20}
    assert arrived(rig).total() == 10


def test_of_a_batch_that_is_complained_of_only_the_culprit_stays(
    make_sqs_rig: Make, sqs_faults: SqsFaults
) -> None:
    rig = make_sqs_rig(endpoint=sqs_faults.endpoint)
    rig.begin()
    rig.letters(9)
    rig.letters(1, body="poison")
    drain = rig.open()
    take_custody(drain, 60)
    assign(drain)
    sqs_faults.next(*["complained"] * 20)
    rig.send(drain)
    assert rig.states() == {"replayed": 9, "open:refused:InvalidMessageContents": 1}
    got = arrived(rig)
    assert got.total() == len(got) == 9


def test_where_failures_go_elsewhere_nothing_is_confirmed_by_silence(make_sqs_rig: Make) -> None:
    elsewhere = f"elsewhere-{uuid.uuid4().hex[:8]}"
    policy = {"deadLetterTargetArn": arn(elsewhere), "maxReceiveCount": 1}
    rig = make_sqs_rig(queue_attributes={"RedrivePolicy": json.dumps(policy)}, make_queues=[elsewhere])
    drain = rig.taken(5)
    assert f"goes to {arn(elsewhere)}, not to this DLQ" in rig.notes(drain)
    rig.send(drain)
    assert arrived(rig).total() == 5
    (job,) = rig.sql("SELECT id FROM job")
    Outcomes(drain).wait(job.id, rig.origin, 0, 5, time.monotonic() + 3)
    assert rig.states() == {"replayed": 5}


# Intake

RECEIVING = [f for f, (of, _) in FAULTS.items() if of != "SendMessageBatch" and f != "fine_receive"]


@pytest.mark.parametrize("fault", RECEIVING)
def test_what_receives_deletes_and_counts_answer(
    make_sqs_rig: Make, sqs_faults: SqsFaults, fault: str
) -> None:
    rig = make_sqs_rig(endpoint=sqs_faults.endpoint, tuning={"batch": 20})
    rig.begin()
    rig.letters(60)
    drain = rig.open()
    if fault == "reappear":  # what was deleted
        assert take_custody(drain, 60)["taken"] == 60
    elif FAULTS[fault][0] == "ReceiveMessage":
        sqs_faults.next("fine_receive", "fine_receive")
    sqs_faults.next(*[fault] * 4)
    said = take_custody(drain, 60)
    assert sqs_faults.injected[fault] == 4
    assert said["reached"]
    if fault == "damaged":
        assert rig.count("reason = 'damaged_in_transit'") == rig.count("state = 'open'") - rig.count(
            "reason = 'new'"
        )
        assert rig.count("reason = 'damaged_in_transit'") > 0
        assert rig.count() == 60
        return
    rig.check_custody()
    assert rig.count() == 60
    if fault in ("expired", "undeleted", "duplicate", "reappear"):
        assert said["again"] > 0


def test_empty_answers_and_stale_counts_are_not_an_empty_queue(
    make_sqs_rig: Make, sqs_faults: SqsFaults
) -> None:
    rig = make_sqs_rig(endpoint=sqs_faults.endpoint, source={"quiet": 0.4})
    rig.begin()
    drain = rig.open()
    rig.letters(30)
    sqs_faults.next(*["empty"] * 30, "stale", "stale", "stale")
    said = take_custody(drain, 60)
    assert (said["taken"], said["reached"]) == (30, True)
    assert sqs_faults.injected["empty"] == 30


def test_what_another_consumer_holds_is_waited_for(make_sqs_rig: Make) -> None:
    """A killed process's entries come back when their visibility ends; until then the queue only looks empty."""
    rig = make_sqs_rig()
    rig.begin()
    rig.letters(20)
    got = rig.client.receive_message(QueueUrl=rig.dlq_url, MaxNumberOfMessages=10, VisibilityTimeout=3)
    assert len(got["Messages"]) == 10
    drain = rig.open()
    assert "about 10 messages are in flight" in rig.notes(drain)
    said = take_custody(drain, 60)
    assert (said["taken"], said["reached"]) == (20, True)
    rig.check_custody()


def test_visibility_that_ends_while_a_batch_is_written_costs_nothing(
    make_sqs_rig: Make, sqs_faults: SqsFaults
) -> None:
    """Handles that expired delete nothing (AWS), or what somebody else received: the entry is known by its place."""
    rig = make_sqs_rig(endpoint=sqs_faults.endpoint, source={"visibility": 1})
    rig.begin()
    rig.letters(40)
    sqs_faults.next(*["expired"] * 4)
    drain = rig.open()
    said = take_custody(drain, 60)
    assert said["taken"] == 40
    assert said["again"] >= 10
    rig.check_custody()


# The clients


def test_the_sending_client_makes_each_call_once_and_does_not_wait_long(make_sqs_rig: Make) -> None:
    rig = make_sqs_rig()
    target = rig.open().target
    config = target._once.meta.config
    assert (config.retries["total_max_attempts"], config.connect_timeout, config.read_timeout) == (1, 3, 10)
    assert target._client.meta.config.retries["total_max_attempts"] > 1


def test_a_receive_asks_for_everything_and_holds_it_long_enough(
    make_sqs_rig: Make, sqs_faults: SqsFaults
) -> None:
    rig = make_sqs_rig(endpoint=sqs_faults.endpoint, source={"visibility": 120, "wait": 1})
    rig.begin()
    for call in sqs_faults.of("ReceiveMessage"):
        assert call["VisibilityTimeout"] == 120
        assert call["WaitTimeSeconds"] == 1
        assert call["MaxNumberOfMessages"] == 10
        assert call["MessageAttributeNames"] == call["MessageSystemAttributeNames"] == ["All"]
    receiving = aws.client(rig.connections("aws"), "sqs").meta.config
    assert receiving.read_timeout > aws.LONG_POLL_S
