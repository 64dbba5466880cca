"""Work for people: filed by a drain, decided in a run of its own that may take hours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow.providers.standard.operators.hitl import HITLOperator
from airflow.sdk import Param
from airflow.sdk.definitions.param import ParamsDict
from airflow.sdk.exceptions import AirflowFailException, AirflowSkipException

from dlq_runbook.drains import is_dry, rehearse
from dlq_runbook.forms import body, label, one_line, person, short, unlabelled
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
    """List what waits for a person, each with the hash of exactly the entries it means. Takes no lease."""

    def attached(self, context: Context) -> Drain:
        return rehearse(self.queue_name, context)

    def hold(self, drain: Drain) -> None:
        """Nothing is held while a person thinks."""

    def stage(self, drain: Drain, context: Context) -> list[dict[str, Any]]:
        from dlq.review import proposals

        found = proposals(drain, drain.queue)
        if not found:
            self.log.info("Nothing of queue %s waits for a person", drain.queue)
            raise AirflowSkipException("Nothing waits for a person")
        self.log.info("%s piece(s) of work wait for a person", len(found))
        return found


class DecideReview(HITLOperator):
    """Ask a person what to do with each piece of work. The form carries ids and hashes, never a payload.

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
        if is_dry(context):
            self.log.info(
                "Dry run: a person would be asked about\n%s",
                "\n".join(one_line(f"{each['subject']}: {each['summary']}") for each in proposed),
            )
            return {"choices": {}, "who": "dry run"}
        self.subject = f"Queue {self.queue_name}: what to do with {len(proposed)} piece(s) of work?"
        self.body = body(
            (
                "**replay** sends the entries again as they are, or drafted values in their place",
                "**discard** settles them for good: nobody will run them; **leave** changes nothing",
                "To mend an entry use `dlq edit`, a whole group `dlq repair`, then start this review anew",
                "What changes until you answer is refused, and stays open",
            ),
            "\n".join(f"{each['subject']}: {each['summary']}" for each in proposed),
        )
        self.params = ParamsDict({_field(each): _choices(each) for each in proposed})
        return super().execute(context)

    def execute_complete(self, context: Context, event: dict[str, Any]) -> dict[str, Any]:
        answered = super().execute_complete(context, event)
        who = person(answered["responded_by_user"], timed_out=bool(event.get("timedout")))
        given = answered["params_input"]
        if answered["chosen_options"] == [self.LEAVE_ALL]:
            self.log.info("Everything stays open: %s", who)
            raise AirflowSkipException(f"Everything stays open: {who}")
        choices: dict[str, dict[str, str]] = {}
        for each in context["ti"].xcom_pull(task_ids="propose_review"):
            choice, digest = unlabelled(str(given.get(_field(each), "")))
            if digest != short(each["hash"]):
                raise AirflowFailException(
                    f"{each['subject']}: the form was for {digest or 'nothing'}, not {short(each['hash'])}. "
                    "Airflow keeps the first form of a cleared task: start a new review"
                )
            self.log.info("%s: %s, decided by %s", each["subject"], choice, who)
            choices[each["subject"]] = {"choice": choice, "hash": each["hash"]}
        return {"choices": choices, "who": who}


class ApplyReview(DlqOperator):
    """Do what was decided, where each piece of work still is what the person saw; the rest is refused."""

    isolated = False

    def stage(self, drain: Drain, context: Context) -> dict[str, Any]:
        from dlq.review import apply_review

        decided = context["ti"].xcom_pull(task_ids="decide_review")
        if decided is None:
            raise AirflowFailException("decide_review was marked, nobody decided: start a new review")
        applied = apply_review(drain, decided["choices"], decided["who"], self.deadline_s(drain, context))
        if applied["refused"]:
            context["ti"].xcom_push(key="applied", value=applied)
            raise AirflowFailException("Refused: " + "; ".join(applied["refused"]))
        return applied


def _field(proposed: dict[str, Any]) -> str:
    return str(proposed["subject"]).replace(" ", "_")


def _choices(proposed: dict[str, Any]) -> Param:
    return Param(
        label(LEAVE, proposed["hash"]),
        type="string",
        enum=[label(choice, proposed["hash"]) for choice in proposed["choices"]],
        title=proposed["subject"],
        description=f"Entries: {proposed['count']:,}. What they are is said above.",
    )
