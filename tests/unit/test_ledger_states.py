"""What the database itself refuses, whoever writes: forbidden moves, lost entries, changed decisions and plans."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError
from tests.ledger_rig import DRAIN, NEED_A_JOB, QUEUE, LedgerRig

from dlq.ledger.schema import ALLOWED, SETTLED, UNSETTLED

STATES = (*UNSETTLED, *SETTLED)


def values_of(state: str, job: str) -> dict[str, Any]:
    """What else a row in ``state`` must say."""
    return {
        "s": state,
        "d": None if state in UNSETTLED else DRAIN,
        "j": job if state in (*NEED_A_JOB, "ambiguous") else None,
    }


MOVE = "UPDATE entry SET state = :s, settled_drain = :d, job = :j WHERE id = :e"


def test_every_transition_that_is_not_allowed_is_refused_and_every_other_is_made(
    ledger_rig: LedgerRig,
) -> None:
    job = ledger_rig.job()
    wrong = []
    for before, after in product(STATES, STATES):
        if before == after:
            continue
        number = ledger_rig.entry(before, job=values_of(before, job)["j"])
        try:
            ledger_rig.execute(MOVE, e=number, **values_of(after, job))
            moved = True
        except IntegrityError as error:
            moved = "transition not allowed" not in str(error)
        if moved != ((before, after) in ALLOWED) or ledger_rig.state(number) != (after if moved else before):
            wrong.append((before, after, moved))
    assert wrong == []


def test_no_state_but_those_known_can_be_written(ledger_rig: LedgerRig) -> None:
    number = ledger_rig.entry()
    with pytest.raises(IntegrityError):
        ledger_rig.execute("UPDATE entry SET state = 'lost' WHERE id = :e", e=number)


def test_a_settled_entry_never_becomes_unsettled(ledger_rig: LedgerRig) -> None:
    assert {after for before, after in ALLOWED if before in SETTLED} <= set(SETTLED)
    number = ledger_rig.entry("confirmed")
    with pytest.raises(IntegrityError):
        ledger_rig.execute("UPDATE entry SET settled_drain = NULL WHERE id = :e", e=number)


@pytest.mark.parametrize("state", UNSETTLED)
def test_an_unsettled_entry_is_never_deleted(ledger_rig: LedgerRig, state: str) -> None:
    number = ledger_rig.entry(state)
    with pytest.raises(IntegrityError, match="an unsettled entry is never deleted"):
        ledger_rig.execute("DELETE FROM entry WHERE id = :e", e=number)
    assert ledger_rig.state(number) == state


def test_a_settled_entry_may_be_pruned(ledger_rig: LedgerRig) -> None:
    number = ledger_rig.entry("discarded")
    ledger_rig.execute("DELETE FROM entry WHERE id = :e", e=number)
    assert ledger_rig.rows("SELECT 1 FROM entry WHERE id = :e", e=number) == []


@pytest.mark.parametrize("state", NEED_A_JOB)
def test_what_was_sent_or_will_be_names_its_job(ledger_rig: LedgerRig, state: str) -> None:
    with pytest.raises(IntegrityError):
        ledger_rig.entry(state, job=None)


@pytest.mark.parametrize("state", STATES)
def test_settled_and_who_settled_it_go_together(ledger_rig: LedgerRig, state: str) -> None:
    with pytest.raises(IntegrityError):
        ledger_rig.entry(state, settled_drain=DRAIN if state in UNSETTLED else None)


@pytest.mark.parametrize("column", ["duplicate_of", "return_of"])
def test_no_entry_is_its_own_twin_or_return(ledger_rig: LedgerRig, column: str) -> None:
    number = ledger_rig.entry()
    with pytest.raises(IntegrityError):
        ledger_rig.execute(f"UPDATE entry SET {column} = id WHERE id = :e", e=number)


def test_one_place_is_one_entry(ledger_rig: LedgerRig) -> None:
    ledger_rig.entry(place="7", pos=7)
    with pytest.raises(IntegrityError):
        ledger_rig.entry(place="7", pos=7)


@pytest.mark.parametrize("change", ["UPDATE decision SET choice = 'no'", "DELETE FROM decision"])
def test_a_decision_is_append_only(ledger_rig: LedgerRig, change: str) -> None:
    number = ledger_rig.decision()
    with pytest.raises(IntegrityError, match="decisions are append-only"):
        ledger_rig.execute(change)
    assert ledger_rig.one("SELECT choice FROM decision WHERE id = :d", d=number) == "yes"


@pytest.mark.parametrize("column", ["entry", "segment", "row_no", "payload_sha", "idem_key", "ordinal"])
def test_a_plan_is_frozen(ledger_rig: LedgerRig, column: str) -> None:
    ledger_rig.job(ledger_rig.entry(), state="proposed")
    with pytest.raises(IntegrityError, match="a plan is frozen"):
        ledger_rig.execute(f"UPDATE job_entry SET {column} = {column}")


@pytest.mark.parametrize("state", ["proposed", "approved"])
def test_no_line_is_taken_out_of_a_plan_while_its_entry_is_unsettled(
    ledger_rig: LedgerRig, state: str
) -> None:
    ledger_rig.job(ledger_rig.entry(), state=state)
    with pytest.raises(IntegrityError, match="a plan is frozen"):
        ledger_rig.execute("DELETE FROM job_entry")


def test_no_line_is_added_to_a_plan_once_it_is_approved(ledger_rig: LedgerRig) -> None:
    job = ledger_rig.job(ledger_rig.entry())
    other = ledger_rig.entry()
    with pytest.raises(IntegrityError, match="a plan is frozen"):
        ledger_rig.execute(
            "INSERT INTO job_entry (job, ordinal, entry, segment, row_no, payload_sha, idem_key) "
            "SELECT :j, 1, id, segment, row_no, payload_sha, 'k' FROM entry WHERE id = :e",
            j=job,
            e=other,
        )


def test_a_jobs_cursor_stays_within_the_job(ledger_rig: LedgerRig) -> None:
    job = ledger_rig.job(*ledger_rig.entries(2))
    for cursor in (-1, 3):
        with pytest.raises(IntegrityError):
            ledger_rig.execute("UPDATE job SET cursor = :c WHERE id = :j", c=cursor, j=job)


def test_a_jobs_cursor_never_goes_back(ledger_rig: LedgerRig) -> None:
    job = ledger_rig.job(*ledger_rig.entries(2))
    ledger_rig.execute("UPDATE job SET cursor = 2 WHERE id = :j", j=job)
    with pytest.raises(IntegrityError, match="a cursor never goes back"):
        ledger_rig.execute("UPDATE job SET cursor = 1 WHERE id = :j", j=job)


def range_row(rig: LedgerRig, number: int, start: int, end: int, part: int = 0) -> None:
    rig.execute(
        "INSERT INTO intake (source, part, round, drain, from_pos, cutoff, to_pos) VALUES (:s, :p, :r, :d, :f, :t, :t)",
        s=rig.source,
        p=part,
        r=number,
        d=DRAIN,
        f=start,
        t=end,
    )


def test_a_position_never_goes_back(ledger_rig: LedgerRig) -> None:
    range_row(ledger_rig, 1, 0, 5)
    ledger_rig.execute("UPDATE intake SET to_pos = 6")
    with pytest.raises(IntegrityError, match="a position never goes back"):
        ledger_rig.execute("UPDATE intake SET to_pos = 5")


def test_positions_are_never_pruned(ledger_rig: LedgerRig) -> None:
    range_row(ledger_rig, 1, 0, 5)
    with pytest.raises(IntegrityError, match="positions are never pruned"):
        ledger_rig.execute("DELETE FROM intake")


def test_the_guards_hold_every_row_of_a_statement(ledger_rig: LedgerRig) -> None:
    """One forbidden row refuses the whole statement: nothing of it is written."""
    good, bad = ledger_rig.entry("open"), ledger_rig.entry("confirmed")
    with pytest.raises(IntegrityError, match="transition not allowed"):
        ledger_rig.execute(
            f"UPDATE entry SET state = 'discarded', settled_drain = '{DRAIN}' WHERE queue = '{QUEUE}'"
        )
    assert (ledger_rig.state(good), ledger_rig.state(bad)) == ("open", "confirmed")


def test_a_foreign_drain_or_group_is_refused(ledger_rig: LedgerRig) -> None:
    with pytest.raises(IntegrityError):
        ledger_rig.entry(taken_drain="nobody")
    with pytest.raises(IntegrityError):
        ledger_rig.entry(grp=99)


def test_a_kind_of_drain_no_one_knows_is_refused(ledger_rig: LedgerRig) -> None:
    with ledger_rig.write() as tx, pytest.raises(IntegrityError):
        tx.execute(text("UPDATE drain SET kind = 'guess'"))
