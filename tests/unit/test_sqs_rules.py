"""What no code of the project may do to a queue: consume it on the side, empty it, delete it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FORBIDDEN = ("SqsSensor", "MessageQueueTrigger", "purge_queue", "PurgeQueue", "delete_queue", "DeleteQueue")
DEMO = ROOT / "include" / "dlq_demo"  # sets up and takes down queues of its own


def _sources() -> list[Path]:
    found = [path for folder in ("dags", "plugins", "include") for path in (ROOT / folder).rglob("*.py")]
    return [path for path in found if DEMO not in path.parents]


def test_there_is_something_to_look_at() -> None:
    assert len(_sources()) > 100


@pytest.mark.parametrize("name", FORBIDDEN)
def test_nothing_consumes_empties_or_deletes_a_queue(name: str) -> None:
    """SqsSensor and MessageQueueTrigger delete on reception and put bodies into events (RULES, SQS 16)."""
    guilty = [str(p.relative_to(ROOT)) for p in _sources() if re.search(rf"\b{name}\b", p.read_text())]
    assert guilty == []
