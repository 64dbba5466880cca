"""A review asks first and takes the queue afterwards; what changed meanwhile is refused."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from airflow.sdk.exceptions import AirflowFailException, AirflowSkipException, TaskAwaitingInput
from airflow.sdk.execution_time import task_runner
from sqlalchemy import func, select
from tests.dags.conftest import no_connection
from tests.dags.test_approval import Supervisor
from tests.dags.test_forms import tokens
from tests.dags.test_operators import Run, looked

from dlq import repair
from dlq.config import load_queue
from dlq.ledger import lease
from dlq.ledger.schema import decision, entry, queue
from dlq.memory import MemoryTopics
from dlq.patch import Patch
from dlq.selection import Selection

APPLY, LEAVE = "Apply these decisions", "Leave everything open"


@pytest.fixture
def review(queues: Any) -> Run:
    """A queue of which 12 entries wait for a person, and a run of its review."""
    queues.write("orders", outcome={"grace": 0, "deadline": "5s"})
    queues.fill("orders", 12)
    drain = Run(queues.dag("orders"))
    for task in ("open_drain", "take_custody", "categorize", "open_review"):
        drain(task)
    with looked() as held:
        lease.release(held.ledger, held.queue, held.id, held.epoch, "red")
    return Run(queues.dag("orders", "review"), "review")


def answer(run: Run, choice: str, option: str = APPLY, *, only: str = "", **event: Any) -> Any:
    """Answer a run's form as a person would, the same for all work, or ``only`` for one kind of subject."""
    task = run.dag.get_task("decide_review")
    proposed = run.xcoms[("propose_review", "return_value")]
    form = {}
    for each in proposed:
        chosen = choice if each["subject"].startswith(only) else "leave"
        form[each["subject"].replace(" ", "_")] = f"{chosen} #{each['hash'][:12]}"
    given = {
        "chosen_options": [option],
        "params_input": form,
        "responded_at": datetime.now(UTC),
        "responded_by_user": {"id": "7", "name": "ada"},
        "timedout": False,
        **event,
    }
    decided = task.execute_complete(run.context(task), given)
    run.xcoms[("decide_review", "return_value")] = decided
    return decided


def states() -> dict[str, int]:
    with looked() as drain, drain.ledger.read() as tx:
        rows = tx.execute(select(entry.c.state, func.count()).group_by(entry.c.state))
        return {str(state): int(n) for state, n in rows}


def holder() -> str | None:
    with looked() as drain, drain.ledger.read() as tx:
        return tx.execute(select(queue.c.holder)).scalar_one()


def test_nothing_is_held_while_a_person_thinks(review: Run, queues: Any) -> None:
    assert review("propose_review")
    assert holder() is None
    # A drain goes on meanwhile.
    Run(queues.dag("orders"), "another")("open_drain")


def test_the_form_carries_ids_and_hashes_and_no_payload(review: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_runner, "SUPERVISOR_COMMS", supervisor := Supervisor(), raising=False)
    [proposed] = review("propose_review")
    with pytest.raises(TaskAwaitingInput):
        review("decide_review")
    form = supervisor.form
    assert (form.options, form.defaults) == ([APPLY, LEAVE], [LEAVE])
    [(name, field)] = form.params.items()
    tail = f" #{proposed['hash'][:12]}"
    assert name == proposed["subject"].replace(" ", "_")
    assert field["schema"]["enum"] == [f"leave{tail}", f"replay{tail}", f"discard{tail}"]
    assert field["value"] == f"leave{tail}"
    assert "payload" not in form.model_dump_json()
    kinds = [token.type for token in tokens(form.body)]
    assert kinds.index("bullet_list_open") < kinds.index("fence")


def test_what_is_discarded_is_on_record(review: Run) -> None:
    review("propose_review")
    assert answer(review, "discard")["who"] == "ada (7)"
    review("open_drain")
    assert review("apply_review")["discarded"] == 12
    assert states() == {"discarded": 12}
    with looked() as drain, drain.ledger.read() as tx:
        found = tx.execute(select(decision.c.who, decision.c.choice)).all()
    assert [tuple(row) for row in found] == [("ada (7)", "discard")]


def test_what_is_replayed_is_sent_once(review: Run) -> None:
    review("propose_review")
    answer(review, "replay")
    review("open_drain")
    assert review("apply_review")["confirmed"] == 12
    assert states() == {"confirmed": 12}


