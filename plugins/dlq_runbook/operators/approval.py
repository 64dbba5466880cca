"""Decisions that policy may take, or a person within a quarter of an hour."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, NoReturn

from airflow.providers.standard.operators.hitl import ApprovalOperator
from airflow.sdk.exceptions import AirflowSkipException

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
            within = drain.config.approval.within
            hold(drain, within + SWEEP_S)
            proposal = self.proposal(drain, context)
            ours = self.policy(drain.config.approval) == "policy" and proposal.within_policy
            if drain.dry_run:
                return self.rehearse(proposal, "policy decides" if ours else "a person is asked")
            earlier = self.earlier(drain, proposal, context)
            if "decision" in earlier:
                return self.go(context, earlier)
            if ours:
                who = f"policy:{drain.queue}.yaml@{drain.config.sha}"
                return self.go(context, self.decide(drain, proposal, who, self.APPROVE, "within its bounds"))
            until = self.ask(drain, proposal, earlier, within)
        self.subject = proposal.subject
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
            choice, why = self.REJECT, "no answer in time" if timed_out else "their choice"
            if chosen != self.REJECT:
                if is_for(chosen, proposal.digest):
                    choice = self.APPROVE
                else:
                    why = (
                        f"the form was for another plan ({chosen}), this is {short(proposal.digest)}. Airflow "
                        "keeps the first form of a cleared task: start a new run to be asked about this one"
                    )
            decided = self.decide(drain, proposal, who, choice, why)
        return self.go(context, decided)

    def rehearse(self, proposal: Proposal, how: str) -> dict[str, Any]:
        """A dry run goes on, asking nobody."""
        self.log.info("Dry run: here %s:\n%s", how, "\n".join((*proposal.facts, proposal.untrusted)))
        return {"choice": self.APPROVE, "hash": proposal.digest}

    def decide(self, drain: Drain, proposal: Proposal, who: str, choice: str, why: str) -> dict[str, Any]:
        """Write the decision down: who, when, what they saw, what they chose."""
        from dlq.ledger.jobs import record_decision

        with drain.ledger.write(drain.queue, None) as tx:
            saw = "; ".join(proposal.facts)
            number = record_decision(
                tx, drain.queue, who, self.task_id, proposal.digest, saw, choice.lower(), drain.id
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


class ApproveFix(PlanApproval):
    """Decide on the proposed fixes."""

    def policy(self, approval: Approval) -> str:
        return approval.fix

    def proposal(self, drain: Drain, context: Context) -> Proposal:
        proposed = context["ti"].xcom_pull(task_ids="propose_fix")
        fixes = proposed["fixes"]
        if not fixes:
            raise AirflowSkipException(f"Nothing to approve: {proposed['said']}")
        waiting = sum(fix["entries"] for fix in fixes)
        outside = sum(not fix["within_policy"] for fix in fixes)
        return Proposal(
            digest=proposed["hash"],
            subject=f"Queue {drain.queue}: raise {len(fixes)} limit(s) of plugins?",
            facts=(
                f"Drain `{drain.id}`, plan `{short(proposed['hash'])}`",
                f"{len(fixes)} limit(s) would be raised; {waiting:,} entries wait for it",
                f"{outside} of them outside the bounds of the queue's file"
                if outside
                else "All within the bounds of the queue's file",
                "Approve: the limits are raised, a few entries tried, the rest follows; if they fail, it is undone",
                "Reject: nothing changes, and the entries stay open",
            ),
            untrusted="\n".join(
                f"{fix['plugin']}: {fix['resource']} {fix['current']} -> {fix['proposed']} "
                f"(peak need {fix['peak_need']}, ceiling {fix['ceiling']}; {fix['entries']} entries)"
                for fix in fixes
            ),
            within_policy=not outside,
        )

    def rehearse(self, proposal: Proposal, how: str) -> dict[str, Any]:
        super().rehearse(proposal, how)
        raise AirflowSkipException("Dry run: nothing is applied")


class ApproveDr(PlanApproval):
    """Decide whether a drain of a very deep queue goes on, now that its backup is known to be good."""

    def policy(self, approval: Approval) -> str:
        return approval.dr

    def proposal(self, drain: Drain, context: Context) -> Proposal:
        guarded = context["ti"].xcom_pull(task_ids="guard_data_loss", key="guarded")
        verified = context["ti"].xcom_pull(task_ids="invoke_dr_plan")
        seen = json.dumps([drain.id, guarded, verified], sort_keys=True)
        return Proposal(
            digest=hashlib.sha256(seen.encode()).hexdigest(),
            subject=f"Queue {drain.queue}: go on with {guarded['outstanding']:,} dead letters?",
            facts=(
                f"Drain `{drain.id}`",
                f"{guarded['outstanding']:,} entries are outstanding; the limit is {guarded['limit']:,}",
                f"{verified['verified_entries']:,} entries in {verified['verified_segments']:,} archive segments "
                "were read back, every sum right: they can be restored",
                "Approve: entries are replayed, a canary first",
                "Reject: nothing is replayed, everything stays in custody, open",
            ),
            untrusted="",
            within_policy=True,
        )
