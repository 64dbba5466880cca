"""Replays asked of an orchestrator that has too much to do: asked for again when it said, as long as there is time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from dlq.orchestrator import OrchestratorBusy, Replay, Replayed
from dlq.ports import Delivered, Output
from dlq.targets.orchestrator import OrchestratorSender


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    found: list[float] = []
    monkeypatch.setattr("dlq.targets.orchestrator.time.sleep", found.append)
    return found


def output(ordinal: int) -> Output:
    return Output(
        ordinal,
        None,
        b"{}",
        (("dlq-key", b"k%d" % ordinal), ("dlq-retry-count", b"1")),
        None,
        correlation_id=f"c-{ordinal}",
    )


def sender(busy: list[float | None], asked: list[list[str]]) -> OrchestratorSender:
    def replay(replays: Sequence[Replay]) -> dict[str, Replayed]:
        asked.append([each.key for each in replays])
        if busy:
            raise OrchestratorBusy("429", busy.pop(0))
        return {each.key: Replayed("accepted") for each in replays}

    client: Any = SimpleNamespace(replay_workflows=replay)
    return OrchestratorSender(client)


def test_a_busy_orchestrator_is_asked_again_under_the_same_keys(waits: list[float]) -> None:
    asked: list[list[str]] = []
    done = sender([20.0, None], asked).send([output(0), output(1)], time.monotonic() + 60)
    assert [type(each) for each in done] == [Delivered, Delivered]
    assert asked == [["k0", "k1"]] * 3
    assert waits == [20.0, 1.0]


def test_one_that_is_busy_past_the_deadline_leaves_doubt_and_is_not_waited_for(waits: list[float]) -> None:
    asked: list[list[str]] = []
    assert sender([20.0], asked).send([output(0)], time.monotonic() + 10) == []
    assert (len(asked), waits) == (1, [])
