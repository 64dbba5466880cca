"""Decisions that policy may take, or a person within a quarter of an hour."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, NoReturn

from airflow.providers.standard.operators.hitl import ApprovalOperator

from dlq_runbook.drains import Stopped, airflow_errors, attach
from dlq_runbook.forms import fenced, is_for, label, person
from dlq_runbook.operators.base import hold

if TYPE_CHECKING:
    from airflow.sdk import Context

    from dlq.drain import Drain

SWEEP_S = 60.0
"""The scheduler looks for answers that are late every 15 s, and then a worker starts."""


@dataclass(frozen=True)
class Proposal:
    """What is to be decided: its hash, our facts, others' text, and why policy may not decide it (None: it may)."""

    digest: str
    subject: str
    facts: tuple[str, ...]
    untrusted: str
    not_by_policy: str | None


class PlanApproval(ApprovalOperator):
    """Approve a plan by the queue's policy at once, or ask a person; no answer in time is a Reject.

    What is rejected stays open, and the tasks behind it are skipped. The decision is written to the ledger, and a
    retry uses that row instead of asking again; only a person's clearing asks anew.

    :param queue_name: The queue's name, the stem of its file.
    """

    template_fields = ()
    kind = ""
    """The decision's kind in the ledger."""

    def __init__(self, *, queue_name: str, **kwargs: Any) -> None:
        super().__init__(
            subject="Not asked yet", defaults=[self.REJECT], response_timeout=timedelta(minutes=15), **kwargs
        )
        self.queue_name = queue_name

    def by_policy(self, drain: Drain) -> bool:
        raise NotImplementedError

    def proposal(self, drain: Drain, context: Context) -> Proposal | None:
        """What is to be decided now, None where there is nothing."""
        raise NotImplementedError

    def execute(self, context: Context) -> Any:
        with airflow_errors(), attach(self.queue_name, context) as drain:
            within = drain.config.approval.within
            hold(drain, within + SWEEP_S)
            proposal = self.proposal(drain, context)
            if proposal is None:
                self.log.info("Nothing to approve")
                return {"choice": self.APPROVE, "hash": None, "decision": None, "who": None}
            if drain.dry_run:
                who = "policy" if self.by_policy(drain) and not proposal.not_by_policy else "a person"
                self.log.info("Dry run: %s would be asked:\n%s", who, "\n".join(proposal.facts))
                return {"choice": self.APPROVE, "hash": proposal.digest, "decision": None, "who": None}
            noted = self.noted(drain, proposal, context)
            if noted is not None and "decision" in noted:
                self.log.info("%s: decided before this try by %s", noted["choice"], noted["who"])
                return self.go(context, noted)
            if self.by_policy(drain) and proposal.not_by_policy is None:
                who = f"policy:{drain.queue}.yaml@{drain.config.sha}"
                return self.go(context, self.decide(drain, proposal, who, self.APPROVE, "within the queue's policy"))
            until = self.ask(drain, proposal, noted, within)
        left = (until - datetime.now(UTC)).total_seconds()
        self.options = [label(self.APPROVE, proposal.digest), self.REJECT]
        self.subject = proposal.subject
        self.body = body(proposal, until)
        self.response_timeout = timedelta(seconds=max(left, 1.0))
        return super().execute(context)

    def execute_complete(self, context: Context, event: dict[str, Any]) -> Any:
        if "error" in event:
            self.process_trigger_event_error(event)
        chosen = event["chosen_options"][0]
        timed_out = bool(event.get("timedout"))
        with airflow_errors(), attach(self.queue_name, context) as drain:
            hold(drain, SWEEP_S)
            proposal = self.proposal(drain, context)
            who = person(event.get("responded_by_user"), timed_out=timed_out)
            if proposal is None:
                choice, why = self.REJECT, "what was asked for is no longer proposed"
            elif chosen == self.REJECT:
                choice, why = self.REJECT, "time was up" if timed_out else "by a person"
            elif not is_for(chosen, proposal.digest):
                choice = self.REJECT
                why = f"the form was for plan {chosen.rsplit(' ', 1)[-1]}, the plan is now {proposal.digest[:12]}: start a new run"
            else:
                choice, why = self.APPROVE, "by a person"
            decided = self.decide(drain, proposal, who, choice, why, saw=chosen)
        return self.go(context, decided)

    def decide(
        self, drain: Drain, proposal: Proposal | None, who: str, choice: str, why: str, saw: str | None = None
    ) -> dict[str, Any]:
        """Write the decision down; the ledger's row is the one of record."""
        from dlq.decisions import record

        digest = proposal.digest if proposal else ""
        shown = {"option": saw, "facts": proposal.facts if proposal else ()}
        number = record(
            drain, drain.queue, who=who, kind=self.kind, subject=digest, saw=json.dumps(shown), choice=choice.lower()
        )
        decided = {"choice": choice, "hash": digest, "decision": number, "who": who}
        level = "info" if choice == self.APPROVE else "warning"
        drain.note(self.task_id, f"{choice} by {who}: {why}", level=level, **decided)
        return decided

    def ask(self, drain: Drain, proposal: Proposal, noted: dict[str, Any] | None, within: float) -> datetime:
        """Say that a person is asked, and until when; a retry goes on with the first question's clock."""
        if noted is not None and "until" in noted:
            self.log.warning("Asking again: Airflow may have lost a first answer given within seconds. Please answer once more")
            return datetime.fromisoformat(noted["until"])
        until = datetime.now(UTC) + timedelta(seconds=within)
        drain.note(
            self.task_id, f"a person is asked until {until:%H:%M:%S} UTC; no answer leaves the entries open",
            hash=proposal.digest, until=until.isoformat(),
        )
        return until

    def noted(self, drain: Drain, proposal: Proposal, context: Context) -> dict[str, Any] | None:
        """What an earlier try of this very task wrote about this plan; nothing where a person cleared the task."""
        ti = context["ti"]
        if ti.try_number == 1 or ti.max_tries > self.retries:
            return None
        found = drain.noted(self.task_id)
        return found if found is not None and found.get("hash") == proposal.digest else None

    def go(self, context: Context, decided: dict[str, Any]) -> dict[str, Any]:
        """Go on, or skip what hangs on the approval."""
        if decided["choice"] == self.APPROVE:
            self.log.info("Approved by %s", decided["who"])
            return decided
        self.log.warning("Rejected by %s: the entries stay open", decided["who"])
        tasks = context["task"].get_direct_relatives(upstream=False)
        self.skip(ti=context["ti"], tasks=[task for task in tasks if not task.is_teardown])
        return decided

    def on_kill(self) -> NoReturn:
        raise Stopped("told to stop before the decision was written down")


