"""The graph, edge by edge: as it was run through a real scheduler some eighty times."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from airflow.sdk import DAG
from airflow.sdk.definitions.mappedoperator import MappedOperator
from airflow.serialization.serialized_objects import DagSerialization

EDGES = {
    "open_drain": {"acknowledge_alert", "wait_threshold", "isolate", "close_drain"},
    "acknowledge_alert": {"close_drain"},
    "wait_threshold": {"escalate"},
    "escalate": set(),
    "isolate": {"take_custody", "restore_routing"},
    "take_custody": {"inspect_sample"},
    "inspect_sample": {"guard_data_loss"},
    "guard_data_loss": {"invoke_dr_plan", "within_limits"},
    "invoke_dr_plan": {"approve_dr"},
    "approve_dr": {"categorize"},
    "within_limits": {"categorize"},
    "categorize": {"find_root_cause"},
    "find_root_cause": {"choose_remedies"},
    "choose_remedies": {"replay_canary", "propose_fix", "open_review", "nothing_to_do"},
    "replay_canary": {"replay_batches"},
    "replay_batches": {"drain_remaining"},
    "propose_fix": {"approve_fix"},
    "approve_fix": {"apply_fix"},
    "apply_fix": {"canary_fix"},
    "canary_fix": {"drain_remaining"},
    "open_review": {"drain_remaining"},
    "nothing_to_do": {"drain_remaining"},
    "drain_remaining": {"restore_routing", "verify_conservation"},
    "restore_routing": {"verify_conservation", "verify_golden_flows"},
    "verify_conservation": {"close_drain"},
    "verify_golden_flows": {"close_drain"},
    "close_drain": {"write_report"},
    "write_report": set(),
}
GROUPS = {
    "retry_transient": {"replay_canary", "replay_batches"},
    "fix_permanent": {"propose_fix", "approve_fix", "apply_fix", "canary_fix"},
    "manual_review": {"open_review"},
}
RULES = {
    "guard_data_loss": "none_failed",
    "categorize": "none_failed_min_one_success",
    "drain_remaining": "none_failed",
    "verify_conservation": "all_done",
    "verify_golden_flows": "all_done",
}
TEARDOWNS = {"restore_routing", "close_drain", "write_report"}

ORCHESTRATED: dict[str, Any] = {
    "orchestrator": {"connection": "flows"},
    "alerts": {"connection": "alertmanager", "matchers": {"queue": "orders"}},
    "limits": {"jobs": 8, "dr": 5, "batch": 10, "budget": "20m"},
    "approval": {"fix": "policy", "dr": "person"},
    "schedule": "*/30 * * * *",
    "golden_flows": "orders",
}


def edges(dag: DAG) -> dict[str, set[str]]:
    return {task.task_id: set(task.downstream_task_ids) for task in dag.tasks}


@pytest.fixture(params=[{}, ORCHESTRATED], ids=["bare", "with everything"])
def dag(queues: Any, request: pytest.FixtureRequest) -> DAG:
    queues.write("orders", **request.param)
    return queues.dag("orders")


def test_every_edge_is_there_and_no_other(dag: DAG) -> None:
    assert edges(dag) == EDGES


def test_the_groups_are_the_runbooks_headings(dag: DAG) -> None:
    assert {name: set(group.children) for name, group in dag.task_group_dict.items()} == GROUPS


def test_trigger_rules(dag: DAG) -> None:
    for task in dag.tasks:
        expected = "all_done_setup_success" if task.is_teardown else RULES.get(task.task_id, "all_success")
        assert task.trigger_rule == expected, task.task_id


def test_setups_and_teardowns(dag: DAG) -> None:
    assert {t.task_id for t in dag.tasks if t.is_setup} == {"open_drain", "isolate"}
    assert {t.task_id for t in dag.tasks if t.is_teardown} == TEARDOWNS
    # A run's state fails open: the one leaf that decides is the verdict.
    assert [t.task_id for t in dag.tasks if t.on_failure_fail_dagrun] == ["close_drain"]


def test_a_report_and_an_escalation_decide_nothing(dag: DAG) -> None:
    leaves = {t.task_id for t in dag.tasks if not t.downstream_task_ids}
    assert leaves == {"write_report", "escalate"}


def test_the_threshold_is_outside_of_isolation(dag: DAG) -> None:
    """A teardown waits for every task between it and its setup: it would wait half an hour for this one."""
    assert "isolate" not in dag.get_task("wait_threshold").get_flat_relative_ids(upstream=True)
    assert "restore_routing" not in dag.get_task("wait_threshold").get_flat_relative_ids(upstream=False)


def test_the_only_mapped_task_is_outside_of_mapped_groups(dag: DAG) -> None:
    mapped = [task for task in dag.tasks if isinstance(task, MappedOperator)]
    assert [task.task_id for task in mapped] == ["replay_batches"]
    assert mapped[0].get_closest_mapped_task_group() is None


def test_every_task_is_retried_soon(dag: DAG) -> None:
    for task in dag.tasks:
        assert task.retries >= (2 if task.is_teardown else 1), task.task_id
        assert timedelta(seconds=1) <= task.retry_delay <= timedelta(minutes=1), task.task_id
        assert task.retry_exponential_backoff, task.task_id


def test_nothing_may_skip_the_teardowns(dag: DAG) -> None:
    assert dag.dagrun_timeout is None
    assert not dag.fail_fast
    assert not any("ShortCircuit" in task.task_type for task in dag.tasks)


def test_approvals_wait_a_quarter_of_an_hour_at_most_and_default_to_reject(dag: DAG) -> None:
    for name in ("approve_fix", "approve_dr"):
        task = dag.get_task(name)
        assert timedelta(0) < task.response_timeout <= timedelta(minutes=15)
        assert task.defaults == ["Reject"]
        assert not task.fail_on_reject


def test_one_run_at_a_time_and_none_of_the_past(dag: DAG) -> None:
    assert dag.max_active_runs == 1
    assert dag.catchup is False
    assert dag.is_paused_upon_creation is False
    assert "backfill" not in {str(kind.value) for kind in dag.allowed_run_types or ()}


def test_tasks_have_a_pool_of_their_own_and_leave_the_celery_queue_alone(dag: DAG) -> None:
    for task in dag.tasks:
        assert task.pool == "dlq", task.task_id
        assert task.queue == "default", task.task_id
        assert task.owner == "on-call", task.task_id


def test_every_stage_has_an_end(dag: DAG) -> None:
    assert all(task.execution_timeout is not None for task in dag.tasks)


def test_each_task_and_the_dag_say_what_a_person_should_know(dag: DAG) -> None:
    assert "downstream" in (dag.doc_md or "")
    for task in dag.tasks:
        assert task.doc_md, task.task_id
        assert len(task.doc_md) > 30, task.task_id


def test_the_same_graph_for_every_configuration(queues: Any) -> None:
    """A local bundle changes under a live run, which goes on with the graph as it is then."""
    queues.write("bare")
    queues.write("full", **ORCHESTRATED)
    dags = queues.dags()
    assert edges(dags["dlq_drain__bare"]) == edges(dags["dlq_drain__full"])


def test_the_schedule_is_the_queues(queues: Any) -> None:
    queues.write("bare")
    queues.write("full", **ORCHESTRATED)
    dags = queues.dags()
    assert dags["dlq_drain__bare"].schedule is None
    assert dags["dlq_drain__full"].schedule == "*/30 * * * *"


def test_airflow_can_store_it(dag: DAG) -> None:
    stored = DagSerialization.from_dict(DagSerialization.to_dict(dag))
    assert set(stored.task_ids) == set(EDGES)
    assert stored.get_task("write_report").operator_extra_links


def test_a_review_holds_the_lease_only_after_the_answer(queues: Any) -> None:
    queues.write("orders")
    dag = queues.dag("orders", "review")
    assert edges(dag) == {
        "propose_review": {"decide_review"},
        "decide_review": {"open_drain"},
        "open_drain": {"apply_review", "close_drain"},
        "apply_review": {"verify_conservation"},
        "verify_conservation": {"close_drain"},
        "close_drain": {"write_report"},
        "write_report": set(),
    }
    assert [t.task_id for t in dag.tasks if t.is_setup] == ["open_drain"]
    assert [t.task_id for t in dag.tasks if t.on_failure_fail_dagrun] == ["close_drain"]
    assert dag.get_task("verify_conservation").trigger_rule == "all_done"
    assert dag.get_task("decide_review").response_timeout == timedelta(hours=12)
    assert dag.get_task("decide_review").defaults == ["Leave everything open"]
    assert all(task.doc_md for task in dag.tasks)
    assert dag.dagrun_timeout is None
