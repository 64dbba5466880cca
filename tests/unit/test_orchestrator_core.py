"""The orchestrator's core: what a call may do to its process, its quotas, circuit and plugin; claims and forgetting."""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pytest
from tests.unit.test_orchestrator_runner import Engine, fault, order

from dlq_orchestrator.core.backoff import Backoff, RetryBudget
from dlq_orchestrator.core.circuit import Circuit, CircuitPolicy
from dlq_orchestrator.core.plugin_sandbox import PluginSandbox
from dlq_orchestrator.core.rate_limiter import PATIENCE_S, AboveCeiling, RateLimiter
from dlq_orchestrator.core.registry import Change, NoSuchPlugin, NotGrantable, Registry, StaleRevision
from dlq_orchestrator.core.sandbox_worker import OUTPUT_MAX
from dlq_orchestrator.core.workflow_safety import WorkflowSafety
from dlq_orchestrator.failures import (
    CircuitOpen,
    MemoryQuotaExceeded,
    PluginCrashed,
    PluginError,
    PluginTimeout,
    QuotaExceeded,
    ScopeViolation,
)
from dlq_orchestrator.plugins import MANIFESTS, TOOLS, Tool
from dlq_orchestrator.store import StateInUse, Store
from dlq_orchestrator.workflow import Call, Record, Step


class Args(msgspec.Struct, frozen=True):
    """What the tools of these tests are told."""

    path: str = ""


def _sleeps(_: Args, __: Call) -> dict[str, Any]:
    time.sleep(60)
    return {}


def _computes(_: Args, __: Call) -> dict[str, Any]:
    while True:
        pass


def _catches_everything(_: Args, __: Call) -> dict[str, Any]:
    while True:
        with suppress(Exception):
            time.sleep(60)


def _ignores_the_alarm(_: Args, __: Call) -> dict[str, Any]:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
    time.sleep(60)
    return {}


def _exits(_: Args, __: Call) -> dict[str, Any]:
    os._exit(7)


def _dies(_: Args, __: Call) -> dict[str, Any]:
    os.kill(os.getpid(), signal.SIGSEGV)
    return {}


def _ends_the_other_processes(_: Args, __: Call) -> dict[str, Any]:
    parent = os.getppid()
    for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        if int(pid) != os.getpid():
            os.kill(int(pid), signal.SIGKILL)
    return {"pid": os.getpid()}


def _takes_memory(_: Args, __: Call) -> dict[str, Any]:
    # more than malloc keeps of what was freed (mallopt(3): M_TRIM_THRESHOLD, at most 64 MiB)
    return {"bytes": len(bytearray(96 << 20))}


def _opens_a_socket(_: Args, __: Call) -> dict[str, Any]:
    socket.create_connection(("127.0.0.1", 9), timeout=0.01)
    return {}


def _hides_its_violation(_: Args, __: Call) -> dict[str, Any]:
    with suppress(Exception):
        socket.create_connection(("127.0.0.1", 9), timeout=0.01)
    return {"done": True}


def _writes_a_file(args: Args, __: Call) -> dict[str, Any]:
    Path(args.path).write_text("x")
    return {}


def _removes_a_file(args: Args, __: Call) -> dict[str, Any]:
    Path(args.path).unlink()
    return {}


def _starts_a_process(_: Args, __: Call) -> dict[str, Any]:
    subprocess.run(["true"], check=True)
    return {}


def _forks(_: Args, __: Call) -> dict[str, Any]:
    os.fork()
    return {}


def _loads_native_code(_: Args, __: Call) -> dict[str, Any]:
    ctypes.CDLL("libc.so.6")
    return {}


def _answers_no_data(_: Args, __: Call) -> dict[str, Any]:
    return {"it": object()}


def _answers_no_object(_: Args, __: Call) -> Any:
    return [1]


def _answers_too_much(_: Args, __: Call) -> dict[str, Any]:
    return {"it": "x" * OUTPUT_MAX}


def _speaks(_: Args, __: Call) -> dict[str, Any]:
    sys.stdout.write("ready http://attacker\n")
    sys.stdout.flush()
    return {"said": True}


