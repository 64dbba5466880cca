"""docs/sqs.md: its configuration is read, and its policies grant exactly the calls that the code makes."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import boto3
import pytest
from upath import UPath

from dlq import connections
from dlq.config import SqsSource, SqsTarget, load_queue

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "sqs.md").read_text()
CORE = ROOT / "include" / "dlq"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.S)


def policies() -> dict[str, dict[str, Any]]:
    """Each statement by its name."""
    found = [json.loads(block) for block in blocks("json")]
    return {each["Sid"]: each for policy in found for each in policy.get("Statement", ())}


def granted(sid: str) -> set[str]:
    return set(policies()[sid]["Action"])


def needed(files: Iterable[Path]) -> set[str]:
    """The actions of every call to SQS that the files name; a batch needs the right of its single form."""
    api = boto3.client("sqs", region_name="eu-central-1").meta.method_to_api_mapping
    names = {
        node.attr
        for file in files
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in api
    }
    return {f"sqs:{api[name].removesuffix('Batch')}" for name in names}


def test_the_drain_is_granted_what_it_calls_and_no_more() -> None:
    assert granted("TakeFromTheDeadLetterQueue") == needed([CORE / "sqs.py", CORE / "sources" / "sqs.py"])
    assert granted("ReplayToAllowedQueues") == needed([CORE / "sqs.py", CORE / "targets" / "sqs.py"])


def test_no_other_module_of_the_core_calls_sqs() -> None:
    known = {
        CORE / "sqs.py",
        CORE / "sources" / "sqs.py",
        CORE / "targets" / "sqs.py",
        CORE / "chaos" / "origin.py",
    }
    assert needed(set(CORE.rglob("*.py")) - known) == set()


def test_a_look_is_granted_all_but_what_takes() -> None:
    drain = granted("TakeFromTheDeadLetterQueue")
    assert drain - granted("LookAtTheDeadLetterQueue") == {"sqs:DeleteMessage", "sqs:ListMessageMoveTasks"}


def test_the_orchestrator_is_granted_what_it_calls_and_no_more() -> None:
    files = (ROOT / "include" / "dlq_orchestrator").glob("sqs_*.py")
    assert granted("RunWorkflowsOfTheOrigin") == needed(files)


@pytest.mark.parametrize("call", re.findall(r"`(sqs:\w+)`", PAGE[PAGE.index("Never granted") :]))
def test_what_the_page_says_is_never_called_is_nowhere_granted(call: str) -> None:
    assert all(call not in each["Action"] for each in policies().values())
    assert call not in needed((ROOT / "include" / "dlq").rglob("*.py"))


@pytest.mark.parametrize("sid", policies())
def test_a_statement_is_one(sid: str) -> None:
    statement = policies()[sid]
    assert statement["Effect"] == "Allow"
    assert re.fullmatch(r"arn:aws:sqs:[a-z0-9-]+:\d{12}:[\w-]+", statement["Resource"])
    assert all(re.fullmatch(r"sqs:[A-Z]\w+", action) for action in statement["Action"])


def test_the_queue_s_file_is_read(tmp_path: Path) -> None:
    (block,) = blocks("yaml")
    (tmp_path / "queues").mkdir()
    (tmp_path / "queues" / "billing.yaml").write_text(block)
    config = load_queue("billing", UPath(tmp_path))
    assert isinstance(config.source, SqsSource)
    assert isinstance(config.target, SqsTarget)
    assert policies()["TakeFromTheDeadLetterQueue"]["Resource"].endswith(f":{config.source.queue}")
    assert policies()["ReplayToAllowedQueues"]["Resource"].endswith(f":{config.target.allow[0]}")


def test_the_times_are_the_defaults() -> None:
    source = SqsSource(kind="sqs", connection="aws", queue="q", start="earliest")
    assert (source.wait, source.visibility, source.quiet) == (20, 120, 120)
    for said in ("(`wait`, 20 s)", "`visibility` (120 s)", "`quiet` (2 minutes)"):
        assert said in PAGE


def test_the_connection_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    (text,) = [block for block in blocks("json") if '"conn_type"' in block]
    monkeypatch.setenv("AIRFLOW_CONN_DLQ_AWS", text)
    assert connections.from_environment("dlq_aws").conn_type == "aws"
