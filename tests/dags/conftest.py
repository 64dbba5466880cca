"""Queues of memory, their Dags, and a task's surroundings as Airflow would give them."""

from __future__ import annotations

import importlib.util
import shutil
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from airflow.sdk import DAG
from tests.forks import forked_expectations as forked_expectations

from dlq.config import load_queue
from dlq.drain import Drain
from dlq.entry import Record
from dlq.ledger import Ledger
from dlq.memory import MemoryLog, MemoryTopics, dead_letter
from dlq.opening import open_drain

ROOT = Path(__file__).parents[2]
DAGS = ROOT / "dags"


def no_connection(conn_id: str) -> Any:
    raise AssertionError(f"{conn_id} was asked for")


@dataclass
class Queues:
    """A configuration folder of a test's own."""

    folder: Path

    def write(self, name: str = "orders", **fields: Any) -> str:
        """A queue whose ends are in memory; ``fields`` replace or add to its file."""
        at = self.folder.parent
        self.write_text(
            name,
            yaml.safe_dump(
                {
                    "source": {"kind": "memory", "connection": f"{name}-{uuid.uuid4().hex}"},
                    "target": {"kind": "memory", "connection": f"{name}-{uuid.uuid4().hex}"},
                    "ledger": f"sqlite:///{at / 'ledger.db'}",
                    "archive": str(at / "archive"),
                    "report": str(at / "report"),
                    **fields,
                }
            ),
        )
        return name

    def write_text(self, name: str, text: str) -> None:
        (self.folder / "queues" / f"{name}.yaml").write_text(text)

    def dags(self, file: str = "dlq_drain.py") -> dict[str, DAG]:
        """The Dags of a Dag file, by id, as Airflow would find them."""
        spec = importlib.util.spec_from_file_location(f"{file[:-3]}_{uuid.uuid4().hex}", DAGS / file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return {found.dag_id: found for found in vars(module).values() if isinstance(found, DAG)}

    def dag(self, name: str = "orders", kind: str = "drain") -> DAG:
        return self.dags(f"dlq_{kind}.py")[f"dlq_{kind}__{name}"]

    def fill(self, name: str = "orders", entries: int = 0, error_type: str = "DataCorruption") -> None:
        """Make the queue's ledger and topics, and dead-letter ``entries`` workflows."""
        config = load_queue(name)
        Ledger.create(config.ledger).close()
        topics = MemoryTopics.shared(config.target.connection)
        topics.create("memory")
        log = MemoryLog.shared(config.source.connection)
        topics.live = lambda: topics.consume("memory", log)
        _, end = log.marks(0)
        for number in range(end, end + entries):
            failed = Record(0, str(number), number, b"k%d" % number, b"payload", (), None)
            log.append(0, failed.key, failed.value, dead_letter(failed, "memory", error_type=error_type))

    def open(self, name: str = "orders", run_id: str = "run", entries: int = 0) -> Drain:
        """Open the drain a Dag run of that id would have, after ``entries`` dead letters came in."""
        self.fill(name, entries)
        return open_drain(load_queue(name), run_id=run_id, connections=no_connection)


@pytest.fixture
def queues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Queues:
    folder = tmp_path / "config"
    (folder / "queues").mkdir(parents=True)
    shutil.copy(ROOT / "include" / "config" / "taxonomy.yaml", folder)
    monkeypatch.setenv("DLQ_CONFIG", str(folder))
    return Queues(folder)


@dataclass
class TaskInstance:
    """What an operator sees of its task instance: XComs, tries, the run's states."""

    pulled: Mapping[tuple[str, str], Any] = field(default_factory=dict)
    try_number: int = 1
    max_tries: int = 2
    map_index: int = -1
    id: uuid.UUID = field(default_factory=uuid.uuid4)
    pushed: dict[str, Any] = field(default_factory=dict)
    states: Mapping[str, str] = field(default_factory=dict)

    def xcom_pull(self, *, task_ids: str, key: str = "return_value") -> Any:
        return self.pulled.get((task_ids, key))

    def xcom_push(self, key: str, value: Any) -> None:
        self.pushed[key] = value

    def get_task_states(self, *, dag_id: str, run_ids: list[str]) -> dict[str, Any]:
        return {run_ids[0]: dict(self.states)}


Contextual = Callable[..., dict[str, Any]]


@pytest.fixture
def context() -> Contextual:
    """Builds the context of a task: ``context(task, conf={…}, pulled={…})``."""

    def build(
        task: Any = None, *, run_id: str = "run", dag_id: str = "dlq_drain__orders", **given: Any
    ) -> dict[str, Any]:
        conf = given.pop("conf", {})
        instance = TaskInstance(**given)
        instance.task = task  # type: ignore[attr-defined]
        run = SimpleNamespace(dag_id=dag_id, run_id=run_id, conf=conf, start_date=datetime.now(UTC))
        return {"dag_run": run, "ti": instance, "task_instance": instance, "task": task, "params": {}}

    return build
