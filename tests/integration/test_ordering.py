"""Ordered by key, in two jobs at once: whatever is killed, each key's entries reach the target in order, each once."""

from __future__ import annotations

import json
import random
import signal
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
from tests.integration.rig import TRANSIENT, Rig, seeded

from dlq.conservation import prove

KEYS = 60
ONCE = ("claimed", "fenced", "cursor", "running", "confirmed", "unclosed")
OFTEN = ("produced", "uncommitted", "committed")


def kill_somewhere(choose: random.Random) -> dict[str, Any]:
    """At a moment, at a point a job comes to once, or in one of its first transactions."""
    return choose.choice(
        [
            {"after_s": round(choose.uniform(0.1, 1.0), 2)},
            {"die": f"{choose.choice(ONCE)}:1"},
            {"die": f"{choose.choice(OFTEN)}:{choose.randint(1, 6)}"},
        ]
    )


def plan_in(rig: Rig, run: str) -> list[str]:
    """A new drain goes as far as the canary, in a process of its own; returns the plan's other jobs."""
    planner = rig.worker(f"open:{run}", "take", "categorize", "canary")
    planner.expect_done()
    said = planner.said("canary")
    assert said is not None
    assert said["passed"], planner.words()
    return list(said["jobs"])


def run_side_by_side(rig: Rig, run: str, kills: dict[str, dict[str, Any]]) -> int:
    """Each job in a process of its own, all at once, each killed as it is to be; returns how many were."""
    workers = {
        job: rig.worker(f"attach:{run}", f"job:{job}", die=kill.get("die")) for job, kill in kills.items()
    }
    killed = 0
    for job, worker in workers.items():
        if (after := kills[job].get("after_s")) is not None:
            worker.kill_after(after)
        code = worker.wait(60)
        assert code in (0, -signal.SIGKILL), f"{job} ({kills[job]}) ended with {code}: {worker.words()}"
        if not kills[job]:
            said = worker.said(f"job:{job}")
            assert said is not None
            assert said["ended"] == "done", worker.words()
        killed += code != 0
    return killed


def check_order(rig: Rig) -> None:
    """Per key, all that was dead-lettered, in that order, each once, as a read_committed consumer of its partition
    has it.
    """
    by_key: dict[bytes | None, list[int]] = defaultdict(list)
    parts: dict[bytes | None, set[int]] = defaultdict(set)
    for seen in sorted(rig.check_effects(), key=lambda s: s.offset):
        by_key[seen.key].append(json.loads(seen.value or b"")["order"])
        parts[seen.key].add(seen.part)
    assert {len(where) for where in parts.values()} == {1}, "a key's entries are in several partitions"
    assert by_key == {b"k%d" % key: list(range(key, rig.dead_lettered, KEYS)) for key in range(KEYS)}


@pytest.mark.slow
def test_two_jobs_killed_at_random_keep_the_order_of_each_key(make_rig: Callable[..., Rig]) -> None:
    kills = 20
    choose = seeded("ordering", 20_251_126)
    rig = make_rig(
        parts=3,
        target={"ordering": "per_key"},
        limits={"jobs": 2, "batch": 60},
        tuning={"lease_s": 0.2, "records": 25},
    )
    rig.begin()
    rig.consumer()
    rig.letters(1_200, kinds=TRANSIENT, keys=KEYS)
    run = killed = 0
    jobs = plan_in(rig, "run0")
    assert len(jobs) == 2
    for n in range(kills):
        plan = {job: kill_somewhere(choose) for job in jobs}
        print(plan)
        killed += run_side_by_side(rig, f"run{run}", plan)
        if n % 2:  # the next try is a new drain's, and the queue has grown
            run += 1
            rig.letters(600, kinds=TRANSIENT, keys=KEYS)
            jobs = plan_in(rig, f"run{run}")
    run_side_by_side(rig, f"run{run}", {job: {} for job in jobs})
    # outcomes that were under way when a job's process was killed, and its drain gave up the job
    rig.worker(f"attach:run{run}", "remaining").expect_done()
    print(f"{killed} of {2 * kills} processes were killed at work")
    assert killed >= kills
    rig.check_custody()
    rig.check_nothing_pending()
    check_order(rig)
    assert rig.states() == {"confirmed": rig.dead_lettered}
    assert prove(rig.attach(f"run{run}")).broken == []
