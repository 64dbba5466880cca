"""The threshold's clock is absolute, its trigger only reads, and both end with the drain."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from airflow.sdk import Connection as AirflowConnection
from airflow.sdk.exceptions import AirflowSkipException, TaskDeferred
from airflow.sdk.module_loading import import_string
from airflow.serialization.encoders import encode_trigger

from dlq.drain import Drain
from dlq.ledger import lease
from dlq_runbook.operators.alerts import Escalate
from dlq_runbook.triggers import threshold
from dlq_runbook.triggers.threshold import ThresholdTrigger


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds become tenths; what a memory queue is connected by is asked for by nobody."""
    monkeypatch.setattr(threshold, "FIRST_S", 0.3)
    monkeypatch.setattr(threshold, "POLL_S", 0.1)
    monkeypatch.setattr(threshold, "PATIENCE_S", 0.4)

    async def get(conn_id: str) -> AirflowConnection:
        return AirflowConnection(conn_id=conn_id)

    monkeypatch.setattr(AirflowConnection, "async_get", get)


@contextmanager
def drain(queues: Any, *, entries: int = 5, workflows: int | None = 100, **slo: Any) -> Iterator[Drain]:
    """A queue with 5 dead letters of 100 workflows, being drained."""
    queues.write("orders", slo={"workflows": workflows, "escalate": 0.01, **slo})
    with queues.open("orders", entries=entries) as opened:
        opened.phase("take_custody")
        yield opened


def trigger(opened: Drain, seconds: float) -> ThresholdTrigger:
    until = datetime.now(UTC) + timedelta(seconds=seconds)
    return ThresholdTrigger(queue_name=opened.queue, drain=opened.id, until=until.isoformat())


def fire(waiting: ThresholdTrigger, *, within: float = 5.0) -> tuple[dict[str, Any], float]:
    """The trigger's one event, and after how long it came."""

    async def first() -> dict[str, Any]:
        events = [event async for event in waiting.run()]
        assert len(events) == 1
        return dict(events[0].payload)

    began = time.monotonic()
    return asyncio.run(asyncio.wait_for(first(), within)), time.monotonic() - began


def test_at_the_clock_it_says_that_the_queue_is_over(queues: Any) -> None:
    with drain(queues) as opened:
        event, after = fire(trigger(opened, 0.6))
    assert event["over"] is True
    assert event["ratio"] == pytest.approx(0.05)
    assert 0.5 < after < 3


def test_at_the_clock_within_bounds_it_ends_too(queues: Any) -> None:
    with drain(queues, workflows=1_000_000) as opened:
        event, _ = fire(trigger(opened, 0.4))
    assert event["over"] is False


def test_nothing_branches_on_a_ratio_that_is_not_known(queues: Any) -> None:
    with drain(queues, workflows=None) as opened:
        event, _ = fire(trigger(opened, 0.4))
    assert event["over"] is None
    assert "not known" in event["said"]


def test_it_never_fires_in_its_first_moments(queues: Any) -> None:
    with drain(queues) as opened:
        _, after = fire(trigger(opened, -60))
    assert after >= 0.3


@pytest.mark.parametrize("phase", ["restore_routing", "verify"])
def test_it_ends_with_the_drain_long_before_the_clock(queues: Any, phase: str) -> None:
    with drain(queues) as opened:

        async def run() -> dict[str, Any]:
            waiting = asyncio.ensure_future(anext(trigger(opened, 3600).run()))
            await asyncio.sleep(0.6)
            assert not waiting.done()
            opened.phase(phase)
            return dict((await asyncio.wait_for(waiting, 2)).payload)

        assert asyncio.run(run())["over"] is False


def test_it_ends_with_a_drain_that_was_closed(queues: Any) -> None:
    with drain(queues) as opened:
        lease.release(opened.ledger, opened.queue, opened.id, opened.epoch, "red")
        event, after = fire(trigger(opened, 3600))
    assert event["over"] is False
    assert after < 2


