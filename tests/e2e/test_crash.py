"""The machine that runs the tasks loses power in the middle of a replay."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import select
from tests.e2e.house import DRAIN, House, built, identity
from tests.integration.rig import wait_until

from dlq.ledger.schema import job
from dlq_demo.broker import Broker

pytestmark = [pytest.mark.airflow, pytest.mark.slow, pytest.mark.timeout(600)]

# A scheduler is taken for dead after 10 s of silence, and its tasks are looked for every 5.
PATIENCE = {
    "AIRFLOW__SCHEDULER__SCHEDULER_HEALTH_CHECK_THRESHOLD": "10",
    "AIRFLOW__SCHEDULER__ORPHANED_TASKS_CHECK_INTERVAL": "5",
}


def test_a_drain_killed_in_mid_replay_ends_with_nothing_doubled(broker: Broker, tmp_path: Path) -> None:
    with built(broker, tmp_path, PATIENCE) as house:
        house.incident(150)
        run_id = house.start(DRAIN, rate=15)
        half_sent = wait_until(lambda: _under_way(house, run_id), "a job is half sent", seconds=120)
        house.airflow.kill_scheduler()
        before = sum(len(sent) for sent in house.replays().values())
        assert half_sent[0] < half_sent[1], "killed too late to prove anything"
        house.airflow.start_scheduler()
        house.finish(DRAIN, run_id, seconds=300)

        replays, states = house.replays(), house.states()
        assert before < len(replays) == states["confirmed"]
        assert [place for place, sent in replays.items() if len(sent) != 1] == []
        assert set(states) == {"confirmed", "open"}
        tasks = {t["task_id"]: t for t in house.airflow.api.task_instances(DRAIN, run_id)}
        assert tasks["replay_batches"]["try_number"] > 1, "the killed task was tried again"
        proof = house.airflow.api.xcom(DRAIN, run_id, "verify_conservation")
        assert proof["proven"] is True
        routing = house.orchestrator("/v1/routing")
        assert (routing["mode"], routing["held"]) == ("auto", 0)


def _under_way(house: House, run_id: str) -> tuple[int, int] | None:
    """How many of how many a running job of `replay_batches` has sent, once it has sent some."""
    with house.look() as drain, drain.ledger.read() as tx:
        found = tx.execute(
            select(job.c.cursor, job.c.size).where(
                job.c.drain == identity(run_id), job.c.canary == 0, job.c.state == "running", job.c.cursor > 0
            )
        ).first()
    return None if found is None else (int(found.cursor), int(found.size))
