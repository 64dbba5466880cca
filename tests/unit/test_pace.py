"""How fast a replay goes: by the outcome of the step before, within a ceiling."""

from __future__ import annotations

import time

import pytest

from dlq.pace import CANARY, Pacer, Rate


def test_a_canary_goes_one_five_twenty() -> None:
    pacer = Pacer(100, 0.95, canary=True)
    sizes = []
    for _ in CANARY:
        sizes.append(pacer.size)
        assert pacer.judge(1.0) is None
    assert sizes == [1, 5, 20]
    assert pacer.size == 20


@pytest.mark.parametrize("success", [0.0, 0.5, 0.94])
def test_a_canary_stops_at_the_first_gate_it_misses(success: float) -> None:
    pacer = Pacer(100, 0.95, canary=True)
    assert pacer.judge(1.0) is None
    assert pacer.judge(success) == "gate_failed"


def test_a_job_begins_at_the_batch_and_doubles_while_it_goes_well() -> None:
    pacer = Pacer(100, 0.95)
    sizes = []
    for _ in range(4):
        sizes.append(pacer.size)
        assert pacer.judge(0.95) is None
    assert sizes == [100, 200, 400, 800]


def test_a_missed_gate_halves_the_step_and_a_second_one_stops() -> None:
    pacer = Pacer(100, 0.95)
    assert pacer.judge(0.9) is None
    assert pacer.size == 50
    assert pacer.judge(0.9) == "gate_failed"


def test_a_step_that_goes_well_makes_good_for_one_that_did_not() -> None:
    pacer = Pacer(100, 0.95)
    for _ in range(5):
        assert pacer.judge(0.9) is None
        assert pacer.judge(1.0) is None


def test_a_burst_of_returns_stops_at_once() -> None:
    assert Pacer(100, 0.95).judge(0.49) == "gate_failed"
    assert Pacer(100, 0.95).judge(0.5) is None


def test_a_step_is_never_smaller_than_one() -> None:
    pacer = Pacer(1, 0.95)
    assert pacer.judge(0.9) is None
    assert pacer.size == 1


def test_nothing_known_stops() -> None:
    for canary in (True, False):
        assert Pacer(100, 0.95, canary=canary).judge(None) == "no_outcome"


def test_without_a_ceiling_nothing_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _s: pytest.fail("waited"))
    rate = Rate(None)
    for _ in range(5):
        rate.wait(1_000_000)
    assert rate.room(1_000) == 1_000


class Clock:
    """A clock that only sleeping moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1_000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        monkeypatch.setattr(time, "sleep", self._sleep)

    def _sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds


def test_a_ceiling_is_kept_over_any_number_of_transactions(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    rate = Rate(50)
    began = clock.now
    for _ in range(10):
        rate.wait(25)
    # the first goes at once, each of the others when the one before it is paid for
    assert clock.now - began == pytest.approx(9 * 25 / 50)


def test_a_pause_is_not_made_up_for(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    rate = Rate(50)
    rate.wait(50)
    clock.now += 3600
    before = clock.now
    for _ in range(3):
        rate.wait(50)
    assert clock.now - before == pytest.approx(2)


@pytest.mark.parametrize(("rate", "room"), [(0.5, 1), (7.9, 7), (5_000, 1_000)])
def test_a_transaction_carries_at_most_a_seconds_worth(rate: float, room: int) -> None:
    assert Rate(rate).room(1_000) == room
