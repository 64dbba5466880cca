"""Isolation is a lease: whatever happens to the drain, the orchestrator dead-letters again."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.integration.rig import OrchestratedRig, wait_until

from dlq.routing import extend_isolation, isolate, restore_routing
from dlq_demo.broker import Broker


@pytest.fixture
def rig(broker: Broker, tmp_path: Path) -> Iterator[OrchestratedRig]:
    one = OrchestratedRig(broker, tmp_path)
    try:
        with one.service:
            yield one
    finally:
        one.close()


HOLDER = textwrap.dedent("""
    import sys, time
    from dlq.config import QueueConfig
    from dlq.opening import open_drain
    from dlq.ports import Connection
    from dlq.routing import isolate
    config, bootstrap, url, token = sys.argv[1:]
    kafka = Connection("kafka", "kafka", extra={"bootstrap.servers": bootstrap})
    orchestrator = Connection("orchestrator", "http", host=url, password=token)
    drain = open_drain(QueueConfig.model_validate_json(config), run_id="killed",
                       connections=lambda name: orchestrator if name == "orchestrator" else kafka)
    isolate(drain, 4)
    print("isolated", flush=True)
    time.sleep(60)
""")


def test_routing_comes_back_by_its_lease_after_the_worker_was_killed(rig: OrchestratedRig) -> None:
    arguments = [rig.config.model_dump_json(), rig.bootstrap, rig.service.url, rig.service.token]
    worker = subprocess.Popen([sys.executable, "-c", HOLDER, *arguments], stdout=subprocess.PIPE, text=True)
    assert worker.stdout is not None
    assert worker.stdout.readline().strip() == "isolated"
    assert rig.client.routing().paused
    worker.send_signal(signal.SIGKILL)
    worker.communicate()
    began = time.monotonic()
    wait_until(lambda: not rig.client.routing().paused, "routing is back by itself", seconds=15)
    print(f"routing came back {time.monotonic() - began:.1f} s after the kill, without anybody asking")


def test_a_stage_extends_the_pause_and_the_teardown_ends_it(rig: OrchestratedRig) -> None:
    drain = rig.open("r1")
    assert isolate(drain, 30)["isolation"] == "routing"
    first = rig.client.routing().until_ms or 0
    extend_isolation(drain, 300)
    assert (rig.client.routing().until_ms or 0) > first + 200_000
    assert restore_routing(drain)["restored"]
    assert not rig.client.routing().paused
    extend_isolation(drain, 300)
    assert not rig.client.routing().paused, "given back is given back"
    assert restore_routing(drain)["restored"], "a retried teardown changes nothing"


def test_what_an_earlier_drain_left_paused_is_given_back_by_the_next(rig: OrchestratedRig) -> None:
    """It died with its ledger away, and its teardown with it."""
    died = rig.open("r1")
    isolate(died, 3000)
    rig.release(died)
    drain = rig.open("r2")
    assert isolate(drain, 30)["isolation"] == "routing"
    assert rig.client.routing().holder == drain.id
    assert restore_routing(drain)["restored"]
    assert not rig.client.routing().paused


def test_what_somebody_else_paused_is_theirs_to_give_back(rig: OrchestratedRig) -> None:
    rig.client.pause_routing("a person", 60)
    drain = rig.open("r1")
    assert isolate(drain, 30)["isolation"] == "none"
    assert "paused by a person" in restore_routing(drain)["said"]
    assert rig.client.routing().holder == "a person"


def test_an_orchestrator_that_is_down_means_no_isolation_and_is_said(rig: OrchestratedRig) -> None:
    drain = rig.open("r1")
    rig.service.stop()
    done = isolate(drain, 30)
    assert done["isolation"] == "none"
    assert "isolation: none" in done["said"]
