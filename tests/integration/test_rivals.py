"""Two at once on one queue: the second is refused, or takes over and the first is fenced, however late it wakes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tests.integration.rig import Rig, wait_until

from dlq.errors import Fenced, QueueBusy
from dlq.intake import take_custody
from dlq.jobs import JobRun
from dlq.outcome import Outcomes
from dlq.replay import drain_remaining, replay_batches, replay_canary
from dlq.targets.kafka import KafkaReplay, KafkaWriter
from dlq.triage import categorize


def test_a_second_drain_of_a_queue_is_refused_while_the_first_lives(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig()
    first = rig.open("first")
    with pytest.raises(QueueBusy, match=first.id):
        rig.open("second")
    take_custody(first, 30)  # and the first is none the worse
    rig.release(first)
    rig.open("second")


def test_a_drain_whose_lease_was_taken_over_is_fenced_in_every_stage(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig()
    rig.begin()
    rig.consumer()
    rig.letters(200)
    first = rig.open("first")
    take_custody(first, 30)
    categorize(first)
    jobs = replay_canary(first, "retry_transient", 30)["jobs"]
    running = JobRun(first, jobs[0])
    running.__enter__()
    running.send(50, 1e12)
    rig.expire_lease()
    second = rig.open("second")
    before = rig.states()
    rig.letters(10)
    for act in (
        lambda: take_custody(first, 30),
        lambda: categorize(first),
        lambda: replay_canary(first, "retry_transient", 30),
        lambda: replay_batches(first, jobs[0], 30),
        lambda: drain_remaining(first, 30),
        lambda: Outcomes(first).look(jobs[0], rig.origin, 0, 50, 30),
        lambda: first.extend(60),
        lambda: first.phase("verify"),
        lambda: running.send(100, 1e12),
        lambda: rig.attach("first"),
    ):
        with pytest.raises(Fenced):
            act()
    running.__exit__(None, None, None)
    assert rig.states() == before, "a fenced drain changed an entry"
    rig.release(first)  # what its teardown would do: the second's lease is not its to give up
    second.extend(60)
    take_custody(second, 30)
    rig.replay(second)
    drain_remaining(second, 30)
    rig.check_custody()
    rig.check_nothing_pending()
    assert len(rig.check_effects()) == 210


@pytest.mark.parametrize("successor", ["the retry of its own drain", "a new drain"])
@pytest.mark.parametrize("point", ["ranged", "read:2", "segment:2", "untold:2", "told:2"])
def test_an_intake_that_slept_through_its_successor_changes_nothing(
    make_rig: Callable[..., Rig], point: str, successor: str
) -> None:
    rig = make_rig(parts=3, tuning={"batch": 150})
    rig.begin()
    rig.letters(600)
    sleeper = rig.worker("open:r1", "take", stop=point)
    sleeper.wait_stopped()
    if successor == "a new drain":
        rig.expire_lease()
        after = rig.open("r2")
    else:
        after = rig.attach("r1")
    take_custody(after, 30)
    rig.letters(300)
    sleeper.wake()
    sleeper.expect_fenced()
    take_custody(after, 30)
    rig.check_custody()
    assert rig.count() == 900
    # What the sleeper told the queue last may be behind; the ledger's position holds.
    rig.release(after)
    assert rig.open("r3").depth().entries == 0


@pytest.mark.parametrize("successor", ["the retry of its own drain", "a new drain"])
@pytest.mark.parametrize(
    "point", ["claimed:2", "fenced:2", "cursor:2", "produced:3", "uncommitted:3", "committed:3", "unclosed:2"]
)
def test_a_job_that_slept_through_its_successor_sends_nothing_more(
    make_rig: Callable[..., Rig], point: str, successor: str
) -> None:
    rig = make_rig(parts=3, tuning={"records": 40})
    rig.begin()
    consumer = rig.consumer()
    rig.letters(400)
    sleeper = rig.worker("open:r1", "take", "categorize", "canary", "batches", "remaining", stop=point)
    sleeper.wait_stopped()
    if successor == "a new drain":
        rig.expire_lease()
        after = rig.open("r2")
    else:
        after = rig.attach("r1")
    rig.replay(after)
    sleeper.wake()
    # Woken where it would only look, it may find that all is done; woken with something to send, it must be stopped.
    sleeper.expect_fenced(or_done=point in ("fenced:2", "unclosed:2"))
    drain_remaining(after, 60)
    consumer.stop()
    rig.check_nothing_pending()
    assert len(rig.check_effects(when=f"woken at {point} after {successor}")) == 400
    assert set(consumer.effects.values()) == {1}


@pytest.mark.parametrize("successor", ["the retry of its own drain", "a new drain"])
def test_a_job_that_wakes_while_its_successor_opens_it_sends_nothing(
    make_rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch, successor: str
) -> None:
    """It slept before it fenced anybody, and wakes just after its successor did: the target takes it for the
    newer one.
    """
    rig = make_rig(tuning={"records": 40})
    rig.begin()
    consumer = rig.consumer()
    rig.letters(200)
    rig.worker("open:r1", "take", "categorize", "canary", "batches", die="committed:7").expect_killed()
    sleeper = rig.worker("attach:r1", "canary", "batches", stop=["claimed:1", "uncommitted:1"])
    sleeper.wait_stopped()
    read, met = KafkaWriter.cursor, False

    def meet(writer: KafkaWriter) -> int | None:
        nonlocal met
        if not met:
            met = True
            sleeper.wake()
            wait_until(lambda: sleeper.ended or sleeper.stopped, "the sleeper got as far as it can")
        return read(writer)

    if successor == "a new drain":
        rig.expire_lease()
        with monkeypatch.context() as patched:
            # the preflight's writer has nobody to meet
            patched.setattr(KafkaReplay, "preflight", lambda _: [])
            patched.setattr(KafkaWriter, "cursor", meet)
            after = rig.open("r2")
        rig.replay(after)
    else:
        after = rig.attach("r1")
        with monkeypatch.context() as patched:
            patched.setattr(KafkaWriter, "cursor", meet)
            try:
                rig.replay(after)
            except Fenced:  # by the sleeper, which stops itself: another try goes on
                rig.replay(after)
    assert met
    if sleeper.stopped:
        sleeper.wake()
    sleeper.expect_fenced()
    drain_remaining(after, 60)
    consumer.stop()
    rig.check_nothing_pending()
    assert len(rig.check_effects()) == 200
