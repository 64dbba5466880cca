"""Intake killed at every point and at random ones: each dead letter is in custody exactly once, byte for byte."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.integration.rig import OTHERS, TRANSIENT, Rig, finish, seeded

POINTS = ("ranged", "read", "segment", "rows", "untold", "told")


def check(rig: Rig, count: int) -> None:
    rig.check_custody()
    assert rig.count() == count
    # A last, undisturbed pass finds nothing: the positions stand at the end and the queue was told.
    drain = rig.open("looks-afterwards")
    assert drain.depth().entries == 0


def test_intake_killed_at_each_crash_point_takes_every_record_once(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(parts=6, tuning={"lease_s": 0.2, "batch": 200})
    rig.begin()
    rig.letters(3_000, kinds=(*TRANSIENT, *OTHERS))
    # the later ones twice each: once gone on from by the same drain, once by a new one
    kills = [{"die": "ranged:1"}, *({"die": f"{point}:{n}"} for point in POINTS[1:] for n in (2, 1))]
    killed = finish(rig, ["take"], kills, new_drain=lambda n: n % 2 == 0)
    assert killed == len(kills)
    check(rig, 3_000)


def test_the_first_intake_killed_while_it_writes_its_beginning_down_begins_again(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(parts=3, tuning={"lease_s": 0.2, "batch": 100})
    rig.letters(400)
    killed = finish(rig, ["take"], [{"die": "begun:1"}, {"die": "ranged:1"}, {"die": "rows:2"}], new_drain=lambda n: n % 2 == 0)
    assert killed == 3
    check(rig, 400)
    # old letters may have been dealt with by hand: all of them wait for a decision, whoever took them
    assert rig.states() == {"open:first_intake": 400}


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_intake_killed_at_random_takes_every_record_once(make_rig: Callable[..., Rig], kills: int) -> None:
    choose = seeded("intake", 20_251_124)
    rig = make_rig(parts=6, tuning={"lease_s": 0.2, "batch": 100})
    rig.begin()
    rig.letters(4_000, kinds=(*TRANSIENT, *OTHERS))
    plan = [
        {"after_s": choose.uniform(0.5, 2.0)} if choose.random() < 0.4 else {"die": f"{choose.choice(POINTS)}:{choose.randint(1, 4)}"}
        for _ in range(kills)
    ]
    print(plan)
    fresh = [choose.random() < 0.5 for _ in range(kills + 1)]
    killed = finish(rig, ["take"], plan, new_drain=lambda n: fresh[n])
    print(f"{killed} of {kills} were killed at work; {rig.count()} rows")
    check(rig, 4_000)
