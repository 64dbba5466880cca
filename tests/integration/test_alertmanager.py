from __future__ import annotations

import shutil
import socket
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from dlq.alerts import acknowledge_alert, end_acknowledgement
from dlq.config import QueueConfig
from dlq.drain import Drain
from dlq.ledger import Ledger, lease
from dlq.ports import Connection
from dlq_demo.process import Process

MATCHERS = {"alertname": "DLQOverSLO", "queue": 'orders "eu"\\1'}


@pytest.fixture(scope="module")
def alertmanager(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a real Alertmanager."""
    program = shutil.which("prometheus-alertmanager") or shutil.which("alertmanager")
    if program is None:
        pytest.skip("no Alertmanager here: apt-get install --no-install-recommends prometheus-alertmanager")
    folder = tmp_path_factory.mktemp("alertmanager")
    (folder / "alertmanager.yml").write_text("route: {receiver: nobody}\nreceivers: [{name: nobody}]\n")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    process = Process(
        "Alertmanager",
        [
            program,
            f"--config.file={folder}/alertmanager.yml",
            f"--storage.path={folder}/data",
            f"--web.listen-address=127.0.0.1:{port}",
            "--cluster.listen-address=",
        ],
        log=folder / "log",
    )

    def ready() -> bool:
        try:
            return httpx.get(f"{url}/-/ready").is_success
        except httpx.TransportError:
            return False

    try:
        process.wait_until(ready, seconds=30)
        yield url
    finally:
        process.stop()


@pytest.fixture
def drain(alertmanager: str, tmp_path: Path, request: pytest.FixtureRequest) -> Drain:
    """A drain named after the test, so that tests sharing one Alertmanager keep apart."""
    ledger = Ledger.create(f"sqlite:///{tmp_path}/ledger.db")
    config = QueueConfig.model_validate(
        {
            "name": "orders",
            "source": {"kind": "memory"},
            "target": {"kind": "memory"},
            "alerts": {"connection": "am", "matchers": MATCHERS},
            "limits": {"budget": "30m"},
            "ledger": f"sqlite:///{tmp_path}/ledger.db",
            "archive": str(tmp_path),
            "report": str(tmp_path),
        }
    )
    identity = f"orders-{request.node.name}"
    epoch = lease.acquire(
        ledger, "orders", identity, run_id="r", kind="drain", seconds=60, config=config.model_dump_json()
    )
    host, _, port = alertmanager.rpartition(":")
    return Drain(
        identity,
        config,
        ledger,
        lambda name: Connection(name, "http", host=host, port=int(port)),
        epoch=epoch,
    )


def silences(url: str, drain: Drain) -> list[dict[str, Any]]:
    found = httpx.get(f"{url}/api/v2/silences").raise_for_status().json()
    return [s for s in found if drain.id in s["comment"].split()]


def fire(url: str, **labels: str) -> None:
    httpx.post(f"{url}/api/v2/alerts", json=[{"labels": labels}]).raise_for_status()


def state(url: str, **labels: str) -> str:
    alerts = httpx.get(f"{url}/api/v2/alerts").raise_for_status().json()
    return str(next(a["status"]["state"] for a in alerts if a["labels"] == labels))


def test_exactly_this_queues_alerts_are_silenced_until_the_budget_is_up(alertmanager: str, drain: Drain):
    other = {**MATCHERS, "queue": "billing"}
    fire(alertmanager, **MATCHERS)
    fire(alertmanager, **other)
    answer = acknowledge_alert(drain)
    assert answer["acknowledged"], answer
    (silence,) = silences(alertmanager, drain)
    assert silence["id"] == answer["silence"]
    assert silence["createdBy"] == "dlq-runbook"
    assert {m["name"]: m["value"] for m in silence["matchers"]} == MATCHERS
    assert not any(m["isRegex"] for m in silence["matchers"])
    left = datetime.fromisoformat(silence["endsAt"]) - datetime.now(UTC)
    assert timedelta(minutes=29) < left <= timedelta(minutes=30)
    assert answer["said"].startswith("1 alert(s) with alertname=DLQOverSLO")
    assert state(alertmanager, **MATCHERS) == "suppressed"
    assert state(alertmanager, **other) != "suppressed"
    end_acknowledgement(drain)


def test_a_second_try_finds_its_own_silence(alertmanager: str, drain: Drain):
    first, again = acknowledge_alert(drain), acknowledge_alert(drain)
    assert first["silence"] == again["silence"]
    assert "stay silenced" in again["said"]
    assert len(silences(alertmanager, drain)) == 1
    end_acknowledgement(drain)


def test_it_ends_with_the_drain_and_ending_twice_is_fine(alertmanager: str, drain: Drain):
    acknowledge_alert(drain)
    assert "may fire again" in end_acknowledgement(drain)["said"]
    assert [s["status"]["state"] for s in silences(alertmanager, drain)] == ["expired"]
    assert end_acknowledgement(drain)["said"] == "no silence of this drain is left"


def test_an_ended_one_is_not_taken_for_the_new_one(alertmanager: str, drain: Drain):
    first = acknowledge_alert(drain)
    end_acknowledgement(drain)
    again = acknowledge_alert(drain)
    assert again["acknowledged"]
    assert again["silence"] != first["silence"]
    end_acknowledgement(drain)


def test_another_drains_silence_is_left_alone(alertmanager: str, drain: Drain):
    acknowledge_alert(drain)
    lease.release(drain.ledger, "orders", drain.id, drain.epoch, "green")
    config = drain.config.model_dump_json()
    epoch = lease.acquire(
        drain.ledger, "orders", "another", run_id="s", kind="drain", seconds=60, config=config
    )
    another = Drain("another", drain.config, drain.ledger, drain.connections, epoch=epoch)
    assert "no silence of this drain" in end_acknowledgement(another)["said"]
    assert [s["status"]["state"] for s in silences(alertmanager, drain)] == ["active"]
    end_acknowledgement(drain)
