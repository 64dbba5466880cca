"""Approvals: by policy at once, by a person within the time, and the ledger's row is the decision of record."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from airflow.sdk.exceptions import (
    AirflowFailException,
    AirflowSkipException,
    DownstreamTasksSkipped,
    TaskAwaitingInput,
)
from airflow.sdk.execution_time import task_runner
from sqlalchemy import select

from dlq.drain import Drain
from dlq.ledger.schema import decision
from dlq_runbook import forms

PLAN, OTHER = "ab" * 32, "cd" * 32
HOSTILE = "geo`````\n![x](http://elsewhere/x.png)"


def fix(*, within: bool = True, plugin: str = "geo") -> dict[str, Any]:
    return {
        "plugin": plugin,
        "says": f"raise {plugin}.calls from 10 to 20 (needed 18, ceiling 30)",
        "entries": 40,
        "within_policy": within,
    }


def proposed(*fixes: dict[str, Any], digest: str = PLAN) -> dict[tuple[str, str], Any]:
    return {("propose_fix", "return_value"): {"fixes": list(fixes), "hash": digest, "said": "nothing helps"}}


DR: dict[tuple[str, str], Any] = {
    ("guard_data_loss", "guarded"): {"outstanding": 20_000, "limit": 10_000},
    ("invoke_dr_plan", "return_value"): {"verified_segments": 4, "verified_entries": 20_000},
}


class Supervisor:
    """Takes what a task would send to Airflow."""

    def __init__(self) -> None:
        self.sent: list[Any] = []

    def send(self, msg: Any) -> None:
        self.sent.append(msg)

    @property
    def form(self) -> Any:
        [form] = [msg for msg in self.sent if type(msg).__name__ == "CreateHITLDetailPayload"]
        return form


@pytest.fixture
def supervisor(monkeypatch: pytest.MonkeyPatch) -> Supervisor:
    made = Supervisor()
    monkeypatch.setattr(task_runner, "SUPERVISOR_COMMS", made, raising=False)
    return made


@pytest.fixture
def run(queues: Any, context: Any, supervisor: Supervisor) -> Any:
    """``run(task id, policy, pulled=…)``: the context and the task of an open drain's approval."""

    def build(
        task_id: str = "approve_fix", policy: str = "person", who: Sequence[str] = (), **given: Any
    ) -> tuple[Any, dict[str, Any]]:
        approval = {"fix": policy, "dr": policy, "within": "10m", "who": list(who)}
        queues.write("orders", approval=approval, source={"kind": "memory", "connection": "approvals"})
        queues.open().close()
        task = queues.dag("orders").get_task(task_id)
        return task, context(task, **given)

    return build


def look(queues: Any, run_id: str = "run") -> Drain:
    from dlq.config import load_queue
    from dlq.drain import drain_id

    return Drain.look(drain_id("orders", run_id), config=load_queue("orders"), connections=lambda _: None)  # type: ignore[arg-type,return-value]


def decisions(queues: Any) -> list[tuple[str, str, str, str]]:
    with look(queues) as drain, drain.ledger.read() as tx:
        rows = tx.execute(select(decision.c.who, decision.c.kind, decision.c.subject, decision.c.choice))
        return [tuple(row) for row in rows]  # type: ignore[misc]


def answer(option: str, *, user: str | None = "ada", timedout: bool = False) -> dict[str, Any]:
    return {
        "chosen_options": [option],
        "params_input": {},
        "responded_at": datetime.now(UTC),
        "responded_by_user": {"id": user, "name": user} if user else None,
        "timedout": timedout,
    }


def test_policy_approves_at_once_and_is_on_record(run: Any, queues: Any, supervisor: Supervisor) -> None:
    task, context = run(policy="policy", pulled=proposed(fix()))
    decided = task.execute(context)
    assert decided["choice"] == "Approve"
    assert decided["hash"] == PLAN
    [(who, kind, subject, choice)] = decisions(queues)
    assert who.startswith("policy:orders.yaml@")
    assert (kind, subject, choice) == ("approve_fix", PLAN, "approve")
    assert not supervisor.sent


def test_beyond_its_bounds_policy_asks_a_person(run: Any, queues: Any, supervisor: Supervisor) -> None:
    task, context = run(policy="policy", pulled=proposed(fix(), fix(within=False)))
    with pytest.raises(TaskAwaitingInput):
        task.execute(context)
    assert not decisions(queues)
    assert supervisor.form.options == ["Approve #abababababab", "Reject"]


