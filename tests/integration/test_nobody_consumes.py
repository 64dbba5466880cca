"""A target that nobody consumes: nothing is sent where nothing could tell what became of it."""

from __future__ import annotations

from collections.abc import Callable

from tests.integration.rig import OTHERS, TRANSIENT, Rig

from dlq.conservation import prove
from dlq.intake import take_custody
from dlq.replay import drain_remaining, replay_canary
from dlq.triage import categorize


def test_a_job_holds_until_somebody_consumes_its_target_and_the_next_drain_sends(
    make_rig: Callable[..., Rig],
) -> None:
    rig = make_rig(limits={"jobs": 2})
    rig.begin()
    rig.letters(90, kinds=(*TRANSIENT, *TRANSIENT, OTHERS[0]))
    transient = sum(n % 7 < 6 for n in range(90))
    held = {"open:nobody_consumes": transient, "open:waiting_for_fix": 90 - transient}

    drain = rig.open("r1")
    take_custody(drain, 30)
    categorize(drain)
    said = replay_canary(drain, "retry_transient", 30)
    assert (said["passed"], said["jobs"]) == (False, [])
    assert "stopped: nobody consumes" in rig.notes(drain)
    assert rig.states() == held
    # not even at its end, and not for want of trying
    done = drain_remaining(drain, 30)
    assert (done["replayed"], done["depth"], done["outstanding"]) == (0, 0, 90)
    assert rig.states() == held
    assert rig.log(rig.origin, "read_uncommitted") == [], "something was sent"
    rig.check_nothing_pending()
    assert prove(drain).broken == []
    rig.release(drain)

    # a group that reads another topic is nobody here
    other = rig.another_topic("other")
    rig.commit(rig.group, other, {0: 0})
    drain = rig.drain("r2")
    assert rig.states() == held
    assert rig.log(rig.origin, "read_uncommitted") == []
    rig.release(drain)

    consumer = rig.consumer()
    drain = rig.drain("r3")
    consumer.stop()
    assert rig.states() == {"confirmed": transient, "open:waiting_for_fix": 90 - transient}
    rig.check_custody()
    rig.check_nothing_pending()
    assert len(rig.check_effects()) == transient
    assert set(consumer.effects.values()) == {1}
    assert prove(drain).broken == []
