"""Duplicates: equal payload and one source identity; settled only after the twin was sent; never a return."""

from __future__ import annotations

from typing import Any

import pytest
from tests.ledger_rig import DRAIN, QUEUE, TARGET, LedgerRig, sha

from dlq.ledger import duplicates

ORIGIN = f"{TARGET}/0/77@workers"


def mark(rig: LedgerRig) -> tuple[int, int]:
    with rig.write() as tx:
        return duplicates.mark(tx, QUEUE)


def settle(rig: LedgerRig) -> int:
    with rig.write() as tx:
        return duplicates.settle(tx, QUEUE, DRAIN)


def letter(rig: LedgerRig, payload: str = "p", state: str = "open", **values: Any) -> int:
    """A new entry of the payload ``payload``, with the same origin as the others unless a test says otherwise."""
    return rig.entry(state, **{"reason": "new", "payload_sha": sha(payload), "origin": ORIGIN, **values})


def twin_of(rig: LedgerRig, number: int) -> int | None:
    found: int | None = rig.one("SELECT duplicate_of FROM entry WHERE id = :e", e=number)
    return found


def send(rig: LedgerRig, number: int, state: str = "replayed") -> None:
    job = rig.job()
    rig.execute("UPDATE entry SET state = 'planned', job = :j WHERE id = :e", j=job, e=number)
    rig.execute("UPDATE entry SET state = 'replayed', settled_drain = :d WHERE id = :e", d=DRAIN, e=number)
    if state != "replayed":
        rig.execute("UPDATE entry SET state = :s WHERE id = :e", s=state, e=number)


@pytest.mark.parametrize(
    "identity",
    [
        {"origin": ORIGIN},
        {"origin": None, "dedupe_key": "d-1"},
        {"origin": "elsewhere/0/1@", "dedupe_key": "d-1"},
    ],
)
def test_a_later_entry_of_one_identity_and_payload_is_a_twin(
    ledger_rig: LedgerRig, identity: dict[str, Any]
) -> None:
    first = letter(ledger_rig, **identity)
    second = letter(ledger_rig, **identity)
    third = letter(ledger_rig, **identity)
    assert mark(ledger_rig) == (2, 0)
    assert [twin_of(ledger_rig, e) for e in (first, second, third)] == [None, first, first]
    assert ledger_rig.reason(second) == "twin_not_sent"


def test_equal_payloads_alone_are_no_twins(ledger_rig: LedgerRig) -> None:
    for values in (
        {"origin": None},
        {"origin": f"{TARGET}/0/78@workers"},
        {"origin": f"{TARGET}/0/77@others"},
    ):
        letter(ledger_rig, **values)
        letter(ledger_rig, **values, dedupe_key=f"own {values}")
    letter(ledger_rig, origin="a/0/1@g")
    assert mark(ledger_rig)[0] == 2, "the two with an origin of their own, twice each"


def test_one_identity_with_another_payload_is_a_conflict_for_a_person(ledger_rig: LedgerRig) -> None:
    first = letter(ledger_rig, "one")
    second = letter(ledger_rig, "two")
    assert mark(ledger_rig) == (0, 1)
    assert (ledger_rig.reason(first), ledger_rig.reason(second)) == ("new", "conflict")
    assert twin_of(ledger_rig, second) is None


def test_a_dedupe_key_and_an_origin_that_disagree_are_a_conflict(ledger_rig: LedgerRig) -> None:
    letter(ledger_rig, "one", dedupe_key="d-1", origin="a/0/1@g")
    letter(ledger_rig, "two", dedupe_key="d-2", origin="a/0/2@g")
    liar = letter(ledger_rig, "two", dedupe_key="d-1", origin="a/0/2@g")
    mark(ledger_rig)
    assert ledger_rig.reason(liar) == "conflict"


def test_a_twin_is_settled_only_after_its_twin_was_sent(ledger_rig: LedgerRig) -> None:
    first, second = letter(ledger_rig), letter(ledger_rig)
    mark(ledger_rig)
    assert settle(ledger_rig) == 0
    assert ledger_rig.state(second) == "open"
    send(ledger_rig, first)
    assert settle(ledger_rig) == 1
    assert ledger_rig.state(second) == "duplicate"
    assert ledger_rig.one("SELECT settled_drain FROM entry WHERE id = :e", e=second) == DRAIN
    assert settle(ledger_rig) == 0


@pytest.mark.parametrize("state", ["planned", "sending", "ambiguous", "open"])
def test_a_twin_waits_while_its_twin_is_not_settled(ledger_rig: LedgerRig, state: str) -> None:
    job = ledger_rig.job()
    first = letter(ledger_rig, state=state, job=None if state == "open" else job)
    second = letter(ledger_rig)
    mark(ledger_rig)
    assert settle(ledger_rig) == 0
    assert (ledger_rig.state(second), ledger_rig.reason(second), twin_of(ledger_rig, second)) == (
        "open",
        "twin_not_sent",
        first,
    )


@pytest.mark.parametrize("state", ["confirmed", "returned"])
def test_whatever_became_of_the_sent_twin_it_was_sent(ledger_rig: LedgerRig, state: str) -> None:
    first, second = letter(ledger_rig), letter(ledger_rig)
    mark(ledger_rig)
    send(ledger_rig, first, state)
    assert settle(ledger_rig) == 1
    assert ledger_rig.state(second) == "duplicate"


def discard(rig: LedgerRig, number: int) -> None:
    rig.execute("UPDATE entry SET state = 'discarded', settled_drain = :d WHERE id = :e", d=DRAIN, e=number)


