"""The Dag of a queue whose file can't be used."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NoReturn

from airflow.sdk import DAG, BaseOperator
from airflow.sdk.exceptions import AirflowFailException

from dlq.config import load_queue
from dlq_runbook.drains import airflow_errors
from dlq_runbook.forms import fenced

if TYPE_CHECKING:
    from airflow.sdk import Context


class BrokenQueue(BaseOperator):
    """The only task of a queue whose file can't be used: fails with field and fix.

    :param queue_name: The queue's name, the stem of its file.
    :param error: What was wrong when the Dag was parsed.
    """

    ui_color = "#f8e1e1"

    def __init__(self, *, queue_name: str, error: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.queue_name = queue_name
        self.error = error

    def execute(self, context: Context) -> NoReturn:
        with airflow_errors():
            load_queue(self.queue_name)
        raise AirflowFailException(
            f"When this Dag was parsed: {self.error}. Its file reads well now: wait until the Dag processor "
            "has seen it (the graph changes), then trigger again"
        )


def broken_dag(kind: str, queue_name: str, error: Exception) -> DAG:
    """A Dag of the id the queue's own would have, so that it is missed by nobody; the other queues go on.

    :param kind: ``drain`` or ``review``.
    """
    said = str(error) or type(error).__name__
    with DAG(
        dag_id=f"dlq_{kind}__{re.sub(r'[^A-Za-z0-9_.-]', '_', queue_name)}",
        description=f"Broken: the file of queue {queue_name} can't be used",
        doc_md=f"# This queue's file can't be used\n\n{fenced(said)}\n\nMend it.",
        schedule=None,
        catchup=False,
        is_paused_upon_creation=False,
        auto_register=False,
        tags=["dlq", "broken"],
    ) as dag:
        BrokenQueue(
            task_id="mend_the_queue_file",
            queue_name=queue_name,
            error=said,
            retries=0,
            doc_md="Fails with the file, the field and the fix.",
        )
    return dag
