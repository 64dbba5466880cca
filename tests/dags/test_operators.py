"""The operators are thin: the same runs by hand, task after task, on the real core over a queue of memory."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from airflow.sdk import DAG
from airflow.sdk.exceptions import (
    AirflowFailException,
    AirflowSkipException,
    DownstreamTasksSkipped,
)
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from sqlalchemy import func, select
from tests.dags.conftest import TaskInstance

from dlq import telemetry
from dlq.config import load_queue
from dlq.drain import Drain, drain_id
from dlq.errors import ConfigError, Fenced, GateFailed, QueueBusy, Refused, SourceError
from dlq.ledger import lease
from dlq.ledger.schema import entry, queue
from dlq_runbook.drains import Stopped, airflow_errors, run_key, seconds_left
from dlq_runbook.operators.drain import check_reach
from dlq_runbook.operators.triage import table


class Run:
    """A Dag run without a scheduler: what each task returns and pushes is there for the next."""

    def __init__(self, dag: DAG, run_id: str = "run", conf: dict[str, Any] | None = None) -> None:
        self.dag = dag
        self.run = SimpleNamespace(
            dag_id=dag.dag_id, run_id=run_id, conf=conf or {}, start_date=datetime.now(UTC)
        )
        self.xcoms: dict[tuple[str, str], Any] = {}
        self.states: dict[str, str] = {}

    def context(self, task: Any) -> dict[str, Any]:
        ti = TaskInstance(pulled=self.xcoms, states=self.states)
        ti.task = task  # type: ignore[attr-defined]
        return {"dag_run": self.run, "ti": ti, "task_instance": ti, "task": task, "params": {}}

    def __call__(self, task_id: str, **mapped: Any) -> Any:
        """Run a task; returns what it returned, or the ids of the tasks it skipped."""
        task = self.dag.get_task(task_id)
        if mapped:
            task = task.unmap(mapped)
        context = self.context(task)
        try:
            result: Any = task.execute(context)
        except DownstreamTasksSkipped as skipped:
            result = {t if isinstance(t, str) else t[0] for t in skipped.tasks}
            self.states |= dict.fromkeys(result, "skipped")
        except BaseException:
            self.states[task_id] = "failed"
            raise
        else:
            self.xcoms[(task_id, "return_value")] = result
        finally:
            self.xcoms |= {(task_id, key): value for key, value in context["ti"].pushed.items()}
        self.states.setdefault(task_id, "success")
        return result


@pytest.fixture
def run(queues: Any) -> Iterator[Run]:
    queues.write("orders", slo={"workflows": 1000}, outcome={"grace": 0, "deadline": "5s"})
    queues.fill("orders", 12, "TransientNetwork")
    return Run(queues.dag("orders"))


def first_drain(run: Run) -> None:
    """Take what was there at the start: it waits for a decision, so later entries are another drain's."""
    run("open_drain")
    run("take_custody")
    with looked(run.run.run_id) as drain:
        lease.release(drain.ledger, drain.queue, drain.id, drain.epoch, "red")


def looked(run_id: str = "run") -> Drain:
    return Drain.look(drain_id("orders", run_id), config=load_queue("orders"), connections=lambda _: None)  # type: ignore[arg-type,return-value]


def count(state: str | None = None) -> int:
    with looked() as drain, drain.ledger.read() as tx:
        rows = select(func.count()).select_from(entry)
        return int(tx.execute(rows if state is None else rows.where(entry.c.state == state)).scalar_one())


def test_a_whole_drain_by_hand(run: Run, queues: Any) -> None:
    opened = run("open_drain")
    assert opened["drain"] == drain_id("orders", "run")
    run("acknowledge_alert")
    assert run("isolate")["isolation"] == "none"
    assert run("take_custody")["taken"] == 12
    assert len(run("inspect_sample")["sample"]) == 12
    assert run("guard_data_loss") == {"invoke_dr_plan"}
    run("categorize")
    run("find_root_cause")
    assert "open_review" not in run("choose_remedies")  # a first intake waits for a person
    assert run("open_review")["filed"]
    assert run("drain_remaining")["why_stopped"] == "the queue is empty and nothing is ready"
    run("restore_routing")
    assert run("verify_conservation")["proven"] is True
    assert run("verify_golden_flows")["passed"] is None
    verdict = run("close_drain")
    assert (verdict["verdict"], verdict["reasons"]) == ("green", [])
    assert sum(left["count"] for left in verdict["open"]) == 12
    written = run("write_report")
    assert written["html"].endswith(f"{opened['drain']}.html")


def test_what_comes_later_is_replayed(run: Run, queues: Any) -> None:
    first_drain(run)
    queues.fill("orders", 30, "TransientNetwork")
    second = Run(run.dag, "second")
    second("open_drain")
    assert second("take_custody")["taken"] == 30
    second("categorize")
    assert "replay_canary" not in second("choose_remedies")
    jobs = second("replay_canary")
    assert len(jobs) == 1
    assert second("replay_batches", job=jobs[0])["ended"] == "done"
    assert second("drain_remaining")["outstanding"] == 12
    assert count("confirmed") == 30
    assert second("verify_conservation")["proven"] is True
    assert second("close_drain")["verdict"] == "green"


