"""Each fault of a chaos run: injected into a real orchestrator on a real broker, dead-lettered, drained, recovered."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from tests.integration.rig import OrchestratedRig

from dlq import chaos, decisions, fixes
from dlq.config import QueueConfig
from dlq.conservation import verify_conservation
from dlq.drain import Drain
from dlq.errors import ConfigError, Refused
from dlq.flows import baseline, verify_golden_flows
from dlq.intake import take_custody
from dlq.ledger import lease
from dlq.opening import open_drain
from dlq.replay import drain_remaining, replay_batches, replay_canary
from dlq.review import open_review
from dlq.routing import isolate, restore_routing
from dlq.triage import categorize
from dlq.verdict import close_drain
from dlq_demo.broker import Broker

FAULTS: dict[str, dict[str, Any]] = {
    "timeouts": {"flow": "order", "plugin": "payments", "error": "PluginTimeout"},
    "server_errors": {"flow": "order", "plugin": "payments", "error": "TransientNetwork"},
    "rate_limits": {"flow": "order", "plugin": "notify", "error": "RateLimit"},
    "memory": {"flow": "recommend", "plugin": "embedding", "memory_mb": 64},
    "scope": {"flow": "recommend", "plugin": "search", "scope": "search:read"},
    "corrupt": {"flow": "order", "corrupt": True},
}


class Target(OrchestratedRig):
    """A queue that may be broken, and the runbook over it, without Airflow."""

    def __init__(self, broker: Broker, folder: Path) -> None:
        super().__init__(broker, folder, "--fault-injection")
        self.break_by(**FAULTS)
        self.data |= {
            "orchestrator": {"connection": "orchestrator"},
            "golden_flows": "orders",
            "approval": {"fix": "policy"},
            "quotas": {"ceilings": {"embedding": 2048}},
            "plugins": {"scopes": {"search": ["search:read"]}},
        }

    def break_by(self, **faults: dict[str, Any]) -> None:
        self.data["chaos"] = {"workflows": 3, "deadline": "30s", "faults": faults}

    @property
    def marked(self) -> QueueConfig:
        return QueueConfig.model_validate(self.data)

    @contextmanager
    def held(self, run: str) -> Iterator[Drain]:
        drain = open_drain(self.marked, run_id=run, kind="cli", connections=self.connections)
        try:
            yield drain
        finally:
            lease.release(drain.ledger, drain.queue, drain.id, drain.epoch, "over")
            drain.close()

    def drained(self, run: str) -> dict[str, Any]:
        """Every stage of the Dag, in its order."""
        with self.held(run) as drain:
            baseline(drain)
            isolate(drain, 60)
            take_custody(drain, 60)
            categorize(drain)
            self._replay(drain)
            proposed = fixes.propose_fix(drain)
            if proposed["fixes"]:
                assert proposed["within_policy"], proposed
                digest = proposed["hash"]
                number = decisions.record(
                    drain, drain.queue, who="us", kind="approve_fix", subject=digest, saw="", choice="approve"
                )
                fixes.apply_fix(drain, digest, number)
                fixes.canary_fix(drain, 30)
            open_review(drain)
            drain_remaining(drain, 60)
            restore_routing(drain)
            assert verify_conservation(drain)["proven"]
            verify_golden_flows(drain)
            return close_drain(drain)

    def _replay(self, drain: Drain) -> None:
        for job in replay_canary(drain, "retry_transient", 60)["jobs"]:
            replay_batches(drain, job, 60)

    def doubled_effects(self) -> list[str]:
        """By the orchestrator's own log, which has no unique key."""
        with closing(sqlite3.connect(self.service.state / "orchestrator.sqlite")) as db:
            asked = "SELECT effect_key FROM effect GROUP BY effect_key HAVING count(*) > 1"
            return [key for (key,) in db.execute(asked)]

    def quota(self) -> int:
        quotas = self.client.quotas()
        return next(q.limit for q in quotas if (q.plugin, q.resource) == ("embedding", "memory_mb"))

    def scopes(self) -> set[str]:
        return set(next(p.scopes for p in self.client.plugins() if p.name == "search"))