_PLUGIN = [
    _sleeps,
    _computes,
    _catches_everything,
    _ignores_the_alarm,
    _exits,
    _dies,
    _ends_the_other_processes,
    _takes_memory,
    _opens_a_socket,
    _hides_its_violation,
    _writes_a_file,
    _removes_a_file,
    _starts_a_process,
    _forks,
    _loads_native_code,
    _answers_no_data,
    _answers_no_object,
    _answers_too_much,
    _speaks,
]


_TOOLS = TOOLS | {("p", run.__name__): Tool(Args, run, effect=False) for run in _PLUGIN}


@pytest.fixture(scope="module")
def sandbox():
    with PluginSandbox(_TOOLS, time_limit_s=10) as sandbox:
        yield sandbox


@pytest.fixture(scope="module")
def hasty():
    """One that has no time."""
    with PluginSandbox(_TOOLS, time_limit_s=0.3) as sandbox:
        yield sandbox


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "state")
    yield store
    store.close()


@pytest.fixture
def engine(tmp_path, sandbox):
    engine = Engine(tmp_path / "engine", sandbox)
    yield engine
    engine.store.close()


def call(sandbox: PluginSandbox, run: Any, *scopes: str, memory_mb: int = 16, **args: str) -> dict[str, Any]:
    step = Step("s", "p", run.__name__, args)
    called = Call(step, "k/s", "1.0", frozenset(scopes))
    return asyncio.run(sandbox.call(sandbox.prepare(step), called, 1, memory_mb))


@pytest.mark.parametrize(
    ("run", "says"),
    [
        (_sleeps, "300 ms"),
        (_computes, "300 ms"),
        (_catches_everything, "300 ms"),
        (_ignores_the_alarm, "was killed"),
    ],
)
def test_a_call_that_takes_too_long_is_stopped(hasty, sandbox, run, says):
    with pytest.raises(PluginTimeout, match=says):
        call(hasty, run)
    assert call(sandbox, _speaks) == {"said": True}


@pytest.mark.parametrize(
    ("run", "error", "says"),
    [
        (_exits, PluginCrashed, "exit code 7"),
        (_dies, PluginCrashed, f"exit code -{signal.SIGSEGV.value}"),
        (_takes_memory, MemoryQuotaExceeded, "16 MiB"),
        (_opens_a_socket, ScopeViolation, "network"),
        (_hides_its_violation, ScopeViolation, "network"),
        (_starts_a_process, ScopeViolation, "processes"),
        (_forks, ScopeViolation, "processes"),
        (_loads_native_code, ScopeViolation, "native"),
        (_answers_no_data, PluginError, "TypeError"),
        (_answers_no_object, PluginError, "no object"),
        (_answers_too_much, PluginError, "bytes"),
    ],
)
def test_whatever_a_call_does_is_its_own_failure_and_the_next_call_works(sandbox, run, error, says):
    with pytest.raises(error, match=says):
        call(sandbox, run)
    assert call(sandbox, _speaks) == {"said": True}


def test_a_call_may_what_its_plugin_declares(sandbox, tmp_path):
    kept = tmp_path / "kept"
    with pytest.raises(ScopeViolation, match="files:write"):
        call(sandbox, _writes_a_file, path=str(kept))
    assert not kept.exists()
    assert call(sandbox, _writes_a_file, "files:write", path=str(kept)) == {}
    with pytest.raises(ScopeViolation, match="files:write"):
        call(sandbox, _removes_a_file, "network", path=str(kept))
    assert kept.read_text() == "x"
    with pytest.raises(PluginError, match="ConnectionRefusedError"):
        call(sandbox, _opens_a_socket, "network")
    assert call(sandbox, _takes_memory, memory_mb=200)["bytes"] == 96 << 20


def test_processes_that_die_between_calls_are_replaced(hasty):
    pid = call(hasty, _ends_the_other_processes)["pid"]
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 90
    while True:  # a call that had been given to one of them may fail
        try:
            assert call(hasty, _speaks) == {"said": True}
            break
        except PluginCrashed:
            assert time.monotonic() < deadline


