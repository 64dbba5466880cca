"""The contract of docs/orchestrator.md: the bundle's client against the reference, on a real broker."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, get_args

import httpx
import pytest
from confluent_kafka import Producer

from dlq.flows import run_golden_flows
from dlq.golden import GoldenFlow, load_golden_flows
from dlq.orchestrator import (
    AboveCeiling,
    Level,
    OrchestratorError,
    OrchestratorUnauthorized,
    Plugin,
    PluginChanged,
    PluginPatch,
    Quota,
    Replay,
    RoutingHeld,
)
from dlq.orchestrator_http import HttpOrchestrator
from dlq_demo.broker import Broker, create_topic
from dlq_demo.orchestrator import ReferenceOrchestrator
from dlq_orchestrator.conformance import FAILING, WORKFLOW, Subject, conformance

FLOWS = Path(__file__).parents[2] / "include" / "config" / "golden_flows" / "orders"


@pytest.fixture(scope="module")
def service(broker: Broker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ReferenceOrchestrator]:
    suffix = uuid.uuid4().hex[:8]
    origin, dlq = f"orders-{suffix}", f"orders.dlq-{suffix}"
    create_topic(broker.bootstrap, origin, 2)
    create_topic(broker.bootstrap, dlq, 2)
    folder = tmp_path_factory.mktemp("orchestrator")
    with ReferenceOrchestrator(
        broker.bootstrap,
        origin=origin,
        dlq=dlq,
        folder=folder,
        group=f"workers-{suffix}",
        options=["--fault-injection"],
    ) as running:
        yield running


@pytest.fixture
def orchestrator(service: ReferenceOrchestrator) -> Iterator[HttpOrchestrator]:
    with HttpOrchestrator(service.url, service.token) as client:
        yield client


@pytest.fixture
def http(service: ReferenceOrchestrator) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=service.url, headers={"Authorization": f"Bearer {service.token}"}) as client:
        yield client


@pytest.fixture
def replay(service: ReferenceOrchestrator, broker: Broker) -> Callable[..., str]:
    """Sends a workflow as a replay would be, and returns its key."""

    def send(document: dict[str, Any], retry_count: int = 1) -> str:
        key = uuid.uuid4().hex
        producer = Producer({"bootstrap.servers": broker.bootstrap})
        headers = [("dlq-key", key), ("dlq-retry-count", str(retry_count))]
        producer.produce(service.origin, value=json.dumps(document), headers=headers)
        assert producer.flush(10) == 0
        return key

    return send


def until(holds: Callable[[], Any], seconds: float = 20.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.02)
    return found


def fresh() -> str:
    return f"c-{uuid.uuid4().hex}"


def charge(correlation_id: str | None = None, **fault: Any) -> dict[str, Any]:
    args: dict[str, Any] = {"amount_cents": 1000, "currency": "EUR"}
    if fault:
        args["fault"] = fault
    return {
        "workflow": "order",
        "correlation_id": correlation_id or fresh(),
        "steps": [{"name": "charge", "plugin": "payments", "tool": "charge", "args": args}],
    }


def ended(orchestrator: HttpOrchestrator, correlation_id: str) -> Any:
    def look() -> Any:
        state = orchestrator.workflow(correlation_id)
        return state if state and state.state != "pending" else None

    return until(look)


def test_the_reference_announces_the_levels_it_keeps(orchestrator):
    assert orchestrator.capabilities() == set(get_args(Level))


def memory(orchestrator: HttpOrchestrator, plugin: str) -> Quota:
    (quota,) = [q for q in orchestrator.quotas() if (q.plugin, q.resource) == (plugin, "memory_mb")]
    return quota


def test_without_the_token_only_the_health_check_answers(service, http):
    with httpx.Client(base_url=service.url) as anonymous:
        assert anonymous.get("/healthz").json() == {"status": "ok"}
        for method, path in [
            ("GET", "/capabilities"),
            ("GET", "/openapi.json"),
            ("POST", "/v1/outcomes"),
            ("POST", "/v1/failures"),
            ("POST", "/v1/workflows"),
            ("GET", "/v1/workflows/c"),
            ("GET", "/v1/success-rate?window=1"),
            ("GET", "/v1/routing"),
            ("POST", "/v1/routing/pause"),
            ("POST", "/v1/routing/resume"),
            ("GET", "/v1/quotas"),
            ("PUT", "/v1/quotas/embedding"),
            ("GET", "/v1/plugins"),
            ("GET", "/v1/plugins/notify"),
            ("PATCH", "/v1/plugins/notify"),
            ("GET", "/v1/workflows"),
            ("POST", "/v1/replays"),
            ("POST", "/v1/workflows/c/debug"),
            ("GET", "/v1/faults"),
            ("PUT", "/v1/faults/f"),
            ("DELETE", "/v1/faults/f"),
        ]:
            answer = anonymous.request(method, path)
            assert answer.status_code == 401, path
            assert answer.headers["content-type"] == "application/problem+json"
            assert answer.headers["www-authenticate"] == "Bearer"
    with HttpOrchestrator(service.url, "wrong") as client, pytest.raises(OrchestratorUnauthorized):
        client.capabilities()
    assert http.get("/openapi.json").json()["info"]["version"] == "1.2"


def test_a_submitted_workflow_is_pending_until_it_ran_and_tells_its_outputs(orchestrator):
    document = charge()
    orchestrator.submit_workflow(document, document["correlation_id"])
    assert orchestrator.workflow(document["correlation_id"]) is not None
    state = ended(orchestrator, document["correlation_id"])
    assert (state.state, state.workflow, state.retry_count, state.failure) == ("succeeded", "order", 0, None)
    (step,) = state.steps
    assert (step.name, step.plugin, step.tool, step.state, step.attempts) == (
        "charge",
        "payments",
        "charge",
        "succeeded",
        1,
    )
    assert step.output["net_cents"] == 941


def test_a_failed_workflow_tells_why_without_its_payload(orchestrator, http):
    document = charge(error="ScopeViolation", attempts=9)
    document["steps"][0]["args"]["card"] = "hunter2"
    orchestrator.submit_workflow(document, document["correlation_id"])
    state = ended(orchestrator, document["correlation_id"])
    assert (state.state, state.failure.error_type, state.failure.stage) == (
        "failed",
        "ScopeViolation",
        "charge",
    )
    assert abs(state.failure.failed_at_ms / 1000 - time.time()) < 60
    told = http.get(f"/v1/workflows/{document['correlation_id']}").json()
    assert "hunter2" not in json.dumps(told["failure"])
    assert told["steps"][0]["input"]["card"] == "hunter2"  # who debugs it has to see that
    other = charge()
    orchestrator.submit_workflow(other, other["correlation_id"])
    ended(orchestrator, other["correlation_id"])
    asked = [document["correlation_id"], other["correlation_id"], "never seen"]
    known = orchestrator.failures(asked)
    assert known.keys() == {document["correlation_id"]}
    assert known[document["correlation_id"]].error_type == "ScopeViolation"
    answer = http.post("/v1/failures", json={"correlation_ids": asked})
    assert answer.json()["failures"].keys() == set(asked)
    assert "hunter2" not in answer.text
    assert http.post("/v1/failures", json={"correlation_ids": ["c"] * 1001}).status_code == 422


def test_a_workflow_submitted_twice_runs_once(orchestrator, http):
    document = charge()
    for _ in range(2):
        orchestrator.submit_workflow(document, document["correlation_id"])
    first = http.post("/v1/workflows", json=document, headers={"Idempotency-Key": "k" + fresh()}).json()
    state = ended(orchestrator, document["correlation_id"])
    assert [step.attempts for step in state.steps] == [1]
    assert first["offset"] >= 0


def test_an_unknown_workflow_is_none_and_any_correlation_id_can_be_asked_for(orchestrator):
    for correlation_id in ("never seen", "a/b c?d#é%2F", "x" * 200):
        assert orchestrator.workflow(correlation_id) is None
    document = charge("orders/0/1?x=%41#" + fresh())
    orchestrator.submit_workflow(document, document["correlation_id"])
    assert ended(orchestrator, document["correlation_id"]).state == "succeeded"


def test_a_replays_outcome_goes_from_unknown_over_pending_to_its_end(orchestrator, replay):
    assert orchestrator.outcomes(["never sent"])["never sent"].state == "unknown"
    seen = set()
    # three calls that run into their time limit: in flight for half a second
    key = replay(charge(error="PluginTimeout", attempts=99))

    def failed() -> bool:
        state = orchestrator.outcomes([key])[key].state
        seen.add(state)
        return state == "failed"

    until(failed)
    assert seen <= {"unknown", "pending", "failed"}
    assert "pending" in seen
    assert abs(orchestrator.outcomes([key])[key].failed_at_ms / 1000 - time.time()) < 60


def test_a_replay_that_works_succeeds_and_so_does_one_of_what_was_done(orchestrator, replay):
    document = charge(error="PluginError", attempts=1)
    orchestrator.submit_workflow(document, document["correlation_id"])
    assert ended(orchestrator, document["correlation_id"]).state == "failed"
    keys = [replay(document), replay(document)]
    until(lambda: all(orchestrator.outcomes(keys)[key].state == "succeeded" for key in keys))
    state = orchestrator.workflow(document["correlation_id"])
    assert (state.state, state.retry_count, state.steps[0].attempts) == ("succeeded", 1, 2)


def test_outcomes_are_asked_for_by_the_thousand(orchestrator, http):
    keys = [f"k{n}" for n in range(2500)]
    assert len(orchestrator.outcomes(keys)) == 2500
    assert http.post("/v1/outcomes", json={"keys": keys}).status_code == 422
    assert orchestrator.outcomes([]) == {}


def test_the_success_rate_counts_a_workflow_once(orchestrator, replay):
    before = orchestrator.success_rate(3600)
    document = charge(error="PluginError", attempts=1)
    orchestrator.submit_workflow(document, document["correlation_id"])
    ended(orchestrator, document["correlation_id"])
    middle = orchestrator.success_rate(3600)
    assert (middle.failed - before.failed, middle.total - before.total) == (1, 1)
    key = replay(document)
    until(lambda: orchestrator.outcomes([key])[key].state == "succeeded")
    after = orchestrator.success_rate(3600)
    assert (after.failed, after.succeeded, after.total) == (
        before.failed,
        before.succeeded + 1,
        before.total + 1,
    )
    assert after.window_s == 3600
    assert 0 < after.rate <= 1


def test_routing_is_paused_by_one_holder_at_a_time(orchestrator):
    assert not orchestrator.routing().paused
    lease = orchestrator.pause_routing("drain-1", 60)
    assert (lease.mode, lease.holder, lease.held) == ("paused", "drain-1", 0)
    assert 55 < lease.until_ms / 1000 - time.time() <= 60
    assert orchestrator.pause_routing("drain-1", 120).until_ms > lease.until_ms
    for refused in (
        lambda: orchestrator.pause_routing("drain-2", 60),
        lambda: orchestrator.resume_routing("drain-2"),
    ):
        with pytest.raises(RoutingHeld, match="drain-1"):
            refused()
    assert orchestrator.routing().holder == "drain-1"
    assert orchestrator.resume_routing("drain-1").mode == "auto"
    assert orchestrator.resume_routing("drain-1").mode == "auto"


def test_a_quota_is_raised_within_its_ceiling_and_the_refusal_names_it(orchestrator):
    quota = memory(orchestrator, "embedding")
    assert (quota.limit, quota.ceiling) == (512, 2048)
    assert orchestrator.set_quota("embedding", 768, fresh()).limit == 768
    assert memory(orchestrator, "embedding").limit == 768
    with pytest.raises(AboveCeiling, match="2048") as refusal:
        orchestrator.set_quota("embedding", 4096, fresh())
    assert refusal.value.ceiling == 2048
    orchestrator.set_quota("embedding", 512, fresh())


def test_a_rate_of_a_tool_is_changed_as_a_quota_is(orchestrator):
    assert orchestrator.set_quota("payments.charge", 77, fresh(), "calls_per_s").limit == 77
    kept = {(q.plugin, q.resource): q.limit for q in orchestrator.quotas()}
    assert kept["payments.charge", "calls_per_s"] == 77
    assert kept["payments", "memory_mb"] == 256
    orchestrator.set_quota("payments.charge", 5000, fresh(), "calls_per_s")


def test_a_plugin_is_patched_at_the_revision_that_was_seen_and_no_further_than_it_may(orchestrator):
    def notify() -> Plugin:
        return {plugin.name: plugin for plugin in orchestrator.plugins()}["notify"]

    before = notify()
    assert (before.circuit.state, before.disabled, before.version) == ("closed", False, "1.0")
    assert "notify:admin" in before.grantable
    scopes = (*before.scopes, "notify:admin")
    patch = PluginPatch(before.revision, "ada", "it asks for it", scopes=scopes)
    key = fresh()
    assert set(orchestrator.patch_plugin("notify", patch, key).scopes) == set(scopes)
    assert orchestrator.patch_plugin("notify", patch, key).revision == before.revision + 1
    with pytest.raises(PluginChanged, match="revision"):
        orchestrator.patch_plugin("notify", patch, fresh())
    assert "notify:admin" not in notify().grantable
    with pytest.raises(OrchestratorError, match="root"):
        orchestrator.patch_plugin(
            "notify", PluginPatch(before.revision + 1, "ada", "why not", scopes=("root",)), fresh()
        )
    orchestrator.patch_plugin(
        "notify", PluginPatch(before.revision + 1, "ada", "back", scopes=before.scopes), fresh()
    )


def test_plugins_come_in_pages(http):
    first = http.get("/v1/plugins", params={"limit": 2}).json()
    rest = http.get("/v1/plugins", params={"cursor": first["next"]}).json()
    assert len(first["plugins"]) == 2
    assert rest["next"] is None
    names = [plugin["name"] for page in (first, rest) for plugin in page["plugins"]]
    assert names == ["embedding", "inventory", "notify", "payments", "search"]
    assert http.get("/v1/plugins/notify").json()["name"] == "notify"
    assert http.get("/v1/plugins/nothing").status_code == 404


def test_a_change_under_one_key_is_made_once_and_another_under_it_is_refused(orchestrator, http):
    key = {"Idempotency-Key": fresh()}
    first = http.put("/v1/quotas/search", json={"limit": 600}, headers=key)
    orchestrator.set_quota("search", 700, fresh())
    again = http.put("/v1/quotas/search", json={"limit": 600}, headers=key)
    assert (again.status_code, again.json()) == (200, first.json())
    assert memory(orchestrator, "search").limit == 700
    other = http.put("/v1/quotas/search", json={"limit": 601}, headers=key)
    assert other.status_code == 422
    assert "Idempotency-Key" in other.json()["detail"]


def test_a_change_that_was_refused_may_be_asked_for_again_under_its_key(http):
    key = {"Idempotency-Key": fresh()}
    assert http.post("/v1/routing/pause", json={"holder": "a", "seconds": 60}).status_code == 200
    body = {"holder": "b", "seconds": 60}
    assert http.post("/v1/routing/pause", json=body, headers=key).status_code == 409
    assert http.post("/v1/routing/resume", json={"holder": "a"}).status_code == 200
    assert http.post("/v1/routing/pause", json=body, headers=key).status_code == 200
    assert http.post("/v1/routing/resume", json={"holder": "b"}).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/nowhere", None, 404),
        ("DELETE", "/v1/quotas", None, 405),
        ("GET", "/v1/workflows/unseen", None, 404),
        ("GET", "/v1/success-rate", None, 422),
        ("GET", "/v1/success-rate?window=0", None, 422),
        ("POST", "/v1/outcomes", {"keys": [1]}, 422),
        ("POST", "/v1/routing/pause", {"holder": "", "seconds": 10**9}, 422),
        ("PUT", "/v1/quotas/nothing", {"limit": 1}, 404),
        ("POST", "/v1/workflows", {"workflow": "w", "correlation_id": "c", "steps": []}, 422),
        ("POST", "/v1/workflows", charge("\x00"), 422),
    ],
)
def test_each_error_is_a_problem_that_quotes_no_input(http, method, path, body, status):
    answer = http.request(method, path, json=body) if body is not None else http.request(method, path)
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert problem["status"] == status
    assert problem["detail"]
    assert "input" not in json.dumps(problem.get("errors", []))


def test_the_shipped_golden_flows_pass(orchestrator):
    results = run_golden_flows(load_golden_flows(FLOWS), orchestrator, run_key="orders-1")
    assert [(r.flow, r.differences) for r in results] == [("order", ()), ("recommend", ())]
    again = run_golden_flows(load_golden_flows(FLOWS), orchestrator, run_key="orders-1")
    assert all(r.passed for r in again)
    assert not {r.correlation_id for r in results} & {r.correlation_id for r in again}


def golden(name: str, expect: dict[str, Any], deadline: float = 20.0, **fault: Any) -> GoldenFlow:
    document = charge(**fault)
    del document["correlation_id"]
    return GoldenFlow.model_validate(
        {"name": name, "workflow": document, "expect": expect, "deadline": deadline}
    )


def test_a_golden_flow_that_differs_names_flow_step_and_difference(orchestrator):
    flows = [
        golden("wrong-sum", {"outputs": {"charge": {"net_cents": 1000, "tip": 1}}}),
        golden("broken", {}, error="PluginError", attempts=1),
        golden("expected-to-fail", {"state": "failed"}, error="PluginError", attempts=1),
        golden("too-slow", {}, deadline=0.01, error="PluginTimeout", attempts=9),
    ]
    wrong, broken, to_fail, slow = run_golden_flows(flows, orchestrator, run_key="r")
    assert wrong.differences == (
        "wrong-sum.charge.net_cents: expected 1000, is 941",
        "wrong-sum.charge.tip: is missing",
    )
    (why,) = broken.differences
    assert why.startswith(
        "broken: expected succeeded, is failed at step charge: PluginError: payments.charge"
    )
    assert to_fail.passed
    assert slow.differences[0].startswith("too-slow: not done in 0.01 s, steps done: none")


def test_golden_flows_of_an_orchestrator_that_refuses_them_have_failed(service):
    with HttpOrchestrator(service.url, "wrong") as stranger:
        (result,) = run_golden_flows([golden("order", {})], stranger, run_key="r")
    assert "order: could not be submitted" in result.differences[0]


# Replays


def outcome(orchestrator: HttpOrchestrator, key: str) -> Any:
    def look() -> Any:
        state = orchestrator.outcomes([key])[key]
        return state if state.state in ("succeeded", "failed") else None

    return until(look)


def failed(orchestrator: HttpOrchestrator, **fault: Any) -> str:
    """The correlation id of a workflow that was submitted and failed."""
    document = charge(**({"error": "PluginError", "attempts": 1} | fault))
    orchestrator.submit_workflow(document, document["correlation_id"])
    assert ended(orchestrator, document["correlation_id"]).state == "failed"
    return str(document["correlation_id"])


def test_a_workflow_is_run_again_as_it_came_and_a_key_puts_it_in_once(orchestrator, http):
    correlation_id, key = failed(orchestrator), fresh()
    for _ in range(3):
        answer = orchestrator.replay_workflows([Replay(correlation_id, key, 1, headers={"dlq-entry": "e1"})])
        assert answer[key].state == "accepted"
    assert outcome(orchestrator, key).state == "succeeded"
    state = http.get(f"/v1/workflows/{correlation_id}").json()
    assert (state["state"], state["retry_count"], state["duplicate_of"]) == ("succeeded", 1, None)
    assert [(r["key"], r["retry_count"]) for r in state["replays"]] == [(key, 1)]
    assert state["steps"][0]["input"]["amount_cents"] == 1000
    assert state["steps"][0]["attempts"] == 2


def test_a_replay_with_a_value_of_its_own_runs_that(orchestrator, http):
    correlation_id, key = failed(orchestrator, attempts=1000), fresh()
    edited = charge(correlation_id)
    edited["steps"][0]["args"]["amount_cents"] = 77
    orchestrator.replay_workflows([Replay(correlation_id, key, 1, value=json.dumps(edited).encode())])
    assert outcome(orchestrator, key).state == "succeeded"
    assert http.get(f"/v1/workflows/{correlation_id}").json()["steps"][0]["output"]["amount_cents"] == 77


def test_a_replay_that_fails_again_is_told_so_and_may_be_replayed_under_another_key(orchestrator):
    correlation_id, first, second = failed(orchestrator, attempts=4), fresh(), fresh()
    orchestrator.replay_workflows([Replay(correlation_id, first, 1)])
    assert outcome(orchestrator, first).state == "failed"
    orchestrator.replay_workflows([Replay(correlation_id, second, 2)])
    assert outcome(orchestrator, second).state == "succeeded"
    assert outcome(orchestrator, first).state == "failed"


def test_what_succeeded_meanwhile_needs_no_run_and_what_was_never_seen_is_refused(orchestrator, http):
    document = charge()
    orchestrator.submit_workflow(document, document["correlation_id"])
    assert ended(orchestrator, document["correlation_id"]).state == "succeeded"
    done, never = fresh(), fresh()
    answer = orchestrator.replay_workflows(
        [Replay(document["correlation_id"], done, 1), Replay("never seen", never, 1)]
    )
    assert (answer[done].state, answer[never].state, answer[never].why) == (
        "accepted",
        "refused",
        "unknown_workflow",
    )
    assert orchestrator.outcomes([done])[done].state == "succeeded"
    assert http.get(f"/v1/workflows/{document['correlation_id']}").json()["steps"][0]["attempts"] == 1


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({}, "retry_count"),
        ({"retry_count": -1}, "retry_count"),
        ({"retry_count": 1, "value": "not base64!"}, "base64"),
        ({"retry_count": 1, "headers": {"correlation-id": "x"}}, "headers"),
        ({"retry_count": 1, "headers": {"dlq-x": "\n"}}, "headers"),
        ({"retry_count": 1, "other": 1}, "other"),
    ],
)
def test_a_replay_that_asks_for_what_cannot_be_is_refused_and_the_field_named(http, overrides, says):
    body = {"replays": [{"correlation_id": "c", "key": fresh(), "overrides": overrides}]}
    answer = http.post("/v1/replays", json=body)
    assert answer.status_code == 422
    assert says in answer.json()["detail"]


def test_a_text_is_no_number_and_a_body_that_cannot_be_read_is_a_problem(http):
    for path, body in (
        ("/v1/quotas/search", {"limit": "1"}),
        ("/v1/quotas/search", {"limit": True}),
        ("/v1/faults/f", {"plugin": "search", "error": "RateLimit", "share": "1", "seconds": 1}),
    ):
        assert http.put(path, json=body).status_code == 422, path
    answer = http.put("/v1/quotas/search", content=b"\xff", headers={"content-type": "application/json"})
    assert (answer.status_code, answer.headers["content-type"]) == (400, "application/problem+json")


def test_workflows_are_listed_in_pages_by_their_state(orchestrator, http):
    mine = {failed(orchestrator) for _ in range(3)}
    found: list[str] = []
    cursor: str | None = ""
    while cursor is not None:
        page = http.get("/v1/workflows", params={"state": "failed", "limit": 2, "cursor": cursor}).json()
        assert {workflow["state"] for workflow in page["workflows"]} == {"failed"}
        found += [workflow["correlation_id"] for workflow in page["workflows"]]
        cursor = page["next"]
    assert mine <= set(found)
    assert len(found) == len(set(found))


# The debugger


def debug(http: httpx.Client, correlation_id: str, **request: Any) -> httpx.Response:
    body = {"step": "charge", "person": "ada", "reason": "the amount was wrong"} | request
    return http.post(f"/v1/workflows/{correlation_id}/debug", json=body)


def test_a_person_gives_a_step_other_arguments_and_it_goes_on_from_there(orchestrator, http):
    correlation_id = failed(orchestrator, attempts=1000)
    answer = debug(http, correlation_id, input={"amount_cents": 5, "currency": "NOK"})
    assert answer.status_code == 202
    assert outcome(orchestrator, answer.json()["key"]).state == "succeeded"
    state = http.get(f"/v1/workflows/{correlation_id}").json()
    assert state["steps"][0]["output"]["currency"] == "NOK"
    (override,) = state["overrides"]
    assert (override["step"], override["input"]["amount_cents"], override["person"]) == ("charge", 5, "ada")
    assert override["reason"] == "the amount was wrong"


def test_a_person_gives_a_steps_output_and_it_is_not_run(orchestrator, http):
    correlation_id = failed(orchestrator, attempts=1000)
    key = debug(http, correlation_id, output={"payment": "by hand"}).json()["key"]
    assert outcome(orchestrator, key).state == "succeeded"
    state = http.get(f"/v1/workflows/{correlation_id}").json()
    assert state["steps"][0]["output"] == {"payment": "by hand"}
    assert state["steps"][0]["attempts"] == 1
    assert debug(http, correlation_id, output={}).status_code == 409


def test_what_cannot_be_gone_on_from_is_said(orchestrator, http):
    correlation_id = failed(orchestrator)
    assert debug(http, "never seen", output={}).status_code == 404
    other = debug(http, correlation_id, step="ship", output={})
    assert (other.status_code, "charge" in other.json()["detail"]) == (422, True)
    assert debug(http, correlation_id, input={}, output={}).status_code == 422
    assert debug(http, correlation_id, output={}, reason="").status_code == 422


# Faults


def test_a_fault_breaks_what_passes_until_it_ends(orchestrator, http):
    fault = {"plugin": "payments", "tool": "charge", "error": "PluginError", "share": 1.0, "seconds": 60}
    assert http.put("/v1/faults/chaos", json=fault).status_code == 200
    assert [f["name"] for f in http.get("/v1/faults").json()["faults"]] == ["chaos"]
    document = charge()
    orchestrator.submit_workflow(document, document["correlation_id"])
    assert ended(orchestrator, document["correlation_id"]).failure.message.startswith("injected")
    assert http.delete("/v1/faults/chaos").status_code == 204
    key = fresh()
    orchestrator.replay_workflows([Replay(document["correlation_id"], key, 1)])
    assert outcome(orchestrator, key).state == "succeeded"
    assert http.put("/v1/faults/chaos", json=fault | {"seconds": 0.05}).status_code == 200
    until(lambda: not http.get("/v1/faults").json()["faults"])


# Conformance


def conforms(url: str, token: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dlq_orchestrator.conformance", url, token, "--deadline", "20", *options]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_the_reference_keeps_what_it_announces(service):
    ran = conforms(service.url, service.token, "--json")
    results = [json.loads(line) for line in ran.stdout.splitlines()]
    assert [r for r in results if r["state"] != "passed"] == []
    assert {r["level"] for r in results} == {"every", *get_args(Level)}
    assert ran.returncode == 0


LIES = {
    "a token is needed": lambda request: request.headers.update({"authorization": "Bearer {token}"}),
    "a change under one key is made once": lambda request: request.headers.pop("idempotency-key", None),
    "a limit is changed within its ceiling": lambda request: (
        "limit" in request.body and request.body.update(limit=min(request.body["limit"], 64))
    ),
}
"""What a liar in front of the reference does to a request, by the check that finds it out."""


class Request:
    def __init__(self, headers: dict[str, str], body: Any) -> None:
        self.headers, self.body = headers, body


@pytest.fixture
def liar(service: ReferenceOrchestrator, request: pytest.FixtureRequest) -> Iterator[str]:
    """An orchestrator that keeps the contract, but for one point."""
    lie = LIES[request.param]

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            raw = self.rfile.read(int(self.headers.get("content-length", 0)))
            asked = Request(
                {name.lower(): value for name, value in self.headers.items()}, json.loads(raw) if raw else {}
            )
            lie(asked)
            asked.headers = {
                n: v.format(token=service.token)
                for n, v in asked.headers.items()
                if n in ("authorization", "idempotency-key")
            }
            found = httpx.request(
                self.command, service.url + self.path, headers=asked.headers, json=asked.body if raw else None
            )
            self.send_response(found.status_code)
            self.send_header("content-type", found.headers.get("content-type", ""))
            self.send_header("content-length", str(len(found.content)))
            self.end_headers()
            self.wfile.write(found.content)

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = answer  # noqa: N815

        def log_message(self, *_: object) -> None:
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    ("liar", "level"),
    list(zip(LIES, ("every", "outcome", "quotas"), strict=True)),
    indirect=["liar"],
)
def test_an_orchestrator_that_lies_is_found_out(service, liar, level, request):
    ran = conforms(liar, service.token, "--level", level, "--json")
    failed = {r["check"] for r in map(json.loads, ran.stdout.splitlines()) if r["state"] == "failed"}
    assert failed == {request.node.callspec.params["liar"]}
    assert ran.returncode == 1


def test_an_orchestrator_that_is_not_there_is_said():
    ran = conforms("http://127.0.0.1:9", "t")
    assert ran.returncode == 2
    assert "127.0.0.1:9" in ran.stderr


def test_a_level_that_is_not_announced_is_skipped(service, monkeypatch):
    subject = Subject(service.url, service.token, WORKFLOW, FAILING, 20)
    ask = Subject.ask

    def announcing(self: Subject, method: str, path: str, status: int = 200, **more: Any) -> Any:
        said = ask(self, method, path, status, **more)
        return {**said, "levels": ["outcome"]} if path == "/capabilities" else said

    monkeypatch.setattr(Subject, "ask", announcing)
    results = list(conformance(subject, frozenset({"quotas", "outcome"})))
    assert {r.state for r in results if r.level == "quotas"} == {"skipped"}
    assert {r.state for r in results if r.level == "outcome"} == {"passed"}
