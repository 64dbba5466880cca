"""A queue that grows while it is drained: a round takes what is there, up to its cut-off, and the next one the rest."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tests.integration.rig import OTHERS, TRANSIENT, Rig

from dlq.intake import take_custody
from dlq.replay import drain_remaining

KINDS = (*TRANSIENT, *OTHERS)


@contextmanager
def growing(rig: Rig) -> Iterator[None]:
    """Dead letters keep coming, 40 at a time, until the body ends, and some more."""
    over = threading.Event()
    begun = threading.Event()

    def grow() -> None:
        while not over.is_set():
            rig.letters(40, kinds=KINDS)
            begun.set()
        rig.letters(40, kinds=KINDS)

    thread = threading.Thread(target=grow)
    thread.start()
    try:
        assert begun.wait(30)
        yield
    finally:
        over.set()
        thread.join()


def test_an_intake_ends_at_its_cut_off_though_the_queue_grows(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(parts=3)
    rig.begin()
    rig.letters(500)
    drain = rig.open()
    with growing(rig):
        done = take_custody(drain, 60)
    assert done["reached"]
    # what came after the cut-off is depth still, none of it lost
    left = drain.depth().entries
    assert left > 0
    assert (rig.count(), rig.count() + left) == (done["taken"], rig.dead_lettered)
    assert take_custody(drain, 60)["taken"] == left
    rig.check_custody()


def test_a_drain_of_a_growing_queue_ends_with_everything_settled_or_open_with_a_reason(
    make_rig: Callable[..., Rig],
) -> None:
    rig = make_rig(parts=6)
    rig.begin()
    consumer = rig.consumer()
    rig.letters(400, kinds=KINDS)
    drain = rig.open()
    with growing(rig):
        take_custody(drain, 60)
        rig.replay(drain)
    done = drain_remaining(drain, 60)
    consumer.stop()
    assert (done["depth"], done["why_stopped"]) == (0, "the queue is empty and nothing is ready")
    rig.check_custody()
    rig.check_nothing_pending()
    by_kind = Counter(KINDS[n % len(KINDS)] for n in range(rig.dead_lettered))
    transient = sum(by_kind[kind] for kind in TRANSIENT)
    assert rig.states() == {
        "confirmed": transient,
        "open:waiting_for_fix": by_kind["QuotaExceeded"]
        + by_kind["MemoryQuotaExceeded"]
        + by_kind["ScopeViolation"],
        "open:waiting_for_person": by_kind["DataCorruption"] + by_kind["PluginError"],
    }
    assert len(rig.check_effects()) == transient
    assert set(consumer.effects.values()) == {1}


def test_partitions_added_while_it_is_drained_are_read_from_their_beginning(
    make_rig: Callable[..., Rig],
) -> None:
    rig = make_rig(parts=2)
    rig.begin()
    rig.consumer()
    rig.letters(100)
    drain = rig.open()
    take_custody(drain, 60)
    rig.add_partitions(rig.dlq, 5)
    rig.letters(200)
    rig.release(drain)
    rig.drain("r2")
    rig.check_custody()
    rig.check_nothing_pending()
    assert len(rig.check_effects()) == 300
    assert {s.part for s in rig.log(rig.dlq)} == set(range(5)), "the new partitions held nothing to find"
