"""A Dag file is parsed every half minute and in every task: it must be light, and never break."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.dags.conftest import DAGS, ROOT

HEAVY = ("pandas", "great_expectations", "pyarrow", "confluent_kafka", "boto3", "fastapi", "numpy", "altair")
PARSE = """
import importlib.util, json, sys, time
from airflow.sdk import DAG, BaseOperator
from airflow.providers.standard.operators.hitl import ApprovalOperator
from airflow.providers.standard.operators.empty import EmptyOperator
before = set(sys.modules)
began = time.perf_counter()
spec = importlib.util.spec_from_file_location("found", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
took = time.perf_counter() - began
print(json.dumps({
    "seconds": took,
    "dags": sorted({v.dag_id for v in vars(module).values() if isinstance(v, DAG)}),
    "new": sorted({name.split(".")[0] for name in set(sys.modules) - before}),
}))
"""


def parse(file: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", PARSE, str(DAGS / file)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ,
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(("file", "kind"), [("dlq_drain.py", "drain"), ("dlq_review.py", "review")])
def test_a_dag_file_is_light(queues: Any, file: str, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("orders", "billing", "search"):
        queues.write(name)
    parsed = parse(file)
    with capsys.disabled():
        print(f"\n{file}: {parsed['seconds']:.3f} s for 3 queues, beside Airflow's own imports")
    assert parsed["dags"] == [f"dlq_{kind}__{name}" for name in ("billing", "orders", "search")]
    assert not set(parsed["new"]) & {*HEAVY, "sqlalchemy"}


@pytest.mark.parametrize("file", ["dlq_drain.py", "dlq_review.py"])
def test_the_shipped_queues_have_their_dags(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DLQ_CONFIG", raising=False)
    assert parse(file)["dags"] == [f"{file[:-3]}__{name}" for name in ("billing", "orders")]


def test_of_the_plugins_folder_airflow_imports_the_entry_file_only() -> None:
    """What else it imported would become a module of its bare name: ``threshold``, ``drain``, ``custody``."""
    from airflow.sdk._shared.module_loading import find_path_from_directory

    found = [Path(path) for path in find_path_from_directory(str(ROOT / "plugins"), ".airflowignore", "glob")]
    assert [path.name for path in found if path.suffix == ".py"] == ["dlq_runbook_plugin.py"]


def test_the_entry_file_gives_a_worker_nothing_heavy() -> None:
    code = (
        "import sys; from airflow.sdk import BaseOperatorLink; before = set(sys.modules);"
        f"sys.path.insert(0, {str(ROOT / 'plugins')!r}); import dlq_runbook_plugin;"
        "print({name.split('.')[0] for name in set(sys.modules) - before})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(eval(done.stdout.splitlines()[-1]))
    assert not loaded & set(HEAVY)


def test_operators_import_what_is_heavy_only_when_they_run() -> None:
    code = (
        "import sys, pkgutil, importlib; import dlq_runbook;"
        "[importlib.import_module(m.name) for m in pkgutil.walk_packages(dlq_runbook.__path__, 'dlq_runbook.')"
        " if m.name != 'dlq_runbook.reports'];"
        "print({name.split('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(eval(done.stdout.splitlines()[-1])) & set(HEAVY)