def test_a_dry_run_changes_nothing(run: Run, queues: Any) -> None:
    run = Run(run.dag, "run", {"dry_run": True})
    from dlq.ledger import Ledger

    ledger = Ledger.open(load_queue("orders").ledger)
    for task in run.dag.topological_sort():
        if task.task_id in (
            "escalate",
            "invoke_dr_plan",
            "approve_dr",
            "approve_fix",
            "apply_fix",
            "canary_fix",
        ):
            continue
        if task.task_id in ("within_limits", "nothing_to_do", "replay_batches"):
            continue
        try:
            run(task.task_id)
        except AirflowSkipException:
            assert task.task_id == "wait_threshold"
    from dlq.ledger.schema import metadata

    with ledger.read() as tx:
        rows = {
            t.name: tx.execute(select(func.count()).select_from(t)).scalar_one()
            for t in metadata.sorted_tables
        }
    ledger.close()
    assert {name for name, n in rows.items() if n} == {"ledger", "allowed"}
    assert not list(queues.folder.parent.glob("archive/**/*"))


def test_a_refusal_of_going_on_replays_nothing(run: Run, queues: Any) -> None:
    """What hangs on the approval is skipped, but ``drain_remaining`` runs after skips."""
    first_drain(run)
    queues.fill("orders", 30, "TransientNetwork")
    second = Run(run.dag, "second")
    second("open_drain")
    second("take_custody")
    with looked("second") as drain:
        drain.note("approve_dr", "Reject by ada", choice="Reject", hash="x")
    assert second("drain_remaining")["why_stopped"] == "going on was rejected"
    assert count("confirmed") == 0


