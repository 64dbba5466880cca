"""The chaos Dag: there for a queue that is marked, and only for that; edge by edge."""

from __future__ import annotations

from typing import Any

import pytest

from dlq_runbook.drains import run_key

MARKED = {
    "orchestrator": {"connection": "orchestrator"},
    "golden_flows": "orders",
    "chaos": {"faults": {"corrupt": {"flow": "order", "corrupt": True}}},
}


def test_it_is_there_for_a_marked_queue_only(queues: Any) -> None:
    queues.write("orders")
    queues.write("marked", **MARKED)
    assert set(queues.dags("dlq_chaos.py")) == {"dlq_chaos__marked"}


def test_a_broken_file_is_the_drains_to_tell(queues: Any) -> None:
    queues.write("marked", **MARKED)
    queues.write("broken", chaos={"faults": {}})
    assert set(queues.dags("dlq_chaos.py")) == {"dlq_chaos__marked"}


def test_its_graph(queues: Any) -> None:
    queues.write("marked", **MARKED)
    dag = queues.dags("dlq_chaos.py")["dlq_chaos__marked"]
    assert {task.task_id: sorted(task.downstream_task_ids) for task in dag.tasks} == {
        "inject_faults": ["drain", "end_faults"],
        "drain": ["assert_recovery"],
        "assert_recovery": ["end_faults"],
        "end_faults": [],
    }
    assert dag.get_task("assert_recovery").trigger_rule == "all_done"
    assert dag.get_task("end_faults").is_teardown
    drain = dag.get_task("drain")
    assert (drain.trigger_dag_id, drain.wait_for_completion, drain.deferrable) == (
        "dlq_drain__marked",
        True,
        True,
    )
    assert all(task.doc_md for task in dag.tasks)


@pytest.mark.parametrize(("dag", "key"), [("drain", "r1"), ("review", "review:r1"), ("chaos", "chaos:r1")])
def test_runs_of_two_dags_are_no_drain_of_the_same_id(dag: str, key: str) -> None:
    assert run_key(f"dlq_{dag}__orders", "r1") == key
