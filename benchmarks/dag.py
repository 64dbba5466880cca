"""Dead letters through the whole Dag, in a real Airflow with its scheduler: from the trigger to the verdict."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from datetime import datetime
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import yaml

from benchmarks.bed import Bed, Queue
from benchmarks.cost import table
from benchmarks.drain import consume
from dlq.config import load_queue
from dlq_demo.airflow import AirflowStandalone

_ROOT = Path(__file__).parents[1]
_DAG = "dlq_drain__bench"


def run(bed: Bed, count: int) -> str:
    """Trigger the Dag once on an empty queue, to warm it, and once with ``count`` dead letters; the tasks' times."""
    dlq, origin = bed.topic("dlq"), bed.topic("orders")
    variables = _configured(bed, dlq, origin)
    os.environ |= variables
    queue = Queue(bed.bootstrap, load_queue("bench"), dlq, origin)
    _dlq("ledger", "create", "bench")
    _dlq("take", "bench")
    consumer = get_context("spawn").Process(target=consume, args=(queue,), daemon=True)
    consumer.start()
    with AirflowStandalone(
        bed.folder / "airflow", dags=_ROOT / "dags", plugins=_ROOT / "plugins", env=variables
    ) as airflow:
        airflow.wait_for_dag(_DAG)
        _finished(airflow)
        bed.fill(dlq, count)
        found = _finished(airflow)
        rows = sorted(_tasks(airflow, found["dag_run_id"]), key=lambda row: row[1])
    consumer.kill()
    seconds = (_time(found["end_date"]) - _time(found["start_date"])).total_seconds()
    first = rows[0][1]
    lines = [[name, f"{(at - first).total_seconds():.1f}", f"{took:.1f}"] for name, at, took in rows]
    lines.append(["the run", "0.0", f"{seconds:.1f}"])
    return f"{count:,} entries through {_DAG}: {found['state']}\n" + table(
        ["task", "began, s", "took, s"], lines
    )


def _configured(bed: Bed, dlq: str, origin: str) -> dict[str, str]:
    folder = bed.folder / "dag"
    (folder / "config" / "queues").mkdir(parents=True)
    (folder / "config" / "taxonomy.yaml").write_text((_ROOT / "include/config/taxonomy.yaml").read_text())
    file = {
        "source": {"kind": "kafka", "connection": "bench_kafka", "topic": dlq, "start": "earliest"},
        "target": {
            "kind": "kafka",
            "connection": "bench_kafka",
            "allow": [origin],
            "topic": origin,
            "group": f"{origin}.workers",
        },
        "slo": {"workflows": 10_000_000},
        "outcome": {"grace": "100ms"},
        "approval": {"dr": "policy", "fix": "policy"},
        "ledger": f"sqlite:///{folder}/ledger.db",
        "archive": str(folder / "archive"),
        "report": str(folder / "report"),
    }
    (folder / "config" / "queues" / "bench.yaml").write_text(yaml.safe_dump(file))
    connection = {"conn_type": "kafka", "extra": {"bootstrap.servers": bed.bootstrap}}
    return {"DLQ_CONFIG": str(folder / "config"), "AIRFLOW_CONN_BENCH_KAFKA": json.dumps(connection)}


def _dlq(*words: str) -> None:
    subprocess.run([Path(sys.executable).with_name("dlq"), *words], check=True, capture_output=True)


def _finished(airflow: AirflowStandalone) -> dict[str, Any]:
    run_id = f"bench__{uuid.uuid4().hex[:8]}"
    airflow.api.trigger(_DAG, run_id, {})
    state = airflow.api.wait_for_run(_DAG, run_id, seconds=900)
    assert state == "success", airflow.api.task_states(_DAG, run_id)
    return dict(airflow.api.run(_DAG, run_id))


def _tasks(airflow: AirflowStandalone, run_id: str) -> list[tuple[str, datetime, float]]:
    return [
        (task["task_id"], _time(task["start_date"]), float(task["duration"] or 0.0))
        for task in airflow.api.task_instances(_DAG, run_id)
        if task["start_date"] and task["state"] == "success"
    ]


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text)
