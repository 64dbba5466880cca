"""Replays that fail again: each dead letter is linked to its entry, tried again by the next drain, up to a limit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
from tests.integration.rig import Rig, Seen, wait_until

from dlq.conservation import prove
from dlq.replay import drain_remaining

FAILING = (50, 77, 101)
"""None of them in the canary, which is the first 26."""


def order(seen: Seen) -> int:
    return int((seen.key or b"k-1")[1:])


def links(rig: Rig) -> list[tuple[str, str, int]]:
    """Each return's state, that of the entry it is the return of, and how often it has failed."""
    rows = rig.sql(
        "SELECT e.state, o.state AS was, e.attempts FROM entry e JOIN entry o ON o.id = e.return_of "
        "WHERE o.payload_sha = e.payload_sha ORDER BY e.id"
    )
    return [(r.state, r.was, r.attempts) for r in rows]


@pytest.mark.parametrize("keeps", ["headers", "place"])
def test_a_replay_that_fails_again_is_linked_and_sent_once_more_by_the_next_drain(
    make_rig: Callable[..., Rig], keeps: str
) -> None:
    rig = make_rig(parts=1)
    rig.begin()
    consumer = rig.consumer(fails=lambda seen: order(seen) in FAILING, keeps=keeps)
    rig.letters(120)
    first = rig.drain("r1")
    consumer.stop()
    assert [order(s) for s in consumer.failed] == list(FAILING)
    dead = rig.log(rig.dlq)[-len(FAILING) :]
    assert [bool(s.header("dlq-entry")) for s in dead] == [keeps == "headers"] * len(FAILING)
    # not again by the drain that sent them
    assert rig.states() == {"confirmed": 117, "returned": 3, "open:returned": 3}
    assert links(rig) == [("open", "returned", 1)] * 3
    assert prove(first).broken == []
    rig.release(first)
    rig.consumer()
    second = rig.drain("r2")
    assert rig.states() == {"confirmed": 120, "returned": 3}
    assert links(rig) == [("confirmed", "returned", 1)] * 3
    rig.check_custody()
    rig.check_nothing_pending()
    effects = Counter(order(s) for s in rig.check_effects())
    assert effects == Counter([*range(120), *FAILING])
    assert prove(second).broken == []


@pytest.mark.parametrize("keeps", ["headers", "place"])
def test_what_fails_as_often_as_allowed_waits_for_a_person(make_rig: Callable[..., Rig], keeps: str) -> None:
    rig = make_rig(parts=1, limits={"returns": 2})
    rig.begin()
    rig.consumer(fails=lambda seen: order(seen) == 50, keeps=keeps)
    rig.letters(60)
    for run in range(4):
        drain = rig.drain(f"r{run}")
        assert prove(drain).broken == []
        rig.release(drain)
    assert rig.states() == {"confirmed": 59, "returned": 2, "open:returns_limit": 1}
    assert links(rig) == [("returned", "returned", 1), ("open", "returned", 2)]
    rig.check_nothing_pending()
    assert Counter(order(s) for s in rig.check_effects())[50] == 2


def test_a_live_record_that_fails_beside_replays_is_no_return(make_rig: Callable[..., Rig]) -> None:
    """Its dead letter names a place of the target, among those of replays, but nothing of ours was there."""
    rig = make_rig(parts=1)
    rig.begin()
    consumer = rig.consumer(
        fails=lambda seen: seen.value == b"live" and not seen.header("dlq-entry"), keeps="place"
    )
    rig.letters(50)
    drain = rig.drain("r1")
    rig.produce(rig.origin, [(b"k999", b"live", [])])
    rig.letters(50)
    wait_until(lambda: consumer.failed, "the live record's dead letter")
    place = consumer.failed[0].offset
    drain_remaining(drain, 60)
    spans = rig.sql("SELECT MIN(pos) AS low, MAX(pos) AS high FROM delivery")
    assert spans[0].low < place < spans[0].high
    assert links(rig) == []
    assert rig.states() == {"confirmed": 101}
    rig.check_custody()
    assert len(rig.check_effects()) == 101
