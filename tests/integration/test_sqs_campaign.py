"""Drains of a real SQS queue killed at random: each dead letter in custody once, each effect once, every doubt counted.

What a kill leaves in doubt is held, or sent again where the receiver is idempotent: the receiver here is, by our key.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
from tests.integration.rig import OTHERS, TRANSIENT, finish, random_kills, seeded
from tests.integration.sqs_rig import SqsRig
from tests.sqs_faults import CAMPAIGN, SqsFaults

from dlq.intake import take_custody
from dlq.replay import drain_remaining
from dlq_demo.elasticmq import ElasticMq

STEPS = ("take", "categorize", "canary", "batches", "remaining")
INTAKE = ("received", "segment", "rows", "undeleted", "deleted")
REPLAY = (
    "proposed", "approved", "claimed", "running", "marked", "sending", "calling", "called", "sent", "answered",
    "digested", "unclosed", "closed",
)  # fmt: skip
KINDS = (*TRANSIENT, *TRANSIENT, *OTHERS)


@pytest.fixture
def proxy(request: pytest.FixtureRequest, elasticmq: ElasticMq) -> Iterator[SqsFaults]:
    """In the long runs it does to its clients what AWS does."""
    slow = request.node.get_closest_marker("slow") is not None
    with SqsFaults(elasticmq.port, chances=CAMPAIGN if slow else None, seed=7) as proxy:
        yield proxy
        print(f"{proxy.injected.total()} faults in {len(proxy.calls)} calls: {dict(proxy.injected)}")


@pytest.mark.parametrize(("kills", "entries"), [(3, 300), pytest.param(24, 5_000, marks=pytest.mark.slow)])
def test_intake_killed_at_random_takes_every_message_once(
    make_sqs_rig: Callable[..., SqsRig], proxy: SqsFaults, kills: int, entries: int
) -> None:
    choose, began = seeded("sqs intake", 20_251_126), time.monotonic()
    rig = make_sqs_rig(endpoint=proxy.endpoint, tuning={"lease_s": 0.2, "batch": 50})
    rig.begin()
    plan = random_kills(choose, kills, INTAKE, seconds=0.6)
    fresh = [choose.random() < 0.5 for _ in range(kills + 1)]
    print(plan)
    killed = finish(
        rig,
        ["take"],
        plan,
        new_drain=lambda n: fresh[n],
        before=lambda: rig.letters(entries // kills, kinds=KINDS),
    )
    after = rig.open("after")
    take_custody(after, 60)
    rig.check_custody()
    assert rig.count() == entries // kills * kills
    again = rig.sql("SELECT SUM(again) FROM intake")[0][0]
    print(
        f"{killed} of {kills} were killed at work; {rig.count()} entries, {again} seen again, "
        f"{time.monotonic() - began:.0f} s"
    )
    assert killed >= kills * 5 // 6


@pytest.mark.parametrize(
    ("kills", "entries", "doubt"),
    [
        (3, 300, "hold"),
        pytest.param(26, 5_000, "hold", marks=pytest.mark.slow),
        pytest.param(6, 600, "resend", marks=pytest.mark.slow),
    ],
)
def test_intake_and_replay_killed_at_random_lose_nothing(
    make_sqs_rig: Callable[..., SqsRig], proxy: SqsFaults, kills: int, entries: int, doubt: str
) -> None:
    choose, began = seeded("sqs replay", 20_251_127), time.monotonic()
    rig = make_sqs_rig(
        endpoint=proxy.endpoint,
        target={"on_ambiguous": doubt},
        tuning={"lease_s": 0.2, "batch": 300, "records": 60},
        limits={"batch": 50},
    )
    rig.begin()
    receiver = rig.receiver()
    plan = random_kills(
        choose, kills, ("rows", "undeleted", *REPLAY), most=1 if kills < 10 else 3, seconds=3.0
    )
    fresh = [choose.random() < 0.5 for _ in range(kills + 1)]
    print(plan)
    killed = finish(
        rig,
        STEPS,
        plan,
        new_drain=lambda n: fresh[n],
        before=lambda: rig.letters(entries // kills, kinds=KINDS),
    )
    after = rig.open("after")
    take_custody(after, 60)
    rig.replay(after)
    drain_remaining(after, 60)
    receiver.settle()
    rig.check_custody()
    rig.check_nothing_pending()
    figures = rig.check_arrivals(receiver)
    rig.check_same_figures(after)
    total = entries // kills * kills
    transient = sum(KINDS[n % len(KINDS)] in TRANSIENT for n in range(total))
    print(f"{killed} of {kills} were killed at work, {time.monotonic() - began:.0f} s")
    assert killed >= kills * 4 // 5
    assert figures.entries == total == sum(rig.states().values())
    assert figures.unrecorded == 0
    refused = rig.count("state = 'open' AND reason LIKE 'refused:%'")  # by the proxy
    transient -= refused
    assert figures.sent + figures.ambiguous == transient
    assert len(receiver.effects) == figures.sent + figures.ambiguous_arrived
    if doubt == "hold":  # what may have been sent is not sent again, and told
        assert figures.doubled == 0
    else:  # in doubt is only what was refused when it was sent again
        assert figures.ambiguous <= proxy.injected["sender_fault"]
