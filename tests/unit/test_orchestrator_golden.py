"""Golden flow files: what is read, and what is refused with file, field and fix.

Runs of them: tests/contract/test_orchestrator_contract.py.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from dlq.errors import ConfigError
from dlq.golden import GoldenFlow, differences, load_golden_flows, missing_spans
from dlq.orchestrator import StepState, WorkflowState
from dlq.traces import JaegerTraces, Span, TracesError

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


# What is expected of outputs and spans

OUTPUT = {"hits": ["sku-teapot", "sku-anvil"], "total": 2, "best": {"sku": "sku-teapot", "score": 0.9}}


def flow(**expect: Any) -> GoldenFlow:
    document = {"workflow": "find", "steps": [{"name": "search", "plugin": "search", "tool": "query"}]}
    return GoldenFlow.model_validate({"name": "find", "workflow": document, "expect": expect})


def ended(output: dict[str, Any] | None = OUTPUT) -> WorkflowState:
    step = StepState("search", "search", "query", "succeeded", 1, output)
    return WorkflowState("c", "succeeded", steps=(step,))


@pytest.mark.parametrize(
    ("expect", "says"),
    [
        ({"outputs": {"search": {"total": 2}}}, []),
        ({"schemas": {"search": {"type": "object", "required": ["hits"]}}}, []),
        (
            {"schemas": {"search": {"properties": {"total": {"minimum": 3}}}}},
            ["find.search.total: 2 is less than"],
        ),
        ({"schemas": {"search": {"required": ["misses"]}}}, ["find.search: 'misses' is a required property"]),
        ({"paths": {"search": {"$.best.sku": "sku-teapot", "$.hits[*]": ["sku-teapot", "sku-anvil"]}}}, []),
        ({"paths": {"search": {"$.hits[?@ == 'sku-rope']": []}}}, []),
        (
            {"paths": {"search": {"$.hits[0]": "sku-rope"}}},
            ["find.search $.hits[0]: expected 'sku-rope', is 'sku-teapot'"],
        ),
        ({"paths": {"search": {"$.hits[7]": "sku-rope"}}}, ["find.search $.hits[7]: is missing"]),
        ({"paths": {"search": {"$.best": {"score": 1}}}}, ["find.search $.best.score: expected 1, is 0.9"]),
    ],
)
def test_what_a_step_answers_is_held_against_values_schemas_and_paths(expect, says):
    found = list(differences(flow(**expect), ended()))
    assert len(found) == len(says), found
    assert all(one.startswith(said) for one, said in zip(found, says, strict=True)), found


def test_a_step_without_an_output_is_said_once():
    expect = {"outputs": {"search": {"total": 2}}, "schemas": {"search": {}}, "paths": {"search": {"$.a": 1}}}
    assert list(differences(flow(**expect), ended(None))) == ["find.search: has no output"]


@pytest.mark.parametrize(
    ("expect", "says"),
    [
        ({"schemas": {"search": {"type": "objekt"}}}, "expect.schemas: Value error, search: no JSON Schema"),
        ({"paths": {"search": {"hits": 1}}}, "search: 'hits' is no JSON Path, such as $.items[0].id"),
        ({"paths": {"search": {"$.a | $.b": 1}}}, "is no JSON Path"),
        ({"paths": {"serach": {"$.a": 1}}}, "expect.paths.serach: the workflow has no such step"),
        ({"schemas": {"serach": {}}}, "expect.schemas.serach: the workflow has no such step"),
        ({"spans": [{"status": "ok"}]}, "expect.spans.0.name"),
        ({"spans": [{"name": "x", "status": "fine"}]}, "expect.spans.0.status"),
    ],
)
def test_an_expectation_that_can_not_be_used_is_refused_by_file_and_field(tmp_path, expect, says):
    document = {"workflow": "find", "steps": [{"name": "search", "plugin": "search", "tool": "query"}]}
    file = write(tmp_path, workflow=document, expect=expect)
    with pytest.raises(ConfigError, match=re.escape(says)) as refusal:
        load_golden_flows(tmp_path)
    assert str(file) in str(refusal.value)


SPANS = [
    Span("workflow find", "ok", {}),
    Span("tool_call search.query", "error", {"attempt": 1}),
    Span("tool_call search.query", "ok", {"attempt": 2, "plugin": "search"}),
]


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        ({"name": "workflow find"}, None),
        ({"name": "tool_call search.query", "status": "ok", "attributes": {"attempt": 2}}, None),
        (
            {"name": "tool_call search.query", "attributes": {"attempt": 3}},
            "no span tool_call search.query attempt=3",
        ),
        ({"name": "workflow find", "status": "error"}, "no span workflow find error; it is there as ok"),
        ({"name": "step pay"}, "no span step pay; there are: tool_call search.query, workflow find"),
    ],
)
def test_the_spans_a_flow_requires_are_looked_for_by_name_status_and_attributes(wanted, says):
    missing = list(missing_spans(flow(spans=[wanted]), SPANS))
    assert missing == [] if says is None else says in missing[0]


def test_a_trace_store_that_is_away_or_none_at_all_is_named(serve):
    with pytest.raises(TracesError, match=r"no answer .* is the trace store up"):
        JaegerTraces("http://127.0.0.1:1").spans("ab")
    for answer, says in (((500, {}), "500"), ((200, {"data": [{"spans": "none"}]}), "no answer of Jaeger's")):
        url, _ = serve({"GET /api/traces/ab": answer})
        with pytest.raises(TracesError, match=says):
            JaegerTraces(url).spans("ab")
    url, _ = serve(
        {"GET /api/traces/ab": (404, {"data": None, "errors": [{"code": 404, "msg": "trace not found"}]})}
    )
    assert JaegerTraces(url).spans("ab") == []


def test_a_trace_as_jaeger_answers_it(serve):
    """Recorded from Jaeger 1.76 (all-in-one), of spans that the reference orchestrator sent it over OTLP."""
    recorded = (Path(__file__).parent / "recorded" / "jaeger_1.76_trace.json").read_bytes()
    url, _ = serve({"GET /api/traces/4bf92f3577b34da6a3ce929d0e0e4736": (200, recorded)})
    with JaegerTraces(url) as traces:
        spans = traces.spans("4bf92f3577b34da6a3ce929d0e0e4736")
    assert sorted((span.name, span.status) for span in spans) == [
        ("step pay", "ok"),
        ("tool_call payments.charge", "error"),
        ("tool_call payments.charge", "ok"),
        ("workflow order", "ok"),
    ]
    wanted = {
        "name": "tool_call payments.charge",
        "status": "error",
        "attributes": {"plugin": "payments", "attempt": 1, "error.type": "TransientNetwork"},
    }
    assert list(missing_spans(flow(spans=[wanted]), spans)) == []
