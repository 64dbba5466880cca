"""Running workflows: tries, faults, quotas, dedupe, what is recorded and what is not run again."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from random import Random
from typing import Any

import pytest

from dlq_orchestrator.core.backoff import Backoff, RetryBudget
from dlq_orchestrator.core.calls import PluginCalls
from dlq_orchestrator.core.circuit import CircuitPolicy
from dlq_orchestrator.core.plugin_sandbox import PluginSandbox
from dlq_orchestrator.core.rate_limiter import AboveCeiling, RateLimiter, UnknownPlugin
from dlq_orchestrator.core.registry import Registry
from dlq_orchestrator.core.workflow_safety import WorkflowSafety
from dlq_orchestrator.plugins import MANIFESTS, TOOLS, Charge, Tool
from dlq_orchestrator.runner import Runner
from dlq_orchestrator.store import StateInUse, Store
from dlq_orchestrator.traffic import DEFAULT_MIX, workflows
from dlq_orchestrator.workflow import Call, Record, Run

NEVER_OPENS = CircuitPolicy(failures=1_000_000)


class Engine:
    """The orchestrator without Kafka: runs batches and records them."""

    def __init__(self, folder: Path, sandbox: PluginSandbox, circuits: CircuitPolicy = NEVER_OPENS) -> None:
        self.store = Store(folder)
        memory_mb = {name: manifest.memory_mb for name, manifest in MANIFESTS.items()}
        self.limiter = RateLimiter(self.store, memory_mb, (f"{plugin}.{tool}" for plugin, tool in TOOLS))
        self.registry = Registry(self.store, MANIFESTS)
        self.safety = WorkflowSafety(self.store)
        self.calls = PluginCalls(self.registry, self.limiter, sandbox, circuits)
        self.runner = Runner(
            self.calls, self.safety, Backoff(base_s=0.001, cap_s=0.5), Random(1), RetryBudget()
        )
        self._offset = 0

    def record(self, value: bytes | None, **headers: str) -> Record:
        self._offset += 1
        pairs = [(name.replace("_", "-"), text.encode()) for name, text in headers.items()]
        return Record(f"orders/0/{self._offset}", value, pairs)

    def run(self, *records: Record) -> list[Run]:
        runs = asyncio.run(self.runner.run(list(records)))
        with self.store.transaction() as db:
            self.safety.record(db, runs)
            self.calls.save_counts(db)
        return runs

    def effects(self) -> list[str]:
        with self.store.read() as db:
            return [row["effect_key"] for row in db.execute("SELECT effect_key FROM effect ORDER BY id")]


@pytest.fixture(scope="module")
def sandbox():
    with PluginSandbox(TOOLS, time_limit_s=0.05) as sandbox:
        yield sandbox


@pytest.fixture
def engine(tmp_path, sandbox):
    engine = Engine(tmp_path, sandbox)
    yield engine
    engine.store.close()


def order(correlation_id: str, **faulty: Any) -> bytes:
    """An order of three steps; a keyword adds arguments to the step of that name."""
    steps = [
        ("reserve", "inventory", "reserve", {"sku": "sku-rope", "quantity": 1}),
        ("charge", "payments", "charge", {"amount_cents": 1000, "currency": "EUR"}),
        ("confirm", "notify", "send", {"channel": "sms", "to": "+0", "subject": "hello"}),
    ]
    return json.dumps(
        {
            "workflow": "order",
            "correlation_id": correlation_id,
            "steps": [
                {"name": n, "plugin": p, "tool": t, "args": args | faulty.get(n, {})}
                for n, p, t, args in steps
            ],
        }
    ).encode()


def fault(error: str, attempts: int) -> dict[str, Any]:
    return {"fault": {"error": error, "attempts": attempts}}


def test_a_healthy_workflow_runs_its_steps_and_has_each_effect_once(engine):
    (run,) = engine.run(engine.record(order("c1")))
    assert run.state == "succeeded"
    assert [(s.name, s.attempts) for s in run.steps] == [("reserve", 1), ("charge", 1), ("confirm", 1)]
    assert engine.effects() == ["c1/reserve", "c1/charge", "c1/confirm"]


def test_a_transient_fault_is_tried_again_and_leaves_one_effect(engine):
    (run,) = engine.run(engine.record(order("c1", charge=fault("TransientNetwork", 2))))
    assert run.state == "succeeded"
    assert [s.attempts for s in run.steps] == [1, 3, 1]
    assert engine.effects() == ["c1/reserve", "c1/charge", "c1/confirm"]


@pytest.mark.parametrize("error", ["TransientNetwork", "RateLimit", "PluginTimeout"])
def test_a_transient_fault_fails_the_workflow_after_three_tries(engine, error):
    (run,) = engine.run(engine.record(order("c1", charge=fault(error, 3))))
    assert run.failure.error_type == error
    assert (run.failure.component, run.failure.stage, run.failure.attempts) == (
        "payments.charge",
        "charge",
        3,
    )
    assert engine.effects() == ["c1/reserve"]


@pytest.mark.parametrize("error", ["ScopeViolation", "PluginError"])
def test_a_permanent_fault_is_tried_once(engine, error):
    (run,) = engine.run(engine.record(order("c1", charge=fault(error, 1))))
    assert (run.failure.error_type, run.failure.attempts) == (error, 1)


@pytest.mark.parametrize(
    ("attempts", "fails_at_retry_counts"), [(3, [0]), (4, [0]), (6, [0, 1]), (7, [0, 1])]
)
def test_tries_are_counted_over_replays(engine, attempts, fails_at_retry_counts):
    value = order("c1", charge=fault("TransientNetwork", attempts))
    failed = []
    for retry_count in range(4):
        (run,) = engine.run(engine.record(value, retry_count="0", dlq_retry_count=str(retry_count)))
        if run.state == "failed":
            failed.append(retry_count)
    assert failed == fails_at_retry_counts


def test_the_replays_retry_count_overrides_the_records_own(engine):
    assert engine.record(None, retry_count="7").retry_count == 7
    assert engine.record(None, retry_count="7", dlq_retry_count="2").retry_count == 2
    assert engine.record(None).retry_count == 0
    for hostile in ("-1", "x", "9" * 5000, "１"):
        assert engine.record(None, dlq_retry_count=hostile, retry_count="3").retry_count == 3


def test_completed_steps_are_not_run_again_by_the_replay(engine):
    value = order("c1", charge=fault("PluginError", 1))
    engine.run(engine.record(value))
    (replay,) = engine.run(engine.record(value, dlq_retry_count="1", dlq_key="k1"))
    assert replay.state == "succeeded"
    assert [s.name for s in replay.steps] == ["charge", "confirm"]
    assert engine.effects() == ["c1/reserve", "c1/charge", "c1/confirm"]
    row, steps = engine.safety.workflow("c1")
    assert (row["state"], row["retry_count"], row["failure"]) == ("succeeded", 1, None)
    assert [(s["name"], s["attempts"]) for s in steps] == [("reserve", 1), ("charge", 2), ("confirm", 1)]


def test_a_workflow_that_succeeded_is_a_duplicate_afterwards_without_effects(engine):
    engine.run(engine.record(order("c1"), dedupe_key="d1"))
    same, other_id = engine.run(
        engine.record(order("c1"), dedupe_key="d1", dlq_key="k1"),
        engine.record(order("c2"), dedupe_key="d1", dlq_key="k2"),
    )
    assert (same.duplicate_of, other_id.duplicate_of) == ("c1", "c1")
    assert len(engine.effects()) == 3
    outcomes = engine.safety.outcomes(["k1", "k2"])
    assert {key: state for key, (state, _) in outcomes.items()} == {"k1": "succeeded", "k2": "succeeded"}


def test_two_records_of_one_dedupe_key_in_one_batch_run_one_after_the_other(engine):
    slow = order("c1", reserve=fault("TransientNetwork", 1))
    first, second = engine.run(engine.record(slow, dedupe_key="d"), engine.record(slow, dedupe_key="d"))
    assert (first.duplicate_of, second.duplicate_of) == (None, "c1")
    assert len(engine.effects()) == 3


def test_a_first_try_that_failed_does_not_make_its_replay_look_done(engine):
    value = order("c1", reserve=fault("PluginError", 1))
    engine.run(engine.record(value, dedupe_key="d1"))
    (replay,) = engine.run(engine.record(value, dedupe_key="d1", dlq_retry_count="1"))
    assert (replay.state, replay.duplicate_of) == ("succeeded", None)


def test_the_outcome_of_a_replay_is_the_newest_and_success_is_final(engine):
    value = order("c1", reserve=fault("PluginError", 4))
    engine.run(engine.record(value, dlq_key="k1", dlq_retry_count="1"))
    assert engine.safety.outcomes(["k1"])["k1"][0] == "failed"
    engine.run(engine.record(value, dlq_key="k1", dlq_retry_count="2"))
    assert engine.safety.outcomes(["k1"])["k1"][0] == "succeeded"
    engine.run(engine.record(b"broken", correlation_id="c1", dlq_key="k1"))
    assert engine.safety.outcomes(["k1"])["k1"][0] == "succeeded"
    assert engine.safety.workflow("c1")[0]["state"] == "succeeded"
    assert engine.safety.outcomes(["never sent"]) == {}


def test_memory_is_refused_until_the_quota_is_raised(engine):
    value = json.dumps(
        {
            "workflow": "index",
            "correlation_id": "c1",
            "steps": [
                {"name": "e", "plugin": "embedding", "tool": "embed", "args": {"text": "x", "memory_mb": 600}}
            ],
        }
    ).encode()
    (run,) = engine.run(engine.record(value))
    assert (run.failure.error_type, run.failure.attempts) == ("MemoryQuotaExceeded", 1)
    with pytest.raises(AboveCeiling, match="2048") as refusal:
        engine.limiter.set_limit("embedding", 4096)
    assert refusal.value.ceiling == 2048
    with pytest.raises(UnknownPlugin, match="inventory"):
        engine.limiter.set_limit("nothing", 1)
    engine.limiter.set_limit("embedding", 1024)
    (run,) = engine.run(engine.record(value))
    assert run.state == "succeeded"


def test_quotas_and_their_counts_survive_a_restart(tmp_path, sandbox):
    first = Engine(tmp_path, sandbox)
    first.limiter.set_limit("embedding", 700)
    value = json.dumps(
        {
            "workflow": "index",
            "correlation_id": "c1",
            "steps": [
                {"name": "e", "plugin": "embedding", "tool": "embed", "args": {"text": "x", "memory_mb": 900}}
            ],
        }
    ).encode()
    first.run(first.record(value))
    first.store.close()
    again = Engine(tmp_path, sandbox)
    (quota,) = [q for q in again.limiter.quotas() if (q.plugin, q.resource) == ("embedding", "memory_mb")]
    assert (quota.limit, quota.ceiling, quota.peak_need, quota.rejected) == (700, 2048, 900, 1)
    again.store.close()


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (None, "no value"),
        (b"", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b'{"secret": "hunter2"', "not valid JSON"),
        (b"[]", "not a workflow"),
        (b'{"workflow": "order", "correlation_id": "c9"}', "steps"),
        (b'{"workflow": "order", "correlation_id": "c9", "steps": []}', "not a workflow"),
        (b'{"workflow": "order", "correlation_id": "c\\u0000", "steps": [1]}', "not a workflow"),
        (b'{"workflow": "order", "correlation_id": "\\ud800", "steps": [1]}', "not"),
        (order("c9").replace(b'"charge"', b'"reserve"', 1), "must differ"),
    ],
)
def test_a_record_that_is_no_workflow_fails_as_corrupt_and_its_message_quotes_nothing(engine, value, says):
    (run,) = engine.run(engine.record(value, correlation_id="from-header"))
    assert (run.failure.error_type, run.failure.stage) == ("DataCorruption", "decode")
    assert says in run.failure.message
    assert "hunter2" not in run.failure.message
    assert run.correlation_id == "from-header"
    assert engine.safety.workflow("from-header")[0]["state"] == "failed"


def test_wrong_arguments_are_corrupt_data_and_an_unknown_tool_is_a_plugin_error(engine):
    wrong = order("c1").replace(b'"quantity": 1', b'"quantity": "hunter2"')
    unknown = order("c2").replace(b'"tool": "charge"', b'"tool": "refund"')
    corrupt, missing = engine.run(engine.record(wrong), engine.record(unknown))
    assert corrupt.failure.error_type == "DataCorruption"
    assert "quantity" in corrupt.failure.message
    assert "hunter2" not in corrupt.failure.message
    assert (missing.failure.error_type, missing.failure.message) == (
        "PluginError",
        "there is no tool payments.refund",
    )


def broken(args: Charge, call: Call) -> dict[str, Any]:
    raise ZeroDivisionError("hunter2")


def test_a_plugin_that_breaks_fails_its_workflow_only_and_its_text_stays_in_the_stack_trace(
    engine, monkeypatch
):
    monkeypatch.setitem(TOOLS, ("payments", "charge"), Tool(Charge, broken, effect=True))
    (run,) = engine.run(engine.record(order("c1")))
    assert (run.failure.error_type, run.failure.message) == (
        "PluginError",
        "payments.charge raised ZeroDivisionError",
    )
    assert "hunter2" in run.failure.stack_trace
    assert "hunter2" not in engine.safety.workflow("c1")[0]["failure"]


def test_what_a_batch_did_is_recorded_wholly_or_not_at_all(engine):
    runs = asyncio.run(engine.runner.run([engine.record(order("c1"), dlq_key="k1")]))
    with pytest.raises(ZeroDivisionError):  # noqa: PT012 - the fault has to come inside the transaction
        with engine.store.transaction() as db:
            engine.safety.record(db, runs)
            raise ZeroDivisionError
    assert engine.effects() == []
    assert engine.safety.outcomes(["k1"]) == {}
    assert engine.safety.workflow("c1") is None


def test_one_folder_is_for_one_process(engine, tmp_path):
    with pytest.raises(StateInUse, match="in use"):
        Store(tmp_path)


def test_the_success_rate_counts_distinct_workflows_by_their_last_state(engine):
    value = order("c1", reserve=fault("PluginError", 1))
    engine.run(engine.record(value), engine.record(order("c2")), engine.record(b"broken"))
    assert engine.safety.success_rate(3600) == (1, 2)
    engine.run(engine.record(value, dlq_retry_count="1"))
    assert engine.safety.success_rate(3600) == (2, 1)


def test_waits_grow_with_full_jitter_and_stay_below_their_cap():
    backoff = Backoff(base_s=0.1, cap_s=0.5, max_tries=3000)
    random = Random(3)
    for tries, most in [(1, 0.1), (2, 0.2), (3, 0.4), (4, 0.5), (2000, 0.5)]:
        waits = [backoff.wait_s(tries, random) for _ in range(400)]
        assert max(waits) <= most
        # full jitter: anywhere between nothing and the most, not around it
        assert min(waits) < most * 0.1
        assert max(waits) > most * 0.9


def test_traffic_is_the_same_for_a_seed_and_other_for_another():
    assert list(workflows(200, 7)) == list(workflows(200, 7))
    assert list(workflows(200, 7)) != list(workflows(200, 8))


def test_each_kind_of_traffic_breaks_and_heals_as_its_name_says(engine):
    records = list(workflows(600, 3, dict.fromkeys(DEFAULT_MIX, 1.0)))
    assert {r.kind for r in records} == set(DEFAULT_MIX)
    first = engine.run(*(Record(f"orders/0/{n}", r.value, r.headers) for n, r in enumerate(records)))
    errors = {
        "transient": {"TransientNetwork"},
        "rate_limit": {"RateLimit"},
        "timeout": {"PluginTimeout"},
        "memory": {"MemoryQuotaExceeded"},
        "scope": {"ScopeViolation"},
        "plugin_error": {"PluginError"},
        "corrupt": {"DataCorruption"},
    }
    for record, run in zip(records, first, strict=True):
        assert {run.failure.error_type if run.failure else None} == errors.get(record.kind, {None}), (
            record.kind
        )
    engine.limiter.set_limit("embedding", 2048)
    replayed = engine.run(
        *(
            Record(f"orders/1/{n}", r.value, [*r.headers, ("dlq-retry-count", b"1")])
            for n, r in enumerate(records)
        )
    )
    for record, run in zip(records, replayed, strict=True):
        assert (run.state == "failed") == (record.kind in ("scope", "corrupt")), record.kind
    assert len(engine.effects()) == len(set(engine.effects()))
