"""Work for people: filed by a drain, decided in a run of its own that may take hours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow.providers.standard.operators.hitl import HITLOperator
from airflow.sdk import Param
from airflow.sdk.definitions.param import ParamsDict
from airflow.sdk.exceptions import AirflowFailException, AirflowSkipException

from dlq_runbook.connections import connection
from dlq_runbook.drains import configuration, run_key
from dlq_runbook.forms import LABEL_DIGITS, fenced, person
from dlq_runbook.operators.base import DlqOperator

if TYPE_CHECKING:
    from airflow.sdk import Context

    from dlq.drain import Drain

LEAVE = "leave"


class OpenReview(DlqOperator):
    """File the cases that need a person as work, each with its owner."""

    def stage(self, drain: Drain, context: Context) -> dict[str, Any]:
        from dlq.review import open_review

        return open_review(drain)


class ProposeReview(DlqOperator):
    """List what waits for a person's decision, with a hash of each as it is now. Takes no lease: a person may take hours."""

    isolated = False

    def attached(self, context: Context) -> Drain:
        return looking(self.queue_name, context)

    def hold(self, drain: Drain) -> None:
        """Nothing is held while a person thinks."""

    def stage(self, drain: Drain, context: Context) -> list[dict[str, Any]]:
        from dlq.review import proposals

        found = proposals(drain, self.queue_name)
        if not found:
            raise AirflowSkipException(f"Nothing of queue {self.queue_name} waits for a person")
        self.log.info("%s group(s) wait for a person", len(found))
        return found


class DecideReview(HITLOperator):
    """Ask a person what to do with each group. The form carries ids and hashes, never a payload.

    :param queue_name: The queue's name, the stem of its file.
    """

    template_fields = ()
    APPLY = "Apply these decisions"
    LEAVE_ALL = "Leave everything open"

    def __init__(self, *, queue_name: str, **kwargs: Any) -> None:
        super().__init__(
            subject="Not asked yet", options=[self.APPLY, self.LEAVE_ALL], defaults=[self.LEAVE_ALL], **kwargs
        )
        self.queue_name = queue_name

    def execute(self, context: Context) -> Any:
        proposed = context["ti"].xcom_pull(task_ids="propose_review")
        self.subject = f"Queue {self.queue_name}: what to do with {len(proposed)} group(s) of dead letters?"
        self.body = "\n".join(
            [
                "- **replay** sends a group's entries again, as they are; **replay draft** sends a repaired value instead",
                "- **discard** settles them for good: nobody will run them; **leave** changes nothing",
                "- An edit is written with `dlq edit`, then start this review anew: its draft is offered here",
                "",
                "What the entries say of themselves, by group:",
                "",
                fenced("\n".join(f"[{each['subject']}] {each['summary']}" for each in proposed)),
            ]
        )
        self.params = ParamsDict({str(each["subject"]): _choice(each) for each in proposed})
        return super().execute(context)

    def execute_complete(self, context: Context, event: dict[str, Any]) -> dict[str, Any]:
        answered = super().execute_complete(context, event)
        who = person(answered["responded_by_user"], timed_out=bool(event.get("timedout")))
        given = answered["params_input"]
        if answered["chosen_options"] == [self.LEAVE_ALL] or all(value.startswith(LEAVE) for value in given.values()):
            raise AirflowSkipException(f"Left open, all of it, by {who}")
        choices = {}
        for each in context["ti"].xcom_pull(task_ids="propose_review"):
            subject = str(each["subject"])
            choice, _, digest = given.get(subject, "").rpartition(" #")
            if digest != each["hash"][:LABEL_DIGITS]:
                raise AirflowFailException(
                    f"Group {subject}: the form was for {digest or 'nothing'}, the proposal is {each['hash'][:LABEL_DIGITS]}; "
                    "Airflow keeps the first form of a cleared task: start a new review"
                )
            if choice not in each["choices"]:
                raise AirflowFailException(f"Group {subject}: {choice!r} is not among {', '.join(each['choices'])}")
            choices[subject] = {"choice": choice, "hash": each["hash"]}
            self.log.info("Group %s: %s", subject, choice)
        return {"choices": choices, "who": who}


class ApplyReview(DlqOperator):
    """Do what the person chose, under the queue's lease, if each group still is what they saw."""

    isolated = False

    def stage(self, drain: Drain, context: Context) -> dict[str, Any]:
        from dlq.review import apply_review

        decided = context["ti"].xcom_pull(task_ids="decide_review")
        return apply_review(drain, decided["choices"], decided["who"], self.deadline_s(drain, context))


def looking(queue_name: str, context: Context) -> Drain:
    """The queue's ledger and archive, to look at only."""
    from dlq.drain import dry

    run = context["dag_run"]
    return dry(configuration(queue_name, context), run_id=run_key(run.dag_id, run.run_id), connections=connection)


def _choice(proposed: dict[str, Any]) -> Param:
    digest = proposed["hash"][:LABEL_DIGITS]
    return Param(
        f"{LEAVE} #{digest}",
        type="string",
        enum=[f"{choice} #{digest}" for choice in proposed["choices"]],
        title=f"Group {proposed['subject']}",
        description=f"What it is: see [{proposed['subject']}] above.",
    )
