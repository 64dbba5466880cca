"""What somebody who starts docker-compose.yaml relies on; no engine runs here, so it is read as a file."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from dlq.config import KafkaSource, load_queue
from dlq.connections import from_environment

ROOT = Path(__file__).resolve().parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
ONE_SHOT = {name for name, service in SERVICES.items() if service.get("restart") == "no"}
REFERENCE = re.compile(r"\$\{([A-Z_]+)([^}]*)\}")

each_service = pytest.mark.parametrize("name", sorted(SERVICES))


def environment(name: str) -> dict[str, str]:
    return {
        key: str(value) for key, value in SERVICES[name].get("environment", {}).items() if value is not None
    }


@each_service
def test_nothing_is_published_beyond_loopback(name: str) -> None:
    for port in SERVICES[name].get("ports", []):
        assert re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port)
    assert SERVICES[name].get("network_mode") is None


@each_service
def test_every_secret_comes_from_the_environment_and_must_be_set(name: str) -> None:
    for key, value in environment(name).items():
        if re.search(r"PASSWORD|SECRET|TOKEN|FERNET", key):
            assert re.fullmatch(r"\$\{[A-Z_]+:\?[^}]+\}", value), key
        for user_info in re.findall(r"://([^/@\s]*)@", value):
            password = user_info.partition(":")[2]
            assert re.fullmatch(r"\$\{[A-Z_]+:\?[^}]+\}", password), key
        if "password" in value:  # a Connection as JSON
            assert re.search(r'"password": "\$\{[A-Z_]+:\?[^}]+\}"', value), key
        assert all(rest.startswith(":?") for _, rest in REFERENCE.findall(value)), f"{key} may be empty"


@each_service
def test_a_service_says_when_it_is_healthy_or_ends(name: str) -> None:
    service = SERVICES[name]
    assert ("healthcheck" in service) != (name in ONE_SHOT)
    assert service["restart"] in {"no", "unless-stopped"}


@each_service
def test_waiting_is_for_health_or_for_a_one_shots_success(name: str) -> None:
    for other, how in SERVICES[name].get("depends_on", {}).items():
        ends = other in ONE_SHOT
        assert how["condition"] == ("service_completed_successfully" if ends else "service_healthy")


@each_service
def test_images_are_pinned(name: str) -> None:
    assert re.fullmatch(r"[a-z/-]+:\d+\.\d+[\w.-]*", SERVICES[name]["image"])


def test_the_airflow_image_is_pinned_and_runs_the_locked_airflow() -> None:
    [base] = re.findall(r"^FROM (\S+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    [locked] = re.findall(r"^apache-airflow==(\S+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert base == f"apache/airflow:{locked}-python3.12"


def test_every_airflow_component_runs_with_the_ledger_in_place() -> None:
    components = {name for name in SERVICES if name.startswith("airflow-")} - {"airflow-init"}
    assert components == {
        "airflow-api-server",
        "airflow-scheduler",
        "airflow-dag-processor",
        "airflow-triggerer",
        "airflow-worker",
    }
    for name in components:
        assert {"airflow-init", "ledger-init"} <= SERVICES[name]["depends_on"].keys()
        assert environment(name)["DLQ_LEDGER"].endswith("/dlq")
        assert environment(name)["AIRFLOW__CORE__EXECUTOR"] == "CeleryExecutor"
    assert [*SERVICES["ledger-init"]["entrypoint"], *SERVICES["ledger-init"]["command"]] == [
        "dlq",
        "ledger",
        "create",
        "orders",
    ]


def test_the_queue_as_airflow_sees_it_is_whole_and_on_shared_stores(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in [name for name in os.environ if name.startswith(("DLQ_", "AIRFLOW_CONN_"))]:
        monkeypatch.delenv(variable)
    for variable, value in environment("airflow-worker").items():
        monkeypatch.setenv(variable, REFERENCE.sub("s3://given", value))
    monkeypatch.setenv("DLQ_CONFIG", str(ROOT / "include" / "config"))

    queue = load_queue("orders")

    assert queue.ledger.startswith("postgresql+psycopg://")
    assert queue.ledger.endswith("@postgres:5432/dlq")
    assert (queue.archive, queue.report) == ("s3://given/archive", "s3://given/report")
    assert queue.orchestrator is not None
    for connection in {queue.source.connection, queue.target.connection, queue.orchestrator.connection}:
        assert f"AIRFLOW_CONN_{connection.upper()}" in environment("airflow-worker")
        from_environment(connection)  # raises where it can't be read
    [topics] = SERVICES["kafka-topics"]["command"]
    assert isinstance(queue.source, KafkaSource)
    for topic in (queue.source.topic, *queue.target.allow):
        assert re.search(rf"\b{re.escape(topic)}\b", topics)
        assert any(argument.endswith(f"-topic={topic}") for argument in SERVICES["orchestrator"]["command"])


def test_what_is_mounted_is_there() -> None:
    declared = COMPOSE["volumes"].keys()
    for service in SERVICES.values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert (ROOT / source).exists() if source.startswith(".") else source in declared, volume
        for config in service.get("configs", []):
            assert config["source"] in COMPOSE["configs"]