def test_a_person_is_asked_for_a_while_and_no_answer_is_a_reject(run: Any, supervisor: Supervisor) -> None:
    task, context = run(pulled=proposed(fix(plugin=HOSTILE)))
    with pytest.raises(TaskAwaitingInput) as parked:
        task.execute(context)
    assert timedelta(minutes=9) < parked.value.timeout <= timedelta(minutes=10)
    assert supervisor.form.defaults == ["Reject"]
    assert supervisor.form.options == [forms.label("Approve", PLAN), "Reject"]


def test_only_those_the_file_names_may_answer(run: Any, supervisor: Supervisor) -> None:
    task, context = run(who=("ann", "bob"), pulled=proposed(fix()))
    with pytest.raises(TaskAwaitingInput):
        task.execute(context)
    assert [user.id for user in supervisor.form.assigned_users] == ["ann", "bob"]


def test_without_names_whoever_airflow_lets_may_answer(run: Any, supervisor: Supervisor) -> None:
    task, context = run(pulled=proposed(fix()))
    with pytest.raises(TaskAwaitingInput):
        task.execute(context)
    assert not supervisor.form.assigned_users


def test_the_form_shows_our_facts_first_and_the_rest_as_text(run: Any, supervisor: Supervisor) -> None:
    from tests.dags.test_forms import tokens

    task, context = run(pulled=proposed(fix(plugin=HOSTILE)))
    with pytest.raises(TaskAwaitingInput):
        task.execute(context)
    parsed = tokens(supervisor.form.body)
    kinds = [token.type for token in parsed]
    assert kinds.index("bullet_list_open") < kinds.index("fence")
    assert not {"image", "link_open", "html_block", "html_inline"} & set(kinds)
    [shown] = [token.content for token in parsed if token.type == "fence"]
    assert "![x](http://elsewhere/x.png)" in shown
    assert HOSTILE not in supervisor.form.subject


def test_the_lease_lasts_until_the_answer_is_due(run: Any, queues: Any) -> None:
    task, context = run(pulled=proposed(fix()))
    with pytest.raises(TaskAwaitingInput):
        task.execute(context)
    from dlq.ledger.schema import queue

    with look(queues) as drain, drain.ledger.read() as tx:
        until = tx.execute(select(queue.c.lease_until)).scalar_one()
    assert datetime.fromisoformat(until) > datetime.now(UTC) + timedelta(minutes=10)


def test_a_persons_approval_goes_on(run: Any, queues: Any) -> None:
    task, context = run(pulled=proposed(fix()))
    decided = task.execute_complete(context, answer("Approve #abababababab"))
    assert (decided["choice"], decided["hash"], decided["who"]) == ("Approve", PLAN, "ada")
    assert decisions(queues) == [("ada", "approve_fix", PLAN, "approve")]


def test_a_reject_skips_the_fix_only(run: Any, queues: Any) -> None:
    task, context = run(pulled=proposed(fix()))
    with pytest.raises(DownstreamTasksSkipped) as skipped:
        task.execute_complete(context, answer("Reject"))
    assert skipped.value.tasks == ["apply_fix"]
    assert decisions(queues) == [("ada", "approve_fix", PLAN, "reject")]


def test_no_answer_is_a_reject_by_nobody(run: Any, queues: Any) -> None:
    task, context = run(pulled=proposed(fix()))
    with pytest.raises(DownstreamTasksSkipped):
        task.execute_complete(context, answer("Reject", user=None, timedout=True))
    assert decisions(queues) == [("nobody", "approve_fix", PLAN, "reject")]


def test_an_approval_of_another_plan_is_refused(run: Any, queues: Any) -> None:
    """Airflow shows a cleared task's first form again: what is approved there is what was proposed then."""
    task, context = run(pulled=proposed(fix(), digest=OTHER))
    with pytest.raises(DownstreamTasksSkipped):
        task.execute_complete(context, answer("Approve #abababababab"))
    assert decisions(queues) == [("ada", "approve_fix", OTHER, "reject")]
    with look(queues) as drain, drain.ledger.read() as tx:
        from dlq.ledger.schema import event

        said = tx.execute(select(event.c.text).where(event.c.stage == "approve_fix")).scalars().all()
    assert "another plan" in said[-1]
    assert "start a new run" in said[-1]


def test_a_bare_approve_is_for_no_plan(run: Any, queues: Any) -> None:
    task, context = run(pulled=proposed(fix()))
    with pytest.raises(DownstreamTasksSkipped):
        task.execute_complete(context, answer("Approve"))
    assert decisions(queues)[0][3] == "reject"


def test_a_retry_goes_by_the_ledgers_row(run: Any, queues: Any, supervisor: Supervisor) -> None:
    task, context = run(pulled=proposed(fix()))
    first = task.execute_complete(context, answer("Approve #abababababab"))
    context["ti"].try_number = 2
    assert task.execute(context) == first
    assert len(decisions(queues)) == 1
    assert not supervisor.sent


