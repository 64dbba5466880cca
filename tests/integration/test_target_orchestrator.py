"""A drain that replays through the orchestrator's contract: real broker, real orchestrator, its effects counted."""

from __future__ import annotations

import time
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from confluent_kafka import Producer
from sqlalchemy import text

from dlq.config import QueueConfig
from dlq.conservation import verify_conservation
from dlq.drain import Drain
from dlq.errors import ConfigError
from dlq.intake import take_custody
from dlq.ledger import Ledger, lease
from dlq.opening import open_drain
from dlq.orchestrator import OrchestratorUnreachable, Replay, Replayed
from dlq.orchestrator_http import HttpOrchestrator
from dlq.ports import Connection
from dlq.replay import drain_remaining, replay_batches, replay_canary
from dlq.triage import assign, categorize
from dlq_demo.broker import Broker, create_topic
from dlq_demo.orchestrator import ReferenceOrchestrator
from dlq_orchestrator.traffic import send, workflows


class Replaying:
    """An orchestrator between two topics, and a queue whose replays are asked of it."""

    def __init__(self, broker: Broker, folder: Path) -> None:
        self.bootstrap = broker.bootstrap
        self.name = f"q{uuid.uuid4().hex[:8]}"
        origin, dlq = f"{self.name}-in", f"{self.name}-dlq"
        create_topic(self.bootstrap, origin, 2)
        create_topic(self.bootstrap, dlq, 2)
        self.service = ReferenceOrchestrator(
            self.bootstrap, origin=origin, dlq=dlq, folder=folder / "orchestrator", group=self.name
        )
        (folder / "orchestrator").mkdir()
        self.config = QueueConfig.model_validate(
            {
                "name": self.name,
                "source": {"kind": "kafka", "connection": "kafka", "topic": dlq, "start": "earliest"},
                "target": {"kind": "orchestrator"},
                "orchestrator": {"connection": "orchestrator"},
                "ledger": f"sqlite:///{folder}/ledger.db",
                "archive": str(folder / "archive"),
                "report": str(folder / "report"),
            }
        )
        self.ledger = Ledger.create(self.config.ledger)

    def connections(self, name: str) -> Connection:
        if name == "kafka":
            return Connection(name, "kafka", extra={"bootstrap.servers": self.bootstrap})
        return Connection(
            name, "http", host="http://127.0.0.1", port=self.service.port, password=self.service.token
        )

    def open(self, run: str) -> Drain:
        return open_drain(self.config, run_id=run, connections=self.connections)

    def release(self, drain: Drain) -> None:
        lease.release(drain.ledger, drain.queue, drain.id, drain.epoch, "green")
        drain.close()

    def begin(self) -> None:
        """The first intake, of an empty topic."""
        drain = self.open("begin")
        assert take_custody(drain, 60)["reached"]
        self.release(drain)

    def fail(self, count: int, **mix: float) -> None:
        """Have so many workflows dead-lettered."""
        records = workflows(count, Random().getrandbits(32), mix)
        send(Producer({"bootstrap.servers": self.bootstrap}), self.service.origin, records)
        with HttpOrchestrator(self.service.url, self.service.token) as client:
            deadline = time.monotonic() + 60
            while client.success_rate(3600).failed < count:
                assert time.monotonic() < deadline
                time.sleep(0.1)

    def rows(self, sql: str) -> list[tuple[object, ...]]:
        with self.ledger.read() as tx:
            return [tuple(row) for row in tx.execute(text(sql))]


@pytest.fixture
def replaying(broker: Broker, tmp_path: Path) -> Iterator[Replaying]:
    made = Replaying(broker, tmp_path)
    with made.service:
        made.begin()
        yield made
    made.ledger.close()


def replay(drain: Drain) -> None:
    take_custody(drain, 60)
    categorize(drain)
    assign(drain)
    for job in replay_canary(drain, "retry_transient", 60)["jobs"]:
        replay_batches(drain, job, 60)
    drain_remaining(drain, 60)


def test_a_drain_asks_the_orchestrator_for_its_replays(replaying: Replaying) -> None:
    replaying.fail(120, transient=1, rate_limit=1)
    drain = replaying.open("r1")
    replay(drain)
    assert replaying.rows("SELECT state, COUNT(*) FROM entry GROUP BY state") == [("confirmed", 120)]
    assert verify_conservation(drain)["proven"]
    with HttpOrchestrator(replaying.service.url, replaying.service.token) as client:
        assert client.success_rate(3600).succeeded == 120
        (correlation_id, key) = replaying.rows(
            "SELECT correlation_id, idem_key FROM job_entry, entry WHERE entry.id = entry LIMIT 1"
        )[0]
        state = client.workflow(str(correlation_id))
        assert state is not None
        assert (state.state, state.retry_count) == ("succeeded", 1)
        assert client.outcomes([str(key)])[str(key)].state == "succeeded"


def test_what_the_orchestrator_does_not_know_stays_open_with_the_reason(
    replaying: Replaying,
) -> None:
    replaying.fail(20, transient=1)
    drain = replaying.open("r1")
    take_custody(drain, 60)
    with drain.ledger.write(drain.queue, drain.epoch) as tx:
        tx.execute(text("UPDATE entry SET correlation_id = NULL WHERE id = 1"))
        tx.execute(text("UPDATE entry SET correlation_id = 'never seen' WHERE id = 2"))
    assign(drain)
    for job in replay_canary(drain, "retry_transient", 60)["jobs"]:
        replay_batches(drain, job, 60)
    reasons = Counter(
        str(reason) for _, reason in replaying.rows("SELECT id, reason FROM entry WHERE state = 'open'")
    )
    assert reasons["refused:no_correlation_id"] == 1
    assert reasons["refused:unknown_workflow"] == 1


def test_an_answer_that_was_lost_is_asked_for_again_and_the_workflow_runs_once(
    replaying: Replaying, monkeypatch: pytest.MonkeyPatch
) -> None:
    replaying.fail(30, transient=1)
    ask, lost = HttpOrchestrator.replay_workflows, 0

    def losing(self: HttpOrchestrator, replays: list[Replay]) -> dict[str, Replayed]:
        nonlocal lost
        answer = ask(self, replays)
        lost += 1
        if lost <= 2:
            raise OrchestratorUnreachable("no answer")
        return answer

    monkeypatch.setattr(HttpOrchestrator, "replay_workflows", losing)
    drain = replaying.open("r1")
    replay(drain)
    assert lost > 2
    assert replaying.rows("SELECT state, COUNT(*) FROM entry GROUP BY state") == [("confirmed", 30)]
    with HttpOrchestrator(replaying.service.url, replaying.service.token) as client:
        for (correlation_id,) in replaying.rows("SELECT correlation_id FROM entry"):
            state = client.workflow(str(correlation_id))
            assert state is not None
            assert (state.state, state.duplicate_of) == ("succeeded", None)


def test_an_orchestrator_without_the_level_is_refused_before_anything_is_sent(
    replaying: Replaying, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HttpOrchestrator, "capabilities", lambda _: frozenset({"outcome"}))
    with pytest.raises(ConfigError, match="level 'replay'"):
        replaying.open("r1")


def test_a_queue_without_an_orchestrator_can_ask_none(replaying: Replaying) -> None:
    told = replaying.config.model_dump(mode="json") | {"orchestrator": "none"}
    with pytest.raises(ValueError, match="orchestrator needs one"):
        QueueConfig.model_validate(told)
