"""Two at once on an SQS queue, one of them asleep; and one that is told to end."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest
from tests.integration.rig import wait_until
from tests.integration.sqs_rig import SqsRig

from dlq.intake import take_custody
from dlq.replay import drain_remaining

Make = Callable[..., SqsRig]


@pytest.mark.parametrize(
    ("point", "successor"),
    [
        ("sending:2", "the retry of its own drain"),
        pytest.param("calling:3", "a new drain", marks=pytest.mark.slow),
        pytest.param("sent:2", "the retry of its own drain", marks=pytest.mark.slow),
    ],
)
def test_a_job_that_slept_while_it_sent_doubles_nothing(
    make_sqs_rig: Make, point: str, successor: str
) -> None:
    """What it had marked is in doubt for its successor; woken, it may send that, and nothing more."""
    rig = make_sqs_rig(tuning={"records": 40}, limits={"batch": 40})
    rig.begin()
    receiver = rig.receiver()
    rig.letters(120)
    sleeper = rig.worker("open:r1", "take", "categorize", "canary", "batches", stop=point)
    sleeper.wait_stopped()
    marked = rig.count("state = 'sending'")
    assert marked
    if successor == "a new drain":
        rig.expire_lease()
        after = rig.open("r2")
    else:
        after = rig.attach("r1")
    rig.replay(after)
    drain_remaining(after, 60)
    sleeper.wake()
    sleeper.expect_fenced()
    receiver.settle()
    rig.check_nothing_pending()
    figures = rig.check_arrivals(receiver)
    assert (figures.ambiguous, figures.sent, figures.doubled, figures.unrecorded) == (
        marked,
        120 - marked,
        0,
        0,
    )
    rig.check_same_figures(after)


@pytest.mark.parametrize("point", ["received:1", "segment:1", "undeleted:1", "deleted:1"])
def test_an_intake_that_slept_through_its_successor_changes_nothing(make_sqs_rig: Make, point: str) -> None:
    rig = make_sqs_rig(tuning={"batch": 30})
    rig.begin()
    rig.letters(90)
    sleeper = rig.worker("open:r1", "take", stop=point)
    sleeper.wait_stopped()
    rig.expire_lease()
    after = rig.open("r2")
    take_custody(after, 60)
    rig.letters(30)
    sleeper.wake()
    sleeper.expect_fenced()
    take_custody(after, 60)
    rig.check_custody()
    assert rig.count() == 120


def test_an_intake_told_to_end_gives_back_what_is_in_flight(make_sqs_rig: Make) -> None:
    """SIGTERM raises where a task is (its on_kill, the command's handler): its messages are visible at once."""
    rig = make_sqs_rig(source={"visibility": 600}, tuning={"batch": 100})
    rig.begin()
    rig.letters(300)
    worker = rig.worker("open:r1", "take", stop="undeleted:1")
    worker.wait_stopped()
    flying = int(counts(rig)["ApproximateNumberOfMessagesNotVisible"])
    assert flying > 100, "it had read ahead"
    os.kill(worker.pid, signal.SIGTERM)
    worker.wake()
    code = worker.wait(30)
    assert code not in (0, -signal.SIGKILL)
    wait_until(
        lambda: counts(rig)["ApproximateNumberOfMessagesNotVisible"] == "0",
        "everything is given back",
        seconds=5,
    )
    kept = rig.count()
    assert int(counts(rig)["ApproximateNumberOfMessages"]) + kept >= 300
    rig.expire_lease()
    take_custody(rig.open("r2"), 60)
    rig.check_custody()


def counts(rig: SqsRig) -> dict[str, str]:
    return dict(rig.client.get_queue_attributes(QueueUrl=rig.dlq_url, AttributeNames=["All"])["Attributes"])
