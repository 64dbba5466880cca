"""Golden flow files: what is read, and what is refused with file, field and fix.

Runs of them: tests/contract/test_orchestrator_contract.py.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from dlq.errors import ConfigError
from dlq.golden import load_golden_flows

SHIPPED = Path(__file__).parents[2] / "include" / "config" / "golden_flows" / "orders"

FLOW = {
    "name": "order",
    "workflow": {
        "workflow": "order",
        "steps": [{"name": "reserve", "plugin": "inventory", "tool": "reserve"}],
    },
    "expect": {"state": "succeeded", "outputs": {"reserve": {"quantity": 2}}},
    "deadline": 5,
}


def write(folder: Path, **changes: object) -> Path:
    file = folder / "flow.yaml"
    file.write_text(yaml.safe_dump(FLOW | changes))
    return file


def test_the_shipped_flows_are_read():
    assert [flow.name for flow in load_golden_flows(SHIPPED)] == ["order", "recommend"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"name": "No Spaces"}, "name"),
        ({"deadline": 0}, "deadline"),
        ({"workflow": {"workflow": "order"}}, "workflow.steps must be a list"),
        ({"workflow": {**FLOW["workflow"], "correlation_id": "c"}}, "correlation_id must be left out"),
        (
            {"expect": {"outputs": {"charge": {}}}},
            "expect.outputs.charge: the workflow has no such step; it has reserve",
        ),
        ({"expect": {"state": "pending"}}, "expect.state"),
        ({"expects": {}}, "expects"),
    ],
)
def test_a_wrong_flow_is_refused_by_file_and_field(tmp_path, changes, says):
    file = write(tmp_path, **changes)
    with pytest.raises(ConfigError, match=re.escape(says)) as refusal:
        load_golden_flows(tmp_path)
    assert str(file) in str(refusal.value)


def test_what_is_no_yaml_or_no_mapping_is_refused_by_file(tmp_path):
    file = tmp_path / "flow.yaml"
    for text in ("{", "- 1", ""):
        file.write_text(text)
        with pytest.raises(ConfigError, match=r"flow\.yaml"):
            load_golden_flows(tmp_path)


def test_an_empty_folder_and_a_name_used_twice_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="no golden flows"):
        load_golden_flows(tmp_path)
    write(tmp_path).rename(tmp_path / "a.yaml")
    write(tmp_path).rename(tmp_path / "b.yaml")
    with pytest.raises(ConfigError, match=r"b\.yaml: name: order is used"):
        load_golden_flows(tmp_path)
