"""The broker is killed in the middle: intake and replay go on when it is back, and nothing is lost or doubled."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from tests.integration.rig import TRANSIENT, Rig, rigs, wait_until

from dlq.conservation import prove
from dlq.errors import TargetError
from dlq.ports import Output
from dlq.targets import kafka as targets
from dlq_demo.broker import Broker

pytestmark = pytest.mark.slow

AWAY_S = 1.0
POINTS = ("produced:6", "uncommitted:6", "committed:6")
"""In the batches: the canary and the cursors of both jobs are the first five transactions."""


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """A broker that only these tests use."""
    with Broker(tmp_path_factory.mktemp("broker") / "kafka") as running:
        yield running


@pytest.fixture
def make_rig(own: Broker, tmp_path: Path) -> Iterator[Callable[..., Rig]]:
    yield from rigs(own.bootstrap, tmp_path)


def killed_at(broker: Broker, rig: Rig, run: str, steps: Sequence[str], point: str) -> list[str]:
    """Run ``steps``; the broker is killed when the process comes to ``point``, and is back a second later. What ends
    with an error is tried again, as its task would be; returns those errors.
    """
    process = rig.worker(f"open:{run}", *steps, stop=point)
    process.wait_stopped()
    broker.kill()
    process.wake()
    time.sleep(AWAY_S)
    broker.start()
    errors: list[str] = []
    while code := process.wait(120):
        said = process.said("error")
        assert code == 3, process.words()
        assert said is not None
        assert not said["fenced"], process.words()
        errors.append(f"{point}: {said['at']}: {said['text']}")
        assert len(errors) <= 3, errors
        process = rig.worker(f"attach:{run}", *steps)
    print(errors or f"{point}: it waited for the broker")
    return errors


def test_an_intake_goes_on_when_its_broker_is_back(own: Broker, make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(parts=3, tuning={"lease_s": 0.2, "batch": 100})
    rig.begin()
    for run, point in enumerate(("read:2", "untold:2")):
        rig.letters(600)
        killed_at(own, rig, f"r{run}", ["take"], point)
    rig.check_custody()
    assert rig.count() == 1_200
    drain = rig.open("looks-afterwards")
    assert drain.depth().entries == 0
    assert rig.committed(f"dlq-drain.{rig.queue}", rig.dlq) == rig.ends(rig.dlq)


def test_a_replay_goes_on_when_its_broker_is_back(own: Broker, make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(parts=3, tuning={"lease_s": 0.2, "records": 50})
    rig.begin()
    consumer = rig.consumer()
    steps = ["take", "categorize", "canary", "batches", "remaining"]
    for run, point in enumerate(POINTS):
        rig.letters(400, kinds=TRANSIENT)
        killed_at(own, rig, f"r{run}", steps, point)
    consumer.stop()
    rig.check_custody()
    rig.check_nothing_pending()
    assert len(rig.check_effects()) == 400 * len(POINTS)
    assert rig.states() == {"confirmed": 400 * len(POINTS)}
    assert set(consumer.effects.values()) == {1}
    assert prove(rig.attach(f"r{len(POINTS) - 1}")).broken == []


def test_a_commit_that_the_client_never_ends_is_given_up(
    own: Broker, make_rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the group's coordinator away it has no time-out of its own; the next writer takes over."""
    rig = make_rig(parts=1)
    rig.begin()
    target = rig.open("r1").target
    monkeypatch.setattr(targets, "_COMMIT_WITHIN_S", 3.0)
    output = Output(0, b"k", b"v", (), None)
    with target.writer("j", rig.origin, "{}") as writer:
        writer.produce([output])
        writer.flush()
        own.kill()
        try:
            with pytest.raises(TargetError, match="hangs"):
                writer.commit(1)
        finally:
            own.start()
    with target.writer("j", rig.origin, "{}") as writer:
        assert writer.cursor() is None
        writer.send([output], 1)
        assert writer.cursor() == 1
    assert [s.value for s in rig.log(rig.origin)] == [b"v"]


def test_the_groups_progress_is_known_again_when_its_broker_is_back(
    own: Broker, make_rig: Callable[..., Rig]
) -> None:
    rig = make_rig(parts=1)
    rig.begin()
    rig.produce(rig.origin, [(b"k", b"v", [])])
    consumer = rig.consumer()
    target = rig.open("r1").target
    wait_until(lambda: target.progress(rig.origin) == {0: 1}, "the group reads")
    consumer.stop()
    for _ in range(2):
        own.kill()
        own.start()
        assert target.progress(rig.origin) == {0: 1}


def test_a_writer_that_slept_past_its_transaction_and_was_not_replaced_goes_on(
    make_rig: Callable[..., Rig],
) -> None:
    rig = make_rig(parts=1, tuning={"records": 50})
    rig.begin()
    rig.consumer()
    rig.letters(300, kinds=TRANSIENT)
    process = rig.worker(
        "open:r1", "take", "categorize", "canary", "batches", "remaining", stop="uncommitted:5"
    )
    process.wait_stopped()
    time.sleep(18)  # the broker has ended the transaction, and fenced whoever began it
    process.wake()
    assert process.wait(120) == 0, process.words()
    assert rig.states() == {"confirmed": 300}
    assert len(rig.check_effects()) == 300