def test_the_twin_of_what_was_discarded_is_never_dropped_and_waits_for_a_person(
    ledger_rig: LedgerRig,
) -> None:
    """Whoever discarded the one said nothing of the other; to replay it unasked would undo their decision."""
    first, second, third = letter(ledger_rig), letter(ledger_rig), letter(ledger_rig)
    mark(ledger_rig)
    discard(ledger_rig, first)
    for _ in range(3):
        settle(ledger_rig)
        mark(ledger_rig)
        assert ledger_rig.state(second) == ledger_rig.state(third) == "open"
        assert ledger_rig.reason(second) == "twin_discarded"
        assert twin_of(ledger_rig, second) is None, "a person can replay it"
        assert twin_of(ledger_rig, third) == second, "and then the others are its twins"


def test_a_new_twin_of_what_was_discarded_long_ago_is_a_new_entry(ledger_rig: LedgerRig) -> None:
    first = letter(ledger_rig)
    discard(ledger_rig, first)
    second, third = letter(ledger_rig), letter(ledger_rig)
    mark(ledger_rig)
    assert twin_of(ledger_rig, second) is None
    assert ledger_rig.reason(second) == "twin_discarded"
    assert (twin_of(ledger_rig, third), ledger_rig.reason(third)) == (second, "twin_not_sent")
    for _ in range(3):
        settle(ledger_rig)
        mark(ledger_rig)
    assert ledger_rig.state(second) == ledger_rig.state(third) == "open"


def test_the_twin_of_a_twin_is_the_twin_of_the_first(ledger_rig: LedgerRig) -> None:
    """Linked by dedupe key to one that is itself, by origin, a twin: it must not wait for what is never sent."""
    first = letter(ledger_rig, origin="a/0/1@g")
    second = letter(ledger_rig, origin="a/0/1@g", dedupe_key="d-1")
    third = letter(ledger_rig, origin=None, dedupe_key="d-1")
    mark(ledger_rig)
    assert [twin_of(ledger_rig, e) for e in (first, second, third)] == [None, first, first]
    send(ledger_rig, first)
    settle(ledger_rig)
    assert ledger_rig.state(second) == ledger_rig.state(third) == "duplicate"


def test_a_return_is_no_twin_of_its_original(ledger_rig: LedgerRig) -> None:
    """Its producer keeps the first origin, dedupe key and payload: only that it is a return tells them apart."""
    first = letter(ledger_rig, dedupe_key="d-1")
    send(ledger_rig, first, "returned")
    back = letter(ledger_rig, dedupe_key="d-1", reason="returned", return_of=first)
    assert mark(ledger_rig) == (0, 0)
    settle(ledger_rig)
    assert (ledger_rig.state(back), ledger_rig.reason(back)) == ("open", "returned")


def test_a_return_dead_lettered_twice_is_one_return_and_its_twin(ledger_rig: LedgerRig) -> None:
    first = letter(ledger_rig)
    send(ledger_rig, first, "returned")
    back = letter(ledger_rig, reason="returned", return_of=first)
    again = letter(ledger_rig, reason="returned", return_of=first)
    assert mark(ledger_rig) == (1, 0)
    assert twin_of(ledger_rig, again) == back
    assert settle(ledger_rig) == 0, "the return it is a twin of was not sent"


def test_a_return_of_a_return_is_no_twin_of_either(ledger_rig: LedgerRig) -> None:
    first = letter(ledger_rig)
    send(ledger_rig, first, "returned")
    second = letter(ledger_rig, reason="returned", return_of=first)
    send(ledger_rig, second, "returned")
    third = letter(ledger_rig, reason="returned", return_of=second)
    assert mark(ledger_rig) == (0, 0)
    assert twin_of(ledger_rig, third) is None


def test_a_conflict_is_nobodys_twin(ledger_rig: LedgerRig) -> None:
    letter(ledger_rig, "one")
    letter(ledger_rig, "two")
    mark(ledger_rig)
    third = letter(ledger_rig, "two")
    mark(ledger_rig)
    assert ledger_rig.reason(third) == "conflict", "it is measured against the first, as the second was"


def test_twins_of_another_queue_are_strangers(ledger_rig: LedgerRig) -> None:
    ledger_rig.execute("INSERT INTO queue (name, epoch) VALUES ('other', 0)")
    letter(ledger_rig, queue="other")
    letter(ledger_rig)
    assert mark(ledger_rig) == (0, 0)


def test_a_first_intakes_twin_waits_with_it(ledger_rig: LedgerRig) -> None:
    """Freed with the twin's fate, never before a decision frees the first intake."""
    first = letter(ledger_rig, reason="first_intake")
    second = letter(ledger_rig, reason="first_intake")
    assert mark(ledger_rig) == (1, 0)
    discard(ledger_rig, first)
    settle(ledger_rig)
    assert ledger_rig.reason(second) == "twin_discarded"


def test_a_twin_handed_back_leaves_its_twin_to_a_person(ledger_rig: LedgerRig) -> None:
    first, second = letter(ledger_rig), letter(ledger_rig)
    mark(ledger_rig)
    job = ledger_rig.job()
    ledger_rig.execute("UPDATE entry SET state = 'planned', job = :j WHERE id = :e", j=job, e=first)
    ledger_rig.execute(
        "UPDATE entry SET state = 'handed_back', settled_drain = :d WHERE id = :e", d=DRAIN, e=first
    )
    settle(ledger_rig)
    assert (ledger_rig.state(second), ledger_rig.reason(second)) == ("open", "twin_handed_back")
    assert twin_of(ledger_rig, second) is None


def test_marking_again_finds_nothing_new(ledger_rig: LedgerRig) -> None:
    for payload in ("one", "one", "two"):
        letter(ledger_rig, payload)
    assert mark(ledger_rig) == (1, 1)
    assert mark(ledger_rig) == (0, 0)
