"""Replays killed at every point and at random ones: each effect happens once, and the ledger says which did."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tests.integration.rig import OTHERS, TRANSIENT, Rig, finish, random_kills, seeded

STEPS = ("take", "categorize", "canary", "batches", "remaining")
POINTS = (
    "proposed", "approved", "claimed", "fenced", "cursor", "running", "produced", "uncommitted", "committed", "settled",
    "confirmed", "unclosed", "closed",
)  # fmt: skip


def check(rig: Rig, count: int, transient: int) -> None:
    rig.check_custody()
    rig.check_nothing_pending()
    effects = rig.check_effects()
    states = rig.states()
    assert sum(states.values()) == count
    assert states.get("confirmed", 0) == transient == len(effects), states


@pytest.mark.slow
def test_a_replay_killed_at_each_crash_point_has_every_effect_once(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(parts=3, tuning={"lease_s": 0.2, "records": 50})
    rig.begin()
    consumer = rig.consumer()
    # each point twice: the restart is once the same drain, once a new one
    kills = [
        {"die": f"{point}:{1 if point in ('proposed', 'approved') else n}"}
        for point in POINTS
        for n in (1, 2)
    ]

    def more() -> None:
        rig.letters(120, kinds=TRANSIENT)

    killed = finish(rig, STEPS, kills, new_drain=lambda n: n % 2 == 0, before=more)
    assert killed == len(kills)
    consumer.stop()
    check(rig, 120 * len(kills), 120 * len(kills))
    assert set(consumer.effects.values()) == {1}


def test_a_plan_killed_before_its_approval_is_made_again(make_rig: Callable[..., Rig]) -> None:
    """The same drain plans the same entries in the same stage again."""
    rig = make_rig(tuning={"lease_s": 0.2})
    rig.begin()
    rig.consumer()
    rig.letters(60)
    kills = [{"die": "proposed"}, {"die": "proposed"}, {"die": "approved"}]
    assert finish(rig, STEPS, kills, new_drain=lambda n: False) == 3
    check(rig, 60, 60)
    plans = rig.sql("SELECT withdrawn_at IS NULL, decision IS NULL FROM plan ORDER BY proposed_at")
    assert [tuple(p) for p in plans] == [
        (0, 1),
        (0, 1),
        (1, 0),
    ]  # two withdrawn without a decision, one approved


@pytest.mark.parametrize("kills", [3, pytest.param(25, marks=pytest.mark.slow)])
def test_intake_and_replay_killed_at_random_lose_nothing_and_double_nothing(
    make_rig: Callable[..., Rig], kills: int
) -> None:
    choose = seeded("replay", 20_251_125)
    rig = make_rig(parts=6, tuning={"lease_s": 0.2, "batch": 300, "records": 100})
    rig.begin()
    consumer = rig.consumer()
    rig.letters(3_000, kinds=(*TRANSIENT, *TRANSIENT, *OTHERS))
    plan = random_kills(choose, kills, ("rows", "untold", *POINTS), most=6, seconds=4.0)
    fresh = [choose.random() < 0.5 for _ in range(kills + 1)]
    print(plan)
    more = 0

    def dead_letter_more() -> None:
        nonlocal more
        more += 330
        rig.letters(330, kinds=(*TRANSIENT, *TRANSIENT, *OTHERS))

    killed = finish(rig, STEPS, plan, new_drain=lambda n: fresh[n], before=dead_letter_more)
    print(
        f"{killed} of {kills} were killed at work; a live consumer counted {sum(consumer.effects.values())} effects"
    )
    consumer.stop()
    kinds = (*TRANSIENT, *TRANSIENT, *OTHERS)
    transient = sum(kinds[n % len(kinds)] in TRANSIENT for n in range(3_000 + more))
    check(rig, 3_000 + more, transient)
    assert set(consumer.effects.values()) == {1}
