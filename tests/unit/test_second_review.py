"""What a second review found: secrets that were kept, decisions that the core did not hear, memories that were lost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.memory_rig import MemoryRig

from dlq import review, routing, verdict
from dlq.config import QueueConfig
from dlq.conservation import verify_conservation
from dlq.drain import dry
from dlq.errors import ConfigError, Refused
from dlq.limits import guard_data_loss
from dlq.ports import Connection
from dlq.replay import drain_remaining, replay_canary

Make = Callable[..., MemoryRig]


# Secrets


def test_a_drain_keeps_no_password_of_its_ledger(queue: MemoryRig) -> None:
    secret = "postgresql+psycopg://dlq:hidden-word@db/ledger?sslpassword=hidden-word"
    config = queue.config.model_copy(update={"ledger": secret})
    frozen = config.frozen()
    assert "hidden-word" not in frozen
    assert "dlq:***@db/ledger" in QueueConfig.model_validate_json(frozen).ledger
    rotated = config.model_copy(update={"ledger": secret.replace("hidden", "rotated")})
    assert config.sha == rotated.sha, "a password that is rotated is no other policy"


def test_a_later_task_goes_by_the_files_ledger(queue: MemoryRig) -> None:
    queue.open("r1")
    queue.write("UPDATE drain SET config = replace(config, 'sqlite:', 'mysql:')")
    assert queue.attach("r1").config.ledger == queue.config.ledger


# Opening


def test_a_taxonomy_that_cannot_be_used_is_noticed_before_anything_is_touched(
    queue: MemoryRig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    epoch = queue.one("SELECT epoch FROM queue")
    monkeypatch.setenv("DLQ_CONFIG", str(tmp_path / "elsewhere"))
    with pytest.raises(ConfigError, match=r"taxonomy.yaml does not exist; put taxonomy.yaml into"):
        queue.open("r1")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "taxonomy.yaml").write_text("rules:\n- {name: a, category: odd}\n")
    with pytest.raises(ConfigError, match=r"rule 'a': when: is missing; add it"):
        queue.open("r1")
    assert queue.one("SELECT epoch FROM queue") == epoch


# Routing


class Routing:
    """An orchestrator's routing; ``meanwhile`` happens once, before or after the next pause."""

    def __init__(self) -> None:
        self.paused = False
        self.before: Callable[[], object] = bool
        self.behind: Callable[[], object] = bool

    def capabilities(self) -> set[str]:
        return {"routing"}

    def pause_routing(self, _holder: str, _seconds: int) -> Any:
        before, self.before = self.before, bool
        before()
        self.paused = True
        behind, self.behind = self.behind, bool
        behind()
        return SimpleNamespace(until_ms=1, paused=True, mode="held")

    def resume_routing(self, _holder: str) -> Any:
        self.paused = False
        return SimpleNamespace(paused=False, mode="auto")


@pytest.mark.parametrize("when", ["before", "behind"])
def test_a_stage_that_begins_while_routing_is_given_back_pauses_nothing(queue: MemoryRig, when: str) -> None:
    drain = queue.open("r1")
    routing_of = drain.__dict__["orchestrator"] = Routing()
    routing.isolate(drain, 300)
    setattr(routing_of, when, lambda: routing.restore_routing(drain))
    routing.extend_isolation(drain, 3600)
    assert not routing_of.paused


# The verdict


@pytest.mark.parametrize("taken_over", [False, True])
def test_a_verdict_that_was_given_stands(queue: MemoryRig, taken_over: bool) -> None:
    queue.consumer()
    drain = queue.taken(3)
    drain_remaining(drain, 30)
    verify_conservation(drain)
    first = verdict.close_drain(drain, {})
    assert first["verdict"] == "green"
    if taken_over:
        queue.taken(2, "another")
    again = verdict.close_drain(drain, {"close_drain": "failed"})
    assert again == first
    assert queue.one("SELECT COUNT(*) FROM event WHERE stage = 'close_drain'") == 1


# The guard against data loss


@pytest.mark.parametrize("choice", ["Reject", None])
def test_past_the_guard_nothing_is_replayed_without_a_go_ahead(make_queue: Make, choice: str | None) -> None:
    queue = make_queue(limits={"dr": 2})
    queue.begin()
    queue.consumer()
    drain = queue.taken(5)
    assert guard_data_loss(drain)["next"] == "invoke_dr_plan"
    if choice is not None:
        drain.note("approve_dr", "said", choice=choice)
    with pytest.raises(Refused, match="nothing is replayed"):
        replay_canary(drain, "replay_canary", 30)
    assert drain_remaining(drain, 30)["replayed"] == 0
    assert queue.states() == {"open": 5}
    drain.note("approve_dr", "said", choice="Approve")
    assert drain_remaining(drain, 30)["replayed"] == 5


# A dry review


def test_a_dry_review_changes_nothing(queue: MemoryRig) -> None:
    held = queue.taken(3, error_type="DataCorruption")
    review.file_work(held)
    queue.release(held)
    with dry(queue.config, run_id="review", connections=Connection) as look:
        offered = review.proposals(look, look.queue)
        choices = {each["subject"]: {"choice": "discard", "hash": each["hash"]} for each in offered}
        said = review.apply_review(look, choices, "ann", 30)
    assert "work 1: would discard" in said["said"]
    assert queue.states() == {"open": 3}
    assert queue.one("SELECT COUNT(*) FROM decision") == 0
