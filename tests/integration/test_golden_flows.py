"""Golden flows before and after a drain: it is to blame for what it broke, and for nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from tests.integration.rig import OrchestratedRig

from dlq.drain import Drain
from dlq.flows import baseline, verify_golden_flows
from dlq.intake import take_custody
from dlq.orchestrator import PluginPatch
from dlq.verdict import close_drain
from dlq_demo.broker import Broker


@pytest.fixture(scope="module")
def rig(broker: Broker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OrchestratedRig]:
    made = OrchestratedRig(broker, tmp_path_factory.mktemp("golden"))
    made.config = made.config.model_copy(update={"golden_flows": "orders"})
    with made.service:
        made.begin()
        yield made
    made.close()


def enable(rig: OrchestratedRig, name: str, on: bool) -> None:
    now = next(plugin for plugin in rig.client.plugins() if plugin.name == name)
    patch = PluginPatch(now.revision, "ann", "a test", disabled=not on)
    rig.client.patch_plugin(name, patch, f"{name} {on} {now.revision}")


def ended(drain: Drain) -> list[str]:
    """Of a drain's verdict what golden flows have to do with."""
    take_custody(drain, 30)
    reasons: list[str] = [said for said in close_drain(drain)["reasons"] if "golden" in said]
    return reasons


def test_what_was_broken_before_a_drain_does_not_make_it_red(rig: OrchestratedRig) -> None:
    enable(rig, "payments", False)
    drain = rig.open("before")
    before = baseline(drain)
    assert [flow["passed"] for flow in before["flows"]] == [False, True]
    after = verify_golden_flows(drain)
    assert (after["passed"], after["broken_before"], after["mended"]) == (True, ["order"], [])
    assert "order: expected succeeded, is failed at step charge: PluginDisabled" in after["said"]
    assert "Broken before this drain already: order" in after["said"]
    assert ended(drain) == []


def test_what_breaks_during_a_drain_makes_it_red_by_flow_step_and_difference(rig: OrchestratedRig) -> None:
    enable(rig, "payments", True)
    drain = rig.open("during")
    assert baseline(drain)["passed"]
    enable(rig, "payments", False)
    after = verify_golden_flows(drain)
    assert (after["passed"], after["broken_before"]) == (False, [])
    [difference, *_] = next(flow["differences"] for flow in after["flows"] if flow["flow"] == "order")
    assert difference.startswith("order: expected succeeded, is failed at step charge: PluginDisabled")
    assert ended(drain) == ["golden flows are not green: order"]


def test_what_a_drain_mended_is_said(rig: OrchestratedRig) -> None:
    enable(rig, "payments", False)
    drain = rig.open("mended")
    assert baseline(drain)["passed"] is False
    enable(rig, "payments", True)
    after = verify_golden_flows(drain)
    assert (after["passed"], after["mended"]) == (True, ["order"])
    assert ended(drain) == []


def test_without_a_baseline_nothing_is_excused(rig: OrchestratedRig, monkeypatch: Any) -> None:
    enable(rig, "payments", False)
    drain = rig.open("no-baseline")
    assert verify_golden_flows(drain)["passed"] is False
    enable(rig, "payments", True)
    assert ended(drain) == ["golden flows are not green: order"]
