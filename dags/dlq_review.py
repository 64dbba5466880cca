"""Review of what only a person can decide, one Dag a queue. It may wait for hours, holding nothing."""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import DAG

from dlq.config import QueueConfig, load_queue, queue_names
from dlq_runbook.operators.broken import broken_dag
from dlq_runbook.operators.drain import CloseDrain, OpenDrain, WriteReport
from dlq_runbook.operators.review import ApplyReview, DecideReview, ProposeReview
from dlq_runbook.operators.verification import VerifyConservation
from dlq_runbook.params import dag_settings

RUNBOOK = """
# Decide what waits for a person in `{queue}`

Unique cases: corrupt data, unknown errors, entries that failed again after a replay. Trigger it when you have
time: the form under *Required Actions* offers to **replay**, **discard** or **leave** each piece of work, or
to replay values mended with `dlq edit` (by its draft's id) or `dlq repair` (one change for a group, by the
repair's id). Who decided what is recorded for good.

- It holds nothing while it waits for you: drains go on. What they change is refused, with the reason.
- After the answer it takes the queue's lease, does what you chose, and proves it.
"""


def review_dag(queue: QueueConfig) -> DAG:
    with DAG(
        dag_id=f"dlq_review__{queue.name}",
        description=f"Decide the dead letters of {queue.name} that only a person can",
        doc_md=RUNBOOK.format(queue=queue.name),
        schedule=None,
        max_active_runs=4,
        **dag_settings(queue),
    ) as dag:
        propose_review = ProposeReview(
            task_id="propose_review",
            doc_md=(
                "**List** the groups, drafts and repairs that wait for a person, each with a hash of what it is "
                "now.\n\nSkipped: nothing waits."
            ),
        )
        decide_review = DecideReview(
            task_id="decide_review",
            response_timeout=timedelta(hours=12),
            doc_md="**Decide**, under *Required Actions*, within 12 hours. No answer leaves everything open.",
        )
        open_drain = OpenDrain(
            task_id="open_drain",
            kind="review",
            retries=40,
            retry_delay=timedelta(minutes=1),
            max_retry_delay=timedelta(minutes=2),
            doc_md=(
                "**Take the queue's lease.** While a drain is live it waits for it, for up to an hour and "
                "more."
            ),
        )
        apply_review = ApplyReview(
            task_id="apply_review",
            execution_timeout=timedelta(seconds=queue.limits.budget) + timedelta(minutes=2),
            doc_md=(
                "**Do what was decided**, if each group still is what was shown; else it is refused, and "
                "nothing of it is done."
            ),
        )
        verify_conservation = VerifyConservation(
            task_id="verify_conservation",
            trigger_rule="all_done",
            execution_timeout=timedelta(hours=1),
            doc_md="**Prove it**, as after a drain.",
        )
        close_drain = CloseDrain(
            task_id="close_drain",
            doc_md="**Verdict**, and the lease is free again.",
        ).as_teardown(setups=open_drain, on_failure_fail_dagrun=True)
        write_report = WriteReport(
            task_id="write_report",
            doc_md="**Report**: what was decided, by whom, and what became of it.",
        ).as_teardown()

        (
            propose_review
            >> decide_review
            >> open_drain
            >> apply_review
            >> verify_conservation
            >> close_drain
            >> write_report
        )
    return dag


for name in queue_names():
    try:
        found = review_dag(load_queue(name))
    except Exception as error:  # noqa: BLE001 (whatever is wrong with one file must not take the other queues' Dags)
        found = broken_dag("review", name, error)
    globals()[found.dag_id] = found