class ApproveFix(PlanApproval):
    """Decide on the proposed fixes."""

    kind = "fix"

    def by_policy(self, drain: Drain) -> bool:
        return drain.config.approval.fix == "policy"

    def proposal(self, drain: Drain, context: Context) -> Proposal | None:
        proposed = context["ti"].xcom_pull(task_ids="propose_fix")
        if not proposed or not proposed["fixes"]:
            return None
        fixes = proposed["fixes"]
        outside = sum(not fix["within_policy"] for fix in fixes)
        waiting = sum(fix["entries"] for fix in fixes)
        return Proposal(
            digest=proposed["hash"],
            subject=f"Queue {drain.queue}: raise {len(fixes)} limit(s) for {waiting:,} dead letters?",
            facts=(
                f"Drain `{drain.id}`, plan `{proposed['hash'][:12]}`",
                f"{len(fixes)} limit(s) would be raised; {waiting:,} entries wait for it",
                f"{outside} of them outside the bounds of the queue's file" if outside else "All within the bounds of the queue's file",
                "Approve: the limits are raised, a few entries are tried, and the rest follows. If they fail, it is rolled back",
                "Reject: nothing changes and the entries stay open, with their owner",
            ),
            untrusted="\n".join(
                f"{fix['plugin']}: {fix['resource']} {fix['current']} -> {fix['proposed']}"
                f" (peak need {fix['peak_need']}, ceiling {fix['ceiling']}, {fix['entries']} entries)"
                for fix in fixes
            ),
            not_by_policy=f"{outside} fix(es) outside its bounds" if outside else None,
        )


class ApproveDr(PlanApproval):
    """Decide whether a drain of this size goes on."""

    kind = "dr"

    def by_policy(self, drain: Drain) -> bool:
        return drain.config.approval.dr == "policy"

    def proposal(self, drain: Drain, context: Context) -> Proposal | None:
        verified = context["ti"].xcom_pull(task_ids="invoke_dr_plan")
        guarded = context["ti"].xcom_pull(task_ids="guard_data_loss", key="guarded")
        seen = json.dumps([drain.id, guarded, verified], sort_keys=True, default=str)
        return Proposal(
            digest=hashlib.sha256(seen.encode()).hexdigest(),
            subject=f"Queue {drain.queue}: go on with {guarded['outstanding']:,} dead letters?",
            facts=(
                f"Drain `{drain.id}`",
                f"{guarded['outstanding']:,} entries were outstanding at the opening; the limit is {guarded['limit']:,}",
                f"{verified['verified_segments']:,} archive segment(s) were read back in full: every byte taken can be restored",
                "Approve: entries are replayed, canary first",
                "Reject: nothing is replayed, everything stays in custody, open",
            ),
            untrusted="",
            not_by_policy=None,
        )


def body(proposal: Proposal, until: datetime) -> str:
    """The form's text: our facts first, others' text only inside a fence."""
    lines = [f"- {fact}" for fact in proposal.facts]
    lines.append(f"- No answer until {until:%H:%M} UTC counts as Reject")
    if proposal.untrusted:
        lines += ["", "What the platform says, word for word:", "", fenced(proposal.untrusted)]
    return "\n".join(lines)