def test_a_circuit_opens_after_failures_in_a_row_and_lets_one_probe_through():
    now = [0.0]
    circuit = Circuit(CircuitPolicy(failures=3, open_s=1.0, open_max_s=3.0), lambda: now[0])
    for _ in range(2):
        circuit.failed()
    circuit.passed()  # in a row
    for _ in range(3):
        assert circuit.admit() is None
        circuit.failed()
    assert (circuit.state, circuit.admit()) == ("open", 1.0)
    circuit.failed()  # a call from before it opened changes nothing
    assert circuit.remaining_s() == 1.0
    for stays_open in (2.0, 3.0, 3.0):
        now[0] += circuit.remaining_s()
        assert circuit.state == "half_open"
        assert circuit.admit() is None
        assert circuit.admit() == 1.0  # one probe at a time
        circuit.failed()
        assert (circuit.state, circuit.remaining_s()) == ("open", stays_open)
    now[0] += 3
    assert circuit.admit() is None
    circuit.gave_up()  # a probe that never came to the plugin
    assert circuit.admit() is None
    circuit.passed()
    assert (circuit.state, circuit.admit(), circuit.admit()) == ("closed", None, None)


def test_a_plugin_that_is_down_is_left_alone_and_asked_again(tmp_path, sandbox):
    engine = Engine(tmp_path, sandbox, CircuitPolicy(failures=4, open_s=30))
    down = [
        engine.record(order(f"c{n}", charge=fault("TransientNetwork", 3)), dedupe_key=f"d{n}")
        for n in range(8)
    ]
    types = [run.failure.error_type for run in engine.run(*down)]
    assert engine.calls.circuit("payments").state == "open"
    assert CircuitOpen.error_type in types
    assert engine.calls.circuit("inventory").state == "closed"
    (left_alone,) = engine.run(engine.record(order("healthy")))
    assert left_alone.failure.error_type == "CircuitOpen"
    # it would have had to wait longer than a wait may be
    assert left_alone.failure.attempts == 1
    engine.store.close()


def test_a_plugin_that_answers_with_errors_is_not_down(tmp_path, sandbox):
    engine = Engine(tmp_path, sandbox, CircuitPolicy(failures=2))
    runs = engine.run(*(engine.record(order(f"c{n}", charge=fault("PluginError", 1))) for n in range(8)))
    assert {run.failure.error_type for run in runs} == {"PluginError"}
    assert engine.calls.circuit("payments").state == "closed"
    engine.store.close()


def limiter(store: Store, now: Any = time.monotonic) -> RateLimiter:
    return RateLimiter(store, {"p": (256, 512)}, ["p.t"], now)


STEP = Step("s", "p", "t")


@pytest.mark.parametrize(("subject", "tenant"), [("p", None), ("p.t", None), ("tenant:acme", "acme")])
def test_calls_past_a_rate_wait_and_past_patience_are_refused_with_when_to_come_again(store, subject, tenant):
    kept = limiter(store, lambda: 0.0)
    if tenant:
        asyncio.run(kept.take_turn(STEP, tenant))
    kept.set_limit(subject, 10, "calls_per_s")

    async def turns() -> tuple[int, float]:
        granted = 0
        while True:
            bucket = asyncio.create_task(kept.take_turn(STEP, tenant))
            await asyncio.sleep(0)
            if bucket.done() and (error := bucket.exception()):
                assert isinstance(error, QuotaExceeded)
                return granted, error.retry_after_s or 0.0
            granted += 1
            bucket.cancel()

    granted, after = asyncio.run(turns())
    # a second's worth at once, and a second's worth of waiting
    assert 18 <= granted <= 20
    assert PATIENCE_S < after <= PATIENCE_S + 0.2
    (quota,) = [q for q in kept.quotas() if (q.plugin, q.resource) == (subject, "calls_per_s")]
    assert quota.rejected == 1
    assert quota.peak_need >= granted


def test_a_rate_that_is_raised_lets_the_next_call_through(store):
    now = [0.0]
    kept = limiter(store, lambda: now[0])
    kept.set_limit("p", 1, "calls_per_s")
    asyncio.run(kept.take_turn(STEP, None))
    kept.set_limit("p", 1000, "calls_per_s")
    now[0] = 0.001
    asyncio.run(asyncio.wait_for(kept.take_turn(STEP, None), 0.5))
    with pytest.raises(AboveCeiling):
        kept.set_limit("p", 10**9, "calls_per_s")


