"""Decisions that policy may take, or a person within a quarter of an hour."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, NoReturn

from airflow.providers.standard.operators.hitl import ApprovalOperator
from airflow.sdk.execution_time.hitl import HITLUser

from dlq_runbook.drains import Stopped, airflow_errors, attach
from dlq_runbook.forms import body, is_for, label, person, short
from dlq_runbook.operators.base import hold

if TYPE_CHECKING:
    from airflow.sdk import Context

    from dlq.config import Approval
    from dlq.drain import Drain

SWEEP_S = 60.0
"""The scheduler looks every 15 s for answers that are overdue, and then a worker has to start."""


@dataclass(frozen=True)
class Proposal:
    """What is to be decided: its hash, our facts, others' text, and whether policy may decide it."""

    digest: str
    subject: str
    facts: tuple[str, ...]
    untrusted: str
    within_policy: bool


class PlanApproval(ApprovalOperator):
    """Approve a plan at once where policy decides, else ask a person; no answer in time is a Reject.

    What is rejected stays open, and the tasks behind are skipped. The ledger's row is the decision of record:
    a retry goes by it instead of asking again, and only a person's clearing asks anew.

    :param queue_name: The queue's name, the stem of its file.
    """

    template_fields = ()

    def __init__(self, *, queue_name: str, **kwargs: Any) -> None:
        super().__init__(
            subject="Not asked yet",
            defaults=[self.REJECT],
            response_timeout=timedelta(minutes=15),
            **kwargs,
        )
        self.queue_name = queue_name

    def policy(self, approval: Approval) -> str:
        """Who decides: ``policy`` or ``person``."""
        raise NotImplementedError

    def proposal(self, drain: Drain, context: Context) -> Proposal:
        """What is to be decided now.

        :raises AirflowSkipException: where there is nothing to decide.
        """
        raise NotImplementedError

    def execute(self, context: Context) -> Any:
        with airflow_errors(), attach(self.queue_name, context) as drain:
            within, who = drain.config.approval.within, drain.config.approval.who
            hold(drain, within + SWEEP_S)
            proposal = self.proposal(drain, context)
            ours = self.policy(drain.config.approval) == "policy" and proposal.within_policy
            if drain.dry_run:
                return self.rehearse(proposal, "policy decides" if ours else "a person is asked")
            earlier = self.earlier(drain, proposal, context)
            if "decision" in earlier:
                return self.go(context, earlier)
            if ours:
                policy = f"policy:{drain.queue}.yaml@{drain.config.sha}"
                return self.go(
                    context, self.decide(drain, proposal, policy, self.APPROVE, "within its bounds")
                )
            until = self.ask(drain, proposal, earlier, within)
        self.subject = proposal.subject
        self.assigned_users = [HITLUser(id=each, name=each) for each in who] or None
        self.options = [label(self.APPROVE, proposal.digest), self.REJECT]
        self.body = body(
            (*proposal.facts, f"No answer until {until:%H:%M} UTC counts as Reject"), proposal.untrusted
        )
        self.response_timeout = timedelta(seconds=max(1.0, (until - datetime.now(UTC)).total_seconds()))
        return super().execute(context)

    def execute_complete(self, context: Context, event: dict[str, Any]) -> Any:
        if "error" in event:
            self.process_trigger_event_error(event)
        chosen = event["chosen_options"][0]
        timed_out = bool(event.get("timedout"))
        who = person(event.get("responded_by_user"), timed_out=timed_out)
        with airflow_errors(), attach(self.queue_name, context) as drain:
            hold(drain, SWEEP_S)
            proposal = self.proposal(drain, context)
            choice, why = self.REJECT, "no answer in time" if timed_out else "as they chose"
            if chosen != self.REJECT:
                if is_for(chosen, proposal.digest):
                    choice = self.APPROVE
                else:
                    why = (
                        f"the form was for another plan ({chosen}), this is {short(proposal.digest)}. "
                        "Airflow keeps the first form of a cleared task: start a new run to be asked anew"
                    )
            decided = self.decide(drain, proposal, who, choice, why)
        return self.go(context, decided)

    def rehearse(self, proposal: Proposal, how: str) -> dict[str, Any]:
        """A dry run goes on, asking nobody."""
        self.log.info("Dry run: here %s:\n%s", how, "\n".join((*proposal.facts, proposal.untrusted)))
        return {"choice": self.APPROVE, "hash": proposal.digest}

    def decide(self, drain: Drain, proposal: Proposal, who: str, choice: str, why: str) -> dict[str, Any]:
        """Write the decision down: who, when, what they saw, what they chose."""
        from dlq.decisions import record

        number = record(
            drain,
            drain.queue,
            who=who,
            kind=self.task_id,
            subject=proposal.digest,
            saw="; ".join(proposal.facts),
            choice=choice.lower(),
        )
        decided = {"choice": choice, "hash": proposal.digest, "decision": number, "who": who}
        said = f"{choice} of plan {short(proposal.digest)} by {who}: {why}"
        if choice == self.REJECT:
            said += ". The entries stay open"
        drain.note(self.task_id, said, level="info" if choice == self.APPROVE else "warning", **decided)
        return decided

    def ask(self, drain: Drain, proposal: Proposal, earlier: dict[str, Any], within: float) -> datetime:
        """Say that a person is asked, and until when; a retry keeps the first question's clock."""
        if "until" in earlier:
            drain.note(
                self.task_id,
                "asked again: Airflow can lose an answer given within seconds. Please answer once more",
                level="warning",
                **earlier,
            )
            return datetime.fromisoformat(earlier["until"])
        until = datetime.now(UTC) + timedelta(seconds=within)
        said = f"a person is asked until {until:%H:%M:%S} UTC; without an answer the entries stay open"
        drain.note(self.task_id, said, hash=proposal.digest, until=until.isoformat())
        return until

    def earlier(self, drain: Drain, proposal: Proposal, context: Context) -> dict[str, Any]:
        """What an earlier try of this task wrote about this plan; nothing once a person cleared the task."""
        ti = context["ti"]
        cleared = ti.max_tries > self.retries
        noted = None if ti.try_number == 1 or cleared else drain.noted(self.task_id)
        return noted if noted is not None and noted.get("hash") == proposal.digest else {}

    def go(self, context: Context, decided: dict[str, Any]) -> dict[str, Any]:
        """Go on, or skip what hangs on the approval."""
        if decided["choice"] == self.REJECT:
            tasks = context["task"].get_direct_relatives(upstream=False)
            self.skip(ti=context["ti"], tasks=[task for task in tasks if not task.is_teardown])
        return decided

    def on_kill(self) -> NoReturn:
        raise Stopped("told to stop before the decision was written down")
