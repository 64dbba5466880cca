"""What the orchestrator and a drain tell a collector: real broker, real processes, OTLP parsed from the wire."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.integration.rig import OrchestratedRig, wait_until
from tests.otlp import Collector, Span

from dlq.orchestrator_http import HttpOrchestrator
from dlq_demo.broker import Broker

SECRET = f"payload-{uuid.uuid4().hex}"


class Told(OrchestratedRig):
    """A queue whose orchestrator sends its telemetry to a collector."""

    def send(self, correlation_id: str, fault: dict[str, Any] | None = None, **headers: str) -> None:
        steps = [
            ("look", "search", "query", {"text": SECRET}),
            ("pay", "payments", "charge", {"amount_cents": 100, "currency": "EUR"}),
        ]
        document = {
            "workflow": "order",
            "correlation_id": correlation_id,
            "steps": [{"name": n, "plugin": p, "tool": t, "args": args} for n, p, t, args in steps],
        }
        if fault is not None:
            document["steps"][1]["args"]["fault"] = fault  # type: ignore[index]
        own = [("correlation-id", correlation_id.encode()), *((k, v.encode()) for k, v in headers.items())]
        self.produce(self.origin, [(None, json.dumps(document).encode(), own)])

    def ended(self, correlation_id: str, state: str) -> None:
        def look() -> bool:
            found = self.client.workflow(correlation_id)
            return found is not None and found.state == state

        wait_until(look, f"{correlation_id} {state}")

    def dlq_command(self, collector: Collector, *words: str, **env: str) -> None:
        """The command line, telling the same collector."""
        config = self.folder / "config"
        (config / "queues").mkdir(parents=True, exist_ok=True)
        shipped = Path(__file__).parents[2] / "include" / "config" / "taxonomy.yaml"
        (config / "taxonomy.yaml").write_text(shipped.read_text())
        data = {k: v for k, v in self.data.items() if k != "name"}
        data["orchestrator"] = {"connection": "orchestrator"}
        (config / "queues" / f"{self.queue}.yaml").write_text(yaml.safe_dump(data))
        kafka = {"conn_type": "kafka", "extra": {"bootstrap.servers": self.bootstrap}}
        http = {"conn_type": "http", "host": self.service.url, "password": self.service.token}
        done = subprocess.run(
            [Path(sys.executable).with_name("dlq"), *words],
            env={
                **os.environ,
                **collector.environment,
                **env,
                "DLQ_CONFIG": str(config),
                "AIRFLOW_CONN_KAFKA": json.dumps(kafka),
                "AIRFLOW_CONN_ORCHESTRATOR": json.dumps(http),
            },
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode in (0, 1), done.stderr


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with Collector() as running:
        yield running


@pytest.fixture(scope="module")
def rig(collector: Collector, broker: Broker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Told]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in collector.environment.items():
            patch.setenv(name, value)
        made = Told(broker, tmp_path_factory.mktemp("told"))
        with made.service:
            made.begin()
            yield made
        made.close()


def spans_of(collector: Collector, trace: str, count: int) -> list[Span]:
    """The spans of a trace, once there are ``count`` of them."""

    def look() -> list[Span]:
        found = [span for span in collector.spans() if span.trace == trace]
        return found if len(found) >= count else []

    found: list[Span] = wait_until(look, f"{count} spans of trace {trace}")
    return found


def test_a_workflow_is_one_trace_from_its_record_over_its_failure_to_its_replay(
    rig: Told, collector: Collector
) -> None:
    trace, parent = uuid.uuid4().hex, "00f067aa0ba902b7"
    rig.send("c-1", {"error": "TransientNetwork", "attempts": 4}, traceparent=f"00-{trace}-{parent}-01")
    rig.ended("c-1", "failed")
    first = spans_of(collector, trace, 7)
    by_id = {span.id: span for span in first}
    (workflow,) = [span for span in first if span.name == "workflow order"]
    assert workflow.parent == parent
    assert workflow.error == "TransientNetwork"
    assert workflow.attributes["messaging.message.id"].startswith(f"{rig.origin}/")
    assert {span.name: by_id[span.parent].name for span in first if span.parent in by_id} == {
        "step look": "workflow order",
        "step pay": "workflow order",
        "tool_call search.query": "step look",
        "tool_call payments.charge": "step pay",
    }
    calls = [span for span in first if span.name == "tool_call payments.charge"]
    assert sorted(span.attributes["attempt"] for span in calls) == [1, 2, 3]
    assert {span.attributes["error.type"] for span in calls} == {"TransientNetwork"}
    assert {span.attributes["workflow.correlation_id"] for span in first} == {"c-1"}
    assert all("reset by peer" in span.events[0]["exception.message"] for span in calls)

    rig.dlq_command(collector, "replay", rig.queue)
    rig.ended("c-1", "succeeded")
    later = spans_of(collector, trace, 11)
    (again,) = [span for span in later if span.name == "workflow order" and span.id != workflow.id]
    assert (again.error, again.attributes["workflow.retry_count"]) == (None, 1)
    assert again.attributes["dlq.key"]
    assert len([span for span in later if span.name == "tool_call search.query"]) == 1, (
        "a done step runs once"
    )


def test_one_without_a_trace_gets_one_that_its_dead_letter_carries_on(
    rig: Told, collector: Collector
) -> None:
    rig.send("c-2", {"error": "PluginError", "attempts": 1})
    rig.ended("c-2", "failed")
    known = rig.client.workflow("c-2")
    assert known is not None
    assert known.trace_id is not None
    assert {span.name for span in spans_of(collector, known.trace_id, 5)} >= {"workflow order", "step pay"}
    (letter,) = [seen for seen in rig.log(rig.dlq) if seen.header("correlation-id") == "c-2"]
    assert (letter.header("traceparent") or "").split("-")[1] == known.trace_id


def test_the_command_line_continues_the_trace_it_was_started_in(rig: Told, collector: Collector) -> None:
    trace, parent = uuid.uuid4().hex, "00f067aa0ba902b7"
    rig.dlq_command(collector, "replay", rig.queue, TRACEPARENT=f"00-{trace}-{parent}-01")
    spans = spans_of(collector, trace, 5)
    (command,) = [span for span in spans if span.name == "dlq replay"]
    assert (command.service, command.parent) == ("dlq", parent)
    stages = {span.name: span for span in spans if span.parent == command.id}
    assert stages.keys() >= {"open_drain", "take_custody", "retry_transient", "verify_conservation"}
    assert stages["open_drain"].attributes["dlq.queue"] == rig.queue
    assert stages["take_custody"].attributes["dlq.taken"] >= 0


def test_what_is_submitted_over_http_continues_the_callers_trace(rig: Told, collector: Collector) -> None:
    trace = uuid.uuid4().hex
    step = {"name": "look", "plugin": "search", "tool": "query", "args": {"text": "tea"}}
    answer = rig.client._client.post(
        "/v1/workflows",
        json={"workflow": "find", "correlation_id": "c-3", "steps": [step]},
        headers={"traceparent": f"00-{trace}-00f067aa0ba902b7-01"},
    )
    assert answer.status_code == 202, answer.text
    assert {span.name for span in spans_of(collector, trace, 3)} == {
        "workflow find",
        "step look",
        "tool_call search.query",
    }


def test_metrics_and_logs_arrive_and_nothing_tells_a_payload(rig: Told, collector: Collector) -> None:
    trace = uuid.uuid4().hex
    rig.send(
        "c-4", {"error": "TransientNetwork", "attempts": 9}, traceparent=f"00-{trace}-00f067aa0ba902b7-01"
    )
    rig.ended("c-4", "failed")

    def counted(metric: str, **attributes: str) -> float:
        return sum(n for told, n in collector.points(metric) if attributes.items() <= told.items())

    wait_until(lambda: counted("workflow.runs", state="failed", workflow="order"), "runs are counted")
    wait_until(
        lambda: counted("workflow.tool_call.duration", tool="charge", **{"error.type": "TransientNetwork"}),
        "calls are measured",
    )
    assert counted("workflow.retries", plugin="payments") >= 2
    assert {told["plugin"] for told, _ in collector.points("plugin.circuit.open")} >= {"payments", "search"}

    def line() -> Any:
        mine = [one for one in collector.lines() if one.attributes.get("correlation_id") == "c-4"]
        return next((one for one in mine if one.body == "workflow failed"), None)

    told = wait_until(line, "the failure's log line")
    assert (told.trace, told.attributes["error_type"], told.attributes["stage"]) == (
        trace,
        "TransientNetwork",
        "pay",
    )
    assert trace in rig.service.log.read_text(), "its own log has the trace, too"
    assert SECRET.encode() not in collector.raw


@pytest.mark.parametrize("how", ["closed", "silent"])
def test_a_collector_that_is_away_or_hangs_holds_nothing_up(
    broker: Broker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        if how == "silent":  # it takes connections, and never answers
            listening.listen()
        port = listening.getsockname()[1]
        if how == "closed":
            listening.close()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
        rig = Told(broker, tmp_path)
        with rig.service:
            for n in range(20):
                rig.send(f"c-{n}")
            with HttpOrchestrator(rig.service.url, rig.service.token) as client:
                wait_until(lambda: client.success_rate(3600).succeeded == 20, "all ran", seconds=10)
            stopping = threading.Thread(target=rig.service.stop)
            stopping.start()
            stopping.join(15)
            assert not stopping.is_alive(), "its end waits for the collector"
        rig.close()
