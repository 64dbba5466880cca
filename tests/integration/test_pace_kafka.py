"""A replay goes no faster than its outcomes and the target's consumers allow: on a real broker."""

from __future__ import annotations

from collections.abc import Callable

from tests.integration.rig import Rig

from dlq import plan
from dlq.conservation import prove
from dlq.drain import Drain
from dlq.intake import take_custody
from dlq.replay import replay_batches
from dlq.triage import categorize


def one_job(rig: Rig, count: int) -> tuple[Drain, str]:
    """A drain with one job of all that is in the queue, without a canary before it."""
    rig.letters(count)
    drain = rig.open("r1")
    take_custody(drain, 30)
    categorize(drain)
    (job,) = plan.make(drain, "retry_transient", plan.ready(drain), who="w", saw="s", canary=False)
    return drain, job.id


def test_a_burst_of_returns_stops_a_large_step_while_it_is_sent(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(limits={"batch": 3_000, "rate": 2_000})
    rig.begin()
    consumer = rig.consumer(fails=lambda _: True)
    drain, job = one_job(rig, 3_000)
    done = replay_batches(drain, job, 60)
    assert done["ended"] == "burst_of_returns"
    assert 500 <= done["sent"] < 3_000
    assert done["returned"] == done["sent"]
    consumer.stop()
    assert rig.states() == {
        "returned": done["sent"],
        "open:returned": done["sent"],
        "open:gate_failed": 3_000 - done["sent"],
    }
    assert "stopped: burst of returns" in rig.notes(drain)
    assert len(rig.check_effects()) == done["sent"]
    rig.check_custody()
    rig.check_nothing_pending()
    assert prove(drain).broken == []


def test_consumers_that_stand_still_are_not_sent_more_than_the_bound(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(limits={"batch": 1_000, "lag": 100}, outcome={"deadline": "1s"})
    rig.begin()
    rig.commit(rig.group, rig.origin, dict.fromkeys(rig.ends(rig.origin), 0))
    drain, job = one_job(rig, 1_000)
    done = replay_batches(drain, job, 60)
    assert (done["sent"], done["ended"]) == (100, "consumers_lag")
    assert rig.states() == {"replayed": 100, "open:consumers_lag": 900}
    assert "limits.lag is 100" in rig.notes(drain)
    assert len(rig.check_effects()) == 100
    rig.release(drain)

    consumer = rig.consumer()
    drain = rig.drain("r2")
    consumer.stop()
    assert rig.states() == {"confirmed": 1_000}
    assert set(consumer.effects.values()) == {1}
    rig.check_custody()
    rig.check_nothing_pending()
    assert len(rig.check_effects()) == 1_000
    assert prove(drain).broken == []
