"""Chaos, one Dag for each queue whose file allows it: break, let it dead-letter, drain, assert full recovery."""

from __future__ import annotations

from datetime import timedelta

from airflow.providers.standard.operators.trigger_dagrun import TriggerDagRunOperator
from airflow.sdk import DAG

from dlq.config import QueueConfig, load_queue, queue_names
from dlq.errors import ConfigError
from dlq_runbook.operators.chaos import AssertRecovery, EndFaults, InjectFaults
from dlq_runbook.params import dag_settings

RUNBOOK = """
# Chaos on `{queue}`

Breaks what the queue's golden flows need, one fault after the other: {faults}. Each time some workflows fail into
the dead-letter queue; then the queue's own drain runs, and every one of them must end as its golden flow says.

- **Only** this queue's file allows it (`chaos`). Never mark a queue whose workflows matter.
- **Stop it** at any time: `end_faults` brings back what was before.
- **Red**: something was not recovered. The report on `assert_recovery` names it.
"""


def chaos_dag(queue: QueueConfig) -> DAG:
    assert queue.chaos is not None
    hour = timedelta(hours=1)
    injecting = timedelta(seconds=queue.chaos.deadline * len(queue.chaos.faults), minutes=2)
    # While a drain that was scheduled is live, they wait for it.
    patient = {"retries": 40, "retry_delay": timedelta(minutes=1), "max_retry_delay": timedelta(minutes=2)}
    with DAG(
        dag_id=f"dlq_chaos__{queue.name}",
        description=f"Break what {queue.name} needs, drain what fails of it, and see that all of it is recovered",
        doc_md=RUNBOOK.format(queue=queue.name, faults=", ".join(queue.chaos.faults)),
        schedule=None,
        max_active_runs=1,
        **dag_settings(queue),
    ) as dag:
        inject_faults = InjectFaults(
            task_id="inject_faults",
            execution_timeout=injecting,
            **patient,
            doc_md=(
                "**Break** one thing after the other, each until its workflows are dead letters. What a drain is "
                "to mend (a quota, a scope) stays broken."
            ),
        )
        drain = TriggerDagRunOperator(
            task_id="drain",
            trigger_dag_id=f"dlq_drain__{queue.name}",
            trigger_run_id="chaos__{{ run_id }}__{{ ti.try_number }}",
            conf={"incident": "chaos run {{ run_id }}"},
            wait_for_completion=True,
            deferrable=True,
            poke_interval=5,
            retries=0,
            execution_timeout=timedelta(seconds=queue.limits.budget) + hour,
            doc_md="**Drain**, as in an incident: the queue's own Dag, started by this run. It must end green.",
        )
        assert_recovery = AssertRecovery(
            task_id="assert_recovery",
            trigger_rule="all_done",
            execution_timeout=timedelta(minutes=15),
            **patient,
            doc_md=(
                "**Recovered?** Repairs the corrupt records as a person would, then holds every workflow against "
                "its golden flow. Fails on any that is not recovered, and writes the report."
            ),
        )
        end_faults = EndFaults(
            task_id="end_faults",
            doc_md="**Bring back** quotas, scopes and calls as they were before, whatever happened.",
        ).as_teardown(setups=inject_faults)
        inject_faults >> drain >> assert_recovery >> end_faults
    return dag


for name in queue_names():
    try:
        config = load_queue(name)
    except ConfigError:  # dlq_drain says what is wrong with the file
        continue
    if config.chaos is not None:
        found = chaos_dag(config)
        globals()[found.dag_id] = found