def test_it_ends_when_no_such_drain_was_ever_opened(queues: Any) -> None:
    with drain(queues) as opened:
        until = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
        event, _ = fire(ThresholdTrigger(queue_name=opened.queue, drain="orders-000000000000", until=until))
    assert event["over"] is False


def test_a_file_broken_meanwhile_is_waited_for_and_then_said(queues: Any) -> None:
    with drain(queues) as opened:
        queues.write_text("orders", "limits: {btach: 1}")
        event, after = fire(trigger(opened, 0.2))
    assert event["over"] is None
    assert "btach" in event["error"]
    assert after >= 0.6


def test_it_writes_nothing(queues: Any, tmp_path: Path) -> None:
    with drain(queues) as opened, closing(sqlite3.connect(tmp_path / "ledger.db")) as watch:
        before = watch.execute("PRAGMA data_version").fetchone()
        fire(trigger(opened, 0.4))
        assert watch.execute("PRAGMA data_version").fetchone() == before
        opened.phase("verify")
        assert watch.execute("PRAGMA data_version").fetchone() != before


def test_a_triggerer_can_make_it_again(queues: Any) -> None:
    with drain(queues) as opened:
        path, kwargs = trigger(opened, 60).serialize()
    encoded = encode_trigger({"classpath": path, "kwargs": kwargs})
    assert import_string(encoded["classpath"])(**kwargs).serialize() == (path, kwargs)


def test_the_clock_runs_from_the_incidents_start(queues: Any, context: Any) -> None:
    with drain(queues, escalate_after="30m"):
        task = queues.dag("orders").get_task("wait_threshold")
        with pytest.raises(TaskDeferred) as deferred:
            task.execute(context(task))
    until = datetime.fromisoformat(deferred.value.trigger.until)
    assert timedelta(minutes=29) < until - datetime.now(UTC) < timedelta(minutes=30)
    assert deferred.value.timeout is not None
    assert deferred.value.timeout > until - datetime.now(UTC)


def test_past_the_clock_it_does_not_defer(queues: Any, context: Any) -> None:
    with drain(queues, escalate_after="0s"):
        task = queues.dag("orders").get_task("wait_threshold")
        assert task.execute(context(task))["over"] is True


def test_a_dry_run_waits_for_nothing(queues: Any, context: Any) -> None:
    with drain(queues):
        task = queues.dag("orders").get_task("wait_threshold")
        with pytest.raises(AirflowSkipException):
            task.execute(context(task, conf={"dry_run": True}))


def test_only_a_queue_over_its_threshold_goes_on(queues: Any, context: Any) -> None:
    queues.write("orders")
    task = queues.dag("orders").get_task("wait_threshold")
    over = {"over": True, "ratio": 0.02, "outstanding": 20, "phase": "take_custody", "said": "20 outstanding"}
    assert task.execute_complete(context(task), over) == over
    for over_is in (False, None):
        with pytest.raises(AirflowSkipException, match="20 outstanding"):
            task.execute_complete(context(task), {**over, "over": over_is})
    with pytest.raises(AirflowSkipException, match="The drain is over"):
        task.execute_complete(
            context(task), {"over": False, "ratio": None, "outstanding": None, "phase": "verify"}
        )
    with pytest.raises(AirflowSkipException, match="Not known"):
        task.execute_complete(context(task), {"over": None, "error": "ledger gone"})


def test_a_triggerer_that_is_down_does_not_fail_the_run(queues: Any) -> None:
    queues.write("orders")
    assert queues.dag("orders").get_task("wait_threshold").soft_fail


def test_an_escalation_never_fails(queues: Any, context: Any, caplog: pytest.LogCaptureFixture) -> None:
    queues.write("orders")
    queues.fill("orders")
    task = queues.dag("orders").get_task("escalate")
    assert isinstance(task, Escalate)
    # No drain was opened, and nobody is configured to be told.
    assert task.execute(context(task))["delivered"] is False
    with drain(queues):
        assert task.execute(context(task))["delivered"] is False