def test_calls_at_once_are_bounded_in_their_order_and_a_raised_limit_holds_at_once(store):
    kept = limiter(store)
    kept.set_limit("p", 2, "concurrency")
    at_once, most, order_of = 0, 0, []

    async def one(n: int) -> None:
        nonlocal at_once, most
        async with kept.among(STEP):
            at_once += 1
            most = max(most, at_once)
            order_of.append(n)
            await asyncio.sleep(0.001)
            at_once -= 1

    async def all_of_them() -> None:
        await asyncio.gather(*(one(n) for n in range(20)))

    asyncio.run(all_of_them())
    assert (most, order_of) == (2, list(range(20)))
    kept.set_limit("p", 5, "concurrency")
    asyncio.run(all_of_them())
    assert most == 5


def test_tenants_that_are_made_up_share_one_quota(store):
    kept = limiter(store)

    async def all_of_them() -> None:
        for n in range(1100):
            await kept.take_turn(STEP, f"t{n}")

    asyncio.run(all_of_them())
    tenants = [q for q in kept.quotas() if q.plugin.startswith("tenant:")]
    assert len(tenants) == 1001
    with store.transaction() as db:
        kept.save_counts(db)
    assert len(limiter(store).quotas()) == len(kept.quotas())


def test_a_change_of_a_plugin_is_durable_and_of_the_revision_that_was_seen(store):
    registry = Registry(store, MANIFESTS)
    registry.change("notify", Change(0, "ada", "it asks for it", frozenset({"notify:send", "notify:admin"})))
    with pytest.raises(StaleRevision, match="revision 1"):
        registry.change("notify", Change(0, "bob", "me too", disabled=True))
    with pytest.raises(NotGrantable, match="payments:admin"):
        registry.change("payments", Change(0, "bob", "hm", frozenset({"payments:admin"})))
    with pytest.raises(NotGrantable, match=r"1\.0, 1\.1"):
        registry.change("payments", Change(0, "bob", "hm", version="9"))
    with pytest.raises(NoSuchPlugin, match="embedding"):
        registry.change("nothing", Change(0, "bob", "hm"))
    registry.change("notify", Change(1, "ada", "newer", version="1.1"))
    registry.violated("search", "network")
    with store.transaction() as db:
        registry.save_counts(db)
    again = Registry(store, MANIFESTS)
    notify = again.plugin("notify")
    assert (notify.version, notify.revision, notify.disabled) == ("1.1", 2, False)
    assert notify.scopes == {"notify:send", "notify:admin"}
    assert [(v.scope, v.count) for v in again.violations("search")] == [("network", 1)]
    with store.read() as db:
        said = db.execute("SELECT revision, person, reason FROM plugin_change ORDER BY revision").fetchall()
    assert [tuple(row) for row in said] == [(1, "ada", "it asks for it"), (2, "ada", "newer")]


def test_a_scope_violation_ends_when_the_scope_is_granted(engine):
    broken = order("c1", confirm=fault("ScopeViolation", 1_000_000))
    (run,) = engine.run(engine.record(broken))
    assert run.failure.error_type == "ScopeViolation"
    (violation,) = engine.registry.violations("notify")
    assert (violation.scope, violation.count) == ("notify:admin", 1)
    scopes = engine.registry.plugin("notify").scopes | {violation.scope}
    engine.registry.change("notify", Change(0, "ada", "granted", scopes))
    (again,) = engine.run(engine.record(broken, dlq_retry_count="1"))
    assert again.state == "succeeded"


def test_a_fault_of_a_version_ends_with_it_and_a_disabled_plugin_is_not_called(engine):
    args = {"fault": {"error": "PluginError", "attempts": 100, "version": "1.0"}}
    (run,) = engine.run(engine.record(order("c1", confirm=args)))
    assert run.failure.error_type == "PluginError"
    engine.registry.change("notify", Change(0, "ada", "fixed there", version="1.1"))
    (again,) = engine.run(engine.record(order("c1", confirm=args), dlq_retry_count="1"))
    assert again.state == "succeeded"
    engine.registry.change("notify", Change(1, "ada", "off", disabled=True))
    (off,) = engine.run(engine.record(order("c2")))
    assert (off.failure.error_type, off.failure.attempts) == ("PluginDisabled", 1)