@pytest.fixture(scope="module")
def target(broker: Broker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    rig = Target(broker, tmp_path_factory.mktemp("chaos"))
    with rig.service:
        with rig.held("begin") as drain:
            take_custody(drain, 30)
        yield rig
    rig.close()


def test_what_each_fault_breaks_is_dead_lettered_and_a_drain_recovers_all_of_it(target: Target) -> None:
    quota, scopes = target.quota(), target.scopes()
    with target.held("chaos") as drain:
        injected = chaos.inject(drain)
    assert {one.fault: (one.failed, one.skipped) for one in injected} == dict.fromkeys(FAULTS, (3, None))
    assert target.quota() == 64, "what a drain is to mend stays broken"
    verdict = target.drained("drain")
    assert verdict["verdict"] == "green", verdict
    assert {one["reason"] for one in verdict["open"]} == {"waiting_for_person"}
    with target.held("chaos") as drain:
        found = chaos.recover(drain, injected, 30)
        assert [one for one in found if not one.whole] == []
        assert chaos.end_faults(drain) == []
        assert chaos.end_faults(drain) == [], "twice is fine"
    assert [one.recovered for one in found] == [3] * len(FAULTS)
    assert (target.quota(), target.scopes()) == (quota, scopes), "what was broken is back as it was"
    assert target.doubled_effects() == []


def test_what_a_drain_did_not_recover_is_named_and_a_kill_leaves_nothing_broken(target: Target) -> None:
    quota = target.quota()
    target.break_by(memory=FAULTS["memory"], timeouts=FAULTS["timeouts"])
    with target.held("no drain") as drain:
        injected = chaos.inject(drain)
        take_custody(drain, 30)
    with target.held("no drain") as drain:
        memory, timeouts = chaos.recover(drain, injected, 5)
        assert (memory.whole, memory.waiting, memory.lost) == (False, 3, 0)
        assert "open (new)" in memory.why[0]
        assert timeouts.waiting == 3
    # the stage that broke it was killed: another process brings it back, by what was written down first
    with target.held("no drain") as drain:
        assert chaos.end_faults(drain) == []
    assert target.quota() == quota


def test_only_a_queue_that_is_marked_is_broken(target: Target) -> None:
    with target.held("unmarked") as drain:
        drain.config = drain.config.model_copy(update={"chaos": None})
        with pytest.raises(Refused, match="no chaos target: nothing was broken"):
            chaos.inject(drain)


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ({"flow": "nowhere", "corrupt": True}, "no golden flow 'nowhere'; there are: order, recommend"),
        ({"flow": "order", "plugin": "search", "error": "RateLimit"}, "order doesn't call search"),
        ({"flow": "order", "plugin": "notify", "scope": "notify:all"}, "notify doesn't declare notify:all"),
    ],
)
def test_a_fault_that_could_strike_nothing_is_named(target: Target, fault: dict[str, Any], says: str) -> None:
    target.break_by(odd=fault)
    with target.held("odd") as drain, pytest.raises(ConfigError, match=says):
        chaos.inject(drain)


def test_what_the_orchestrator_does_not_offer_is_left_out_and_said(target: Target) -> None:
    target.break_by(timeouts=FAULTS["timeouts"], corrupt=FAULTS["corrupt"])
    with target.held("levels") as drain:
        capabilities = target.client.capabilities() - {"faults"}
        drain.__dict__["orchestrator"] = orchestrator = target.client
        orchestrator.__dict__["capabilities"] = lambda: capabilities
        try:
            timeouts, corrupt = chaos.inject(drain)
        finally:
            del orchestrator.__dict__["capabilities"]
        assert timeouts.skipped == "the orchestrator doesn't offer the level faults"
        assert corrupt.failed == 3
        assert not chaos.recover(drain, [timeouts, corrupt], 5)[0].whole


@pytest.mark.parametrize(
    ("chaos_section", "says"),
    [
        ({"faults": {"x": {"flow": "order", "error": "RateLimit"}}}, "plugin"),
        ({"faults": {"x": {"flow": "order", "plugin": "a", "error": "E", "memory_mb": 1}}}, "exactly one"),
        ({"faults": {}}, "chaos.faults"),
        ({"faults": {"X!": {"flow": "order", "corrupt": True}}}, "chaos.faults"),
    ],
)
def test_a_wrong_section_is_named(target: Target, chaos_section: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        QueueConfig.model_validate({**target.data, "chaos": chaos_section})


def test_a_target_needs_an_orchestrator_and_golden_flows(target: Target) -> None:
    with pytest.raises(ValidationError, match="chaos: needs orchestrator and golden_flows"):
        QueueConfig.model_validate({**target.data, "orchestrator": "none", "golden_flows": None})