def test_a_retry_goes_by_a_reject_too(run: Any, queues: Any) -> None:
    task, context = run(pulled=proposed(fix()))
    with pytest.raises(DownstreamTasksSkipped):
        task.execute_complete(context, answer("Reject"))
    context["ti"].try_number = 2
    with pytest.raises(DownstreamTasksSkipped):
        task.execute(context)
    assert len(decisions(queues)) == 1


def test_a_lost_answer_is_asked_for_again_within_the_first_time(run: Any, supervisor: Supervisor) -> None:
    task, context = run(pulled=proposed(fix()))
    with pytest.raises(TaskAwaitingInput) as first:
        task.execute(context)
    context["ti"].try_number = 2
    with pytest.raises(TaskAwaitingInput) as second:
        task.execute(context)
    assert second.value.timeout < first.value.timeout
    context["ti"].try_number = 3
    with pytest.raises(TaskAwaitingInput) as third:
        task.execute(context)
    assert third.value.timeout < second.value.timeout


def test_a_retry_with_another_plan_asks_about_that_one(run: Any, supervisor: Supervisor) -> None:
    task, context = run(pulled=proposed(fix()))
    task.execute_complete(context, answer("Approve #abababababab"))
    context["ti"].try_number = 2
    context["ti"].pulled = proposed(fix(), digest=OTHER)
    with pytest.raises(TaskAwaitingInput):
        task.execute(context)
    assert supervisor.form.options[0] == "Approve #cdcdcdcdcdcd"


def test_a_cleared_approval_is_asked_anew(run: Any, supervisor: Supervisor) -> None:
    task, context = run(pulled=proposed(fix()))
    with pytest.raises(DownstreamTasksSkipped):
        task.execute_complete(context, answer("Reject"))
    # Clearing gives a task its retries again, on top of the tries it had.
    context["ti"].try_number, context["ti"].max_tries = 2, 1 + task.retries
    with pytest.raises(TaskAwaitingInput):
        task.execute(context)


def test_nothing_proposed_is_nothing_to_approve(run: Any, queues: Any) -> None:
    task, context = run(pulled=proposed())
    with pytest.raises(AirflowSkipException):
        task.execute(context)
    assert not decisions(queues)


@pytest.mark.parametrize("policy", ["person", "policy"])
def test_a_dry_run_asks_nobody(run: Any, queues: Any, supervisor: Supervisor, policy: str) -> None:
    task, context = run(policy=policy, pulled=proposed(fix()), conf={"dry_run": True})
    with pytest.raises(AirflowSkipException):
        task.execute(context)
    assert not decisions(queues)
    assert not supervisor.sent


def test_a_dry_run_of_a_deep_queue_goes_on(run: Any, queues: Any, supervisor: Supervisor) -> None:
    task, context = run("approve_dr", pulled=DR, conf={"dry_run": True})
    assert task.execute(context)["choice"] == "Approve"
    assert not decisions(queues)
    assert not supervisor.sent


def test_policy_goes_on_with_a_deep_queue(run: Any, queues: Any) -> None:
    task, context = run("approve_dr", "policy", pulled=DR)
    assert task.execute(context)["choice"] == "Approve"
    assert decisions(queues)[0][1] == "approve_dr"


def test_a_person_is_told_what_was_verified(run: Any, supervisor: Supervisor) -> None:
    task, context = run("approve_dr", pulled=DR)
    with pytest.raises(TaskAwaitingInput):
        task.execute(context)
    assert "20,000 entries in 4 segments were read back" in supervisor.form.body


def test_what_was_verified_is_what_is_approved(run: Any, queues: Any, supervisor: Supervisor) -> None:
    task, context = run("approve_dr", pulled=DR)
    with pytest.raises(TaskAwaitingInput):
        task.execute(context)
    context["ti"].pulled = {**DR, ("guard_data_loss", "guarded"): {"outstanding": 99_999, "limit": 10_000}}
    with pytest.raises(DownstreamTasksSkipped) as skipped:
        task.execute_complete(context, answer(supervisor.form.options[0]))
    assert skipped.value.tasks == ["categorize"]


def test_who_was_fenced_decides_nothing(run: Any, queues: Any) -> None:
    task, context = run(pulled=proposed(fix()))
    from dlq.ledger import lease

    with look(queues) as drain:
        lease.release(drain.ledger, drain.queue, drain.id, drain.epoch, "red")
    queues.open(run_id="another").close()
    with pytest.raises(AirflowFailException, match="Fenced"):
        task.execute_complete(context, answer("Approve #abababababab"))
    assert not decisions(queues)