def test_a_second_answer_to_the_same_proposals_is_refused(review: Run) -> None:
    second = Run(review.dag, "second")
    for run in (review, second):
        run("propose_review")
        answer(run, "discard")
    review("open_drain")
    review("apply_review")
    with looked("review:review") as held:
        lease.release(held.ledger, held.queue, held.id, held.epoch, "green")
    second("open_drain")
    with pytest.raises(AirflowFailException, match="changed since it was looked at"):
        second("apply_review")
    assert second.xcoms[("apply_review", "applied")]["discarded"] == 0


def test_a_form_of_other_proposals_is_refused(review: Run) -> None:
    """Airflow shows a cleared task's first form again."""
    [proposed] = review("propose_review")
    review.xcoms[("propose_review", "return_value")] = [{**proposed, "hash": "00" * 32}]
    decided = {**proposed, "subject": proposed["subject"].replace(" ", "_")}
    stale = {decided["subject"]: f"discard #{proposed['hash'][:12]}"}
    with pytest.raises(AirflowFailException, match="start a new review"):
        answer(review, "discard", params_input=stale)


def test_a_form_that_leaves_something_out_is_refused(review: Run) -> None:
    review("propose_review")
    with pytest.raises(AirflowFailException, match="the form was for nothing"):
        answer(review, "discard", params_input={})


@pytest.mark.parametrize(
    "event", [{}, {"responded_by_user": None, "timedout": True}], ids=["chosen", "timed out"]
)
def test_leaving_everything_opens_nothing(review: Run, event: dict[str, Any]) -> None:
    review("propose_review")
    with pytest.raises(AirflowSkipException):
        answer(review, "leave", LEAVE, **event)
    assert holder() is None


def test_nothing_waits(queues: Any) -> None:
    queues.write("orders")
    queues.fill("orders")
    with pytest.raises(AirflowSkipException):
        Run(queues.dag("orders", "review"), "review")("propose_review")


def test_a_live_drain_is_waited_for(review: Run, queues: Any) -> None:
    from dlq.errors import QueueBusy

    Run(queues.dag("orders"), "another")("open_drain")
    review("propose_review")
    answer(review, "discard")
    with pytest.raises(QueueBusy):
        review("open_drain")
    task = review.dag.get_task("open_drain")
    patience = task.retries * task.retry_delay
    assert patience.total_seconds() > load_queue("orders").limits.budget / 2
    assert task.max_retry_delay.total_seconds() <= 120


def test_a_repair_is_offered_by_its_hash_and_sent_in_place_of_the_originals(
    review: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    with looked() as held, held.ledger.read() as tx:
        group = tx.execute(select(entry.c.grp)).scalars().first()
    text = b'[{"op": "replace", "path": "", "value": "not to be shown"}]'
    chosen = Selection(groups=(int(group or 0),))
    made = repair.make(load_queue("orders"), chosen, Patch(text), "ada", no_connection)
    proposed = review("propose_review")
    assert [p["subject"].split()[0] for p in proposed] == ["work", "repair"]
    assert proposed[1]["hash"] == made.hash

    monkeypatch.setattr(task_runner, "SUPERVISOR_COMMS", supervisor := Supervisor(), raising=False)
    with pytest.raises(TaskAwaitingInput):
        review("decide_review")
    form = supervisor.form
    tail = f" #{(made.hash or '')[:12]}"
    assert form.params[f"repair_{made.id}"]["schema"]["enum"] == [f"leave{tail}", f"replay{tail}"]
    assert f"patch {made.patch.sha[:12]}" in form.body
    assert "not to be shown" not in form.model_dump_json()

    answer(review, "replay", only="repair")
    review("open_drain")
    assert review("apply_review")["confirmed"] == 12
    with looked() as held:
        values = {r.value for r in MemoryTopics.shared(held.config.target.connection).records("memory")}
    assert values == {b"not to be shown"}


def test_a_dry_review_runs_to_its_end_asks_nobody_and_changes_nothing(review: Run, queues: Any) -> None:
    dry = Run(queues.dag("orders", "review"), "dry", {"dry_run": True})
    before = states()
    for task in ("propose_review", "decide_review", "open_drain", "apply_review", "verify_conservation"):
        dry(task)
    assert dry("close_drain")["verdict"] == "green"
    assert states() == before
    assert holder() is None
