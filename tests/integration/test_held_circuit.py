"""What is held until its plugin's circuit closes: a real broker, the reference orchestrator, one canary at a time."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from tests.integration.rig import OrchestratedRig, wait_until

from dlq.conservation import prove
from dlq_demo.broker import Broker

WORKFLOWS = 40
RULES = """
rules:
  - name: plugin down
    when: {exception: [TransientNetwork, CircuitOpen, PluginTimeout]}
    category: transient
    remedy: hold
    fingerprint: plugin-down
    hold: {probe: {circuit: true}}
"""


@pytest.fixture
def rig(broker: Broker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[OrchestratedRig]:
    (tmp_path / "taxonomy.yaml").write_text(RULES)
    monkeypatch.setenv("DLQ_CONFIG", str(tmp_path))
    one = OrchestratedRig(broker, tmp_path, "--fault-injection", "--backoff-base", "0.01")
    try:
        with one.service:
            yield one
    finally:
        one.close()


@pytest.fixture
def http(rig: OrchestratedRig) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {rig.service.token}"}
    with httpx.Client(base_url=rig.service.url, headers=headers) as client:
        yield client


def charge(number: int) -> bytes:
    step = {
        "name": "charge",
        "plugin": "payments",
        "tool": "charge",
        "args": {"amount_cents": 1000 + number, "currency": "EUR"},
    }
    return json.dumps({"workflow": "order", "correlation_id": f"c-{number}", "steps": [step]}).encode()


def make_due(rig: OrchestratedRig) -> None:
    rig.write("UPDATE entry SET hold_until = '2020-01-01T00:00:00.000+00:00' WHERE hold_until IS NOT NULL")


def test_held_until_the_circuit_closes_by_one_canary_at_a_time(
    rig: OrchestratedRig, http: httpx.Client
) -> None:
    rig.begin()
    fault = {"plugin": "payments", "error": "TransientNetwork", "share": 1.0, "seconds": 600}
    assert http.put("/v1/faults/down", json=fault).is_success
    rig.produce(
        rig.origin, [(b"k%d" % n, charge(n), [("correlation-id", b"c-%d" % n)]) for n in range(WORKFLOWS)]
    )
    wait_until(lambda: len(rig.log(rig.dlq)) == WORKFLOWS, "all are dead-lettered")

    # While it is down: one at most goes, whatever the circuit is at that moment.
    drain = rig.drain("r1")
    sent = len(rig.effects())
    assert sent <= 1
    assert rig.count("state = 'open' AND reason = 'hold'") == WORKFLOWS - sent
    assert "the circuit of payments is " in rig.notes(drain)
    rig.release(drain)

    assert http.delete("/v1/faults/down").is_success
    for run in range(2, 20):
        wait_until(
            lambda: http.get("/v1/plugins/payments").json()["circuit"]["state"] != "open",
            "the circuit lets a probe through",
        )
        make_due(rig)
        drain = rig.drain(f"r{run}")
        if not rig.count("settled_drain IS NULL"):
            break
        rig.release(drain)
    assert Counter(rig.states()) == Counter(confirmed=WORKFLOWS, returned=sent)
    assert "half open: a canary decides; it passed" in "\n".join(
        r.text for r in rig.sql("SELECT text FROM event")
    )
    assert http.get("/v1/plugins/payments").json()["circuit"]["state"] == "closed"
    rig.check_custody()
    rig.check_nothing_pending()
    assert prove(drain).broken == []