def test_a_broken_law_fails_the_proof_and_the_verdict_is_red(run: Run, queues: Any) -> None:
    for task in ("open_drain", "take_custody", "categorize", "drain_remaining"):
        run(task)
    [segment] = queues.folder.parent.glob("archive/**/*.parquet")
    spoilt = bytearray(segment.read_bytes())
    spoilt[len(spoilt) // 2] ^= 1
    segment.write_bytes(spoilt)
    with pytest.raises(AirflowFailException, match="not proven"):
        run("verify_conservation")
    assert run.xcoms[("verify_conservation", "proof")]["broken"]
    with pytest.raises(AirflowFailException, match="Verdict red"):
        run("close_drain")
    # Red is written down, and the queue is free again.
    assert run.xcoms[("close_drain", "verdict")]["verdict"] == "red"
    with looked() as drain, drain.ledger.read() as tx:
        assert tx.execute(select(queue.c.holder)).scalar_one() is None
    assert "RED" in run("write_report")["summary"]


def test_without_a_proof_there_is_no_green(run: Run) -> None:
    """Marking a verify task a success by hand skips it."""
    for task in ("open_drain", "take_custody", "categorize", "drain_remaining"):
        run(task)
    with pytest.raises(AirflowFailException, match="not verified"):
        run("close_drain")


def test_a_failed_stage_is_red_whatever_came_after(run: Run) -> None:
    for task in ("open_drain", "take_custody", "categorize", "drain_remaining"):
        run(task)
    run.states["find_root_cause"] = "failed"
    run.states["replay_batches_0"] = "failed"
    with pytest.raises(AirflowFailException, match="replay_batches_0 is failed"):
        run("close_drain")


def test_a_second_drain_waits_its_turn(run: Run) -> None:
    run("open_drain")
    with pytest.raises(QueueBusy):
        Run(run.dag, "another")("open_drain")


def test_an_older_drain_is_fenced_for_good(run: Run) -> None:
    run("open_drain")
    with looked() as drain:
        lease.release(drain.ledger, drain.queue, drain.id, drain.epoch, "red")
    Run(run.dag, "another")("open_drain")
    with pytest.raises(AirflowFailException, match="Fenced"):
        run("take_custody")
    assert run("write_report")["html"]  # a report only reads


def test_nothing_was_opened_so_there_is_nothing_to_report(run: Run) -> None:
    with pytest.raises(AirflowSkipException):
        run("write_report")


def test_a_setup_that_fails_late_frees_the_queue(run: Run, queues: Any) -> None:
    """No teardown runs behind it, so nobody else would."""
    text = (queues.folder / "queues" / "orders.yaml").read_text()
    queues.write_text("orders", f"{text}golden_flows: nowhere\norchestrator: {{connection: flows}}\n")
    with pytest.raises(AirflowFailException):
        Run(queues.dag("orders"))("open_drain")
    queues.write_text("orders", text)
    Run(queues.dag("orders"), "another")("open_drain")


def test_each_stage_extends_the_lease_to_its_own_end(run: Run) -> None:
    run("open_drain")
    run("take_custody")
    timeout = run.dag.get_task("take_custody").execution_timeout
    with looked() as drain, drain.ledger.read() as tx:
        until = datetime.fromisoformat(tx.execute(select(queue.c.lease_until)).scalar_one())
    assert until > datetime.now(UTC) + timeout - timedelta(minutes=1)


def test_the_incident_note_is_on_the_timeline(run: Run) -> None:
    Run(run.dag, "run", {"incident": "INC-7: pages since 02:10"})("open_drain")
    with looked() as drain, drain.ledger.read() as tx:
        from dlq.ledger.schema import event

        assert "INC-7" in " ".join(tx.execute(select(event.c.text)).scalars())


@pytest.mark.parametrize("error", [Fenced, Refused, ConfigError, GateFailed])
def test_what_a_retry_cannot_heal_fails_at_once(error: type[Exception]) -> None:
    with pytest.raises(AirflowFailException, match="do this"), airflow_errors():
        raise error("do this")


@pytest.mark.parametrize("error", [SourceError, QueueBusy, OSError])
def test_the_rest_is_retried(error: type[Exception]) -> None:
    with pytest.raises(error), airflow_errors():
        raise error("again")


def test_a_kill_ends_the_work_where_it_is(run: Run) -> None:
    """Airflow calls on_kill in its signal handler, and then only waits for the process to end."""
    run("open_drain")
    task = run.dag.get_task("take_custody")
    ended = []

    def work() -> None:
        try:
            signal.raise_signal(signal.SIGUSR1)
            ended.append("it went on")
        except Exception:  # noqa: BLE001 (the very thing: an ordinary handler must not keep it)
            ended.append("it was kept")

    before = signal.signal(signal.SIGUSR1, lambda *_: task.on_kill())
    try:
        with pytest.raises(Stopped):
            work()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert not ended


def test_what_is_left_of_the_hour(context: Any) -> None:
    given = context()
    assert 3599 < seconds_left(3600, given) <= 3600
    given["dag_run"].start_date = datetime.now(UTC) - timedelta(minutes=50)
    assert 590 < seconds_left(3600, given) <= 600
    assert seconds_left(60, given) == 0


def test_a_review_is_no_drain_though_its_run_has_the_same_id() -> None:
    assert run_key("dlq_drain__orders", "incident__7") == "incident__7"
    assert run_key("dlq_review__orders", "incident__7") != "incident__7"


@pytest.mark.parametrize(
    ("executor", "fields", "refused"),
    [
        ("LocalExecutor", {}, None),
        ("airflow.executors.local_executor.LocalExecutor", {}, None),
        ("CeleryExecutor", {}, "ledger, archive, report"),
        ("LocalExecutor,CeleryExecutor", {}, "ledger, archive, report"),
        ("team1:KubernetesExecutor", {}, "ledger, archive, report"),
        ("CeleryExecutor", {"ledger": "postgresql://db/dlq"}, "archive, report"),
        (
            "CeleryExecutor",
            {"ledger": "postgresql://db/dlq", "archive": "s3://b/a", "report": "file:///r"},
            "report",
        ),
        (
            "CeleryExecutor",
            {"ledger": "postgresql://db/dlq", "archive": "s3://b/a", "report": "s3://b/r"},
            None,
        ),
    ],
)
def test_what_lies_on_one_machine_needs_a_local_executor(
    queues: Any, executor: str, fields: dict[str, str], refused: str | None
) -> None:
    queues.write("orders", **fields)
    if refused is None:
        check_reach(load_queue("orders"), executor)
        return
    with pytest.raises(ConfigError, match=f"orders: {refused}: on one machine"):
        check_reach(load_queue("orders"), executor)


def test_a_sample_is_a_table_whatever_it_holds() -> None:
    hostile = {"place": "0/1", "error_type": "E\n\x1b[31mred", "message": "m" * 500 + "\u202e"}
    lines = table([hostile, {}]).split("\n")
    assert len(lines) == 3
    assert all(line.isprintable() for line in lines)
    assert max(map(len, lines)) < 200


def test_close_drain_tried_again_after_its_verdict_says_it_again(run: Run) -> None:
    first_drain(run)
    again = Run(run.dag, "again")
    for task in ("open_drain", "take_custody", "categorize", "drain_remaining", "verify_conservation"):
        again(task)
    given = again("close_drain")
    Run(run.dag, "another")("open_drain")
    assert again("close_drain") == given


def test_a_stages_span_continues_its_tasks(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    told = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(told))
    monkeypatch.setattr(telemetry, "_tracer", provider.get_tracer("dlq"))
    with provider.get_tracer("airflow").start_as_current_span("worker.task") as around:
        run("open_drain")
        run("take_custody")
        run.dag.get_task("categorize").queue_name = "nowhere"
        with pytest.raises(AirflowFailException):
            run("categorize")
    opened, took, failed, _ = told.get_finished_spans()
    assert {span.parent.span_id for span in (opened, took, failed)} == {around.get_span_context().span_id}
    assert (took.name, took.attributes["dlq.queue"], took.attributes["dlq.taken"]) == (
        "take_custody",
        "orders",
        12,
    )
    assert (failed.status.status_code.name, failed.attributes["error.type"]) == ("ERROR", "ConfigError")
