"""Intake killed at every point and at random ones: each dead letter is in custody exactly once, byte for byte."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tests.integration.rig import OTHERS, TRANSIENT, Rig, finish, random_kills, seeded

POINTS = ("ranged", "read", "segment", "rows", "untold", "told")


def check(rig: Rig, count: int) -> None:
    rig.check_custody()
    assert rig.count() == count
    # The positions stand at the end, and a drain opened afterwards finds nothing amiss.
    assert rig.open("looks-afterwards").depth().entries == 0


@pytest.mark.slow
def test_intake_killed_at_each_crash_point_takes_every_record_once(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(parts=6, tuning={"lease_s": 0.2, "batch": 150})
    rig.begin()
    # each point twice: the restart is once the same drain, once a new one
    kills = [{"die": f"{point}:{1 if point == 'ranged' else n}"} for point in POINTS for n in (1, 2)]

    def more() -> None:
        rig.letters(400, kinds=(*TRANSIENT, *OTHERS))

    killed = finish(rig, ["take"], kills, new_drain=lambda n: n % 2 == 0, before=more)
    assert killed == len(kills)
    check(rig, 400 * len(kills))


def test_a_first_intake_killed_while_it_writes_its_beginning_down_begins_again(
    make_rig: Callable[..., Rig],
) -> None:
    rig = make_rig(parts=3, tuning={"lease_s": 0.2, "batch": 100})
    rig.letters(400)
    kills = [{"die": "begun"}, {"die": "ranged"}, {"die": "rows:2"}]
    assert finish(rig, ["take"], kills, new_drain=lambda n: n % 2 == 0) == 3
    check(rig, 400)
    # old letters may have been dealt with by hand: all of them wait for a decision, whoever took them
    assert rig.states() == {"open:first_intake": 400}


@pytest.mark.parametrize("kills", [3, pytest.param(25, marks=pytest.mark.slow)])
def test_intake_killed_at_random_takes_every_record_once(make_rig: Callable[..., Rig], kills: int) -> None:
    choose = seeded("intake", 20_251_124)
    rig = make_rig(parts=6, tuning={"lease_s": 0.2, "batch": 100})
    rig.begin()
    plan = random_kills(choose, kills, POINTS[1:])
    fresh = [choose.random() < 0.5 for _ in range(kills + 1)]
    print(plan)

    def more() -> None:
        rig.letters(1_000, kinds=(*TRANSIENT, *OTHERS))

    killed = finish(rig, ["take"], plan, new_drain=lambda n: fresh[n], before=more)
    print(f"{killed} of {kills} were killed at work")
    check(rig, 1_000 * kills)