def test_a_crash_is_not_tried_again(engine):
    (run,) = engine.run(engine.record(order("c1", charge=fault("PluginCrashed", 1))))
    assert (run.failure.error_type, run.failure.attempts) == ("PluginCrashed", 1)
    (again,) = engine.run(engine.record(order("c1", charge=fault("PluginCrashed", 1)), dlq_retry_count="1"))
    assert again.state == "succeeded"
    assert engine.effects() == ["c1/reserve", "c1/charge", "c1/confirm"]


def test_who_refused_says_when_to_come_again_and_is_not_asked_sooner():
    backoff, random = Backoff(base_s=0.1, cap_s=2.0, max_tries=3), Random(1)
    assert all(0.5 <= (backoff.wait_s(1, random, 0.5) or 0) <= 0.6 for _ in range(100))
    assert backoff.wait_s(1, random, 2.1) is None
    assert backoff.wait_s(3, random) is None


def test_retries_are_a_share_of_what_goes_well():
    budget = RetryBudget(share=0.5, reserve=2)
    assert [budget.take() for _ in range(3)] == [True, True, False]
    budget.earn()
    assert not budget.take()
    budget.earn()
    assert [budget.take(), budget.take()] == [True, False]


def test_a_replay_that_was_being_run_when_the_process_died_is_pending(store):
    safety = WorkflowSafety(store)
    safety.claim([Record("o/0/1", b"{}", [("dlq-key", b"k1")]), Record("o/0/2", b"{}", [])])
    again = WorkflowSafety(store)
    assert again.outcomes(["k1", "k2"])["k1"][0] == "pending"
    assert "k2" not in again.outcomes(["k1", "k2"])


def test_a_claim_ends_with_the_record_of_its_run_and_success_stays_final(engine):
    value = order("c1", reserve=fault("PluginError", 1))
    first = engine.record(value, dlq_key="k1", dlq_retry_count="0")
    engine.safety.claim([first])
    engine.run(first)
    assert engine.safety.outcomes(["k1"])["k1"][0] == "failed"
    engine.safety.claim([first])
    assert engine.safety.outcomes(["k1"])["k1"][0] == "pending"
    engine.run(engine.record(value, dlq_key="k1", dlq_retry_count="1"))
    engine.safety.claim([first])
    assert engine.safety.outcomes(["k1"])["k1"][0] == "succeeded"


def test_what_is_over_is_forgotten_after_its_time(tmp_path):
    now = [1_000_000.0]
    store = Store(tmp_path, lambda: now[0])
    safety = WorkflowSafety(store, keep_s=3600)

    def counts() -> list[int]:
        tables = ("workflow", "step", "effect", "dedupe", "outcome")
        with store.read() as db:
            return [db.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in tables]

    with PluginSandbox(TOOLS, 0.3) as sandbox:
        engine = Engine(tmp_path / "other", sandbox)
        runs = asyncio.run(engine.runner.run([engine.record(order("c1"), dlq_key="k1")]))
        engine.store.close()
    with store.transaction() as db:
        safety.record(db, runs)
    assert counts() == [1, 3, 3, 1, 1]
    now[0] += 3599
    with store.transaction() as db:
        safety.record(db, [])
    assert counts() == [1, 3, 3, 1, 1]
    now[0] += 2
    with store.transaction() as db:
        safety.record(db, [])
    assert counts() == [0, 0, 0, 0, 0]
    store.close()


def test_a_folder_of_another_version_is_refused(tmp_path):
    store = Store(tmp_path)
    with store.transaction() as db:
        db.execute("PRAGMA user_version = 1")
    store.close()
    with pytest.raises(StateInUse, match="another version"):
        Store(tmp_path)


def test_a_tenants_quota_is_of_its_workflows_only(engine):
    document = json.loads(order("c1")) | {"tenant": "acme"}
    engine.run(engine.record(json.dumps(document).encode()))
    engine.limiter.set_limit("tenant:acme", 1, "calls_per_s")
    records = [engine.record(json.dumps(document | {"correlation_id": f"a{n}"}).encode()) for n in range(20)]
    errors = {run.failure.error_type for run in engine.run(*records) if run.failure}
    assert errors == {"QuotaExceeded"}
    (run,) = engine.run(engine.record(order("c9")))
    assert run.state == "succeeded"
