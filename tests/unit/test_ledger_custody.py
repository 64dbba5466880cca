"""Sources, positions and what was sent: the intake's side of the ledger."""

from __future__ import annotations

import threading

import pytest
from tests.ledger_rig import DRAIN, QUEUE, LedgerRig

from dlq.entry import Group
from dlq.errors import Overtaken, Refused
from dlq.ledger import Ledger, custody
from dlq.ports import Range


def open_ranges(rig: LedgerRig, starts: dict[int, int], cutoff: int = 100) -> dict[int, int]:
    with rig.ledger.write(QUEUE, rig.epoch, alone=True) as tx:
        return custody.open_ranges(tx, rig.source, DRAIN, starts, dict.fromkeys(starts, cutoff))


def move(rig: LedgerRig, rounds: dict[int, int], *spans: Range, again: int = 0) -> None:
    with rig.ledger.write(QUEUE, rig.epoch) as tx:
        custody.move(tx, rig.source, rounds, spans, again)


def positions(rig: LedgerRig) -> dict[int, int]:
    with rig.ledger.read() as tx:
        return custody.positions(tx, rig.source)


# Sources


def source_id(rig: LedgerRig, uri: str, queue: str = QUEUE) -> int:
    with rig.write() as tx:
        return custody.source_id(tx, queue, uri)


def test_a_source_is_written_at_its_first_sight_and_found_again(ledger_rig: LedgerRig) -> None:
    assert source_id(ledger_rig, "kafka:c/t") == ledger_rig.source


def test_a_recreated_topic_is_refused_with_what_to_do(ledger_rig: LedgerRig) -> None:
    with pytest.raises(Refused, match="adopt-source"):
        source_id(ledger_rig, "kafka:c/another")


def test_one_dlq_belongs_to_one_queue(ledger_rig: LedgerRig) -> None:
    ledger_rig.execute("INSERT INTO queue (name, epoch) VALUES ('other', 0)")
    with pytest.raises(Refused, match="drained as queue 'orders' already"):
        source_id(ledger_rig, "kafka:c/t", queue="other")


def test_an_adopted_source_is_the_one_that_lives(ledger_rig: LedgerRig) -> None:
    with ledger_rig.write() as tx:
        new = custody.adopt(tx, QUEUE, "kafka:c/another")
    assert new != ledger_rig.source
    assert source_id(ledger_rig, "kafka:c/another") == new
    with pytest.raises(Refused):
        source_id(ledger_rig, "kafka:c/t")
    with ledger_rig.write() as tx:
        assert custody.adopt(tx, QUEUE, "kafka:c/t") == ledger_rig.source
    assert ledger_rig.one("SELECT COUNT(*) FROM source WHERE retired_at IS NULL") == 1


# Positions


def test_the_position_is_the_end_of_the_last_range(ledger_rig: LedgerRig) -> None:
    assert positions(ledger_rig) == {}
    rounds = open_ranges(ledger_rig, {0: 5, 1: 0})
    assert positions(ledger_rig) == {0: 5, 1: 0}
    move(ledger_rig, rounds, Range(0, 5, 9), Range(1, 0, 2))
    move(ledger_rig, rounds, Range(0, 9, 12))
    assert positions(ledger_rig) == {0: 12, 1: 2}
    open_ranges(ledger_rig, {0: 12, 1: 2})
    assert positions(ledger_rig) == {0: 12, 1: 2}


def test_a_partition_that_is_not_where_it_was_left_fences_the_whole_batch(ledger_rig: LedgerRig) -> None:
    rounds = open_ranges(ledger_rig, {0: 0, 1: 0})
    move(ledger_rig, rounds, Range(1, 0, 4))
    with pytest.raises(Overtaken, match="partition 1"):
        move(ledger_rig, rounds, Range(0, 0, 3), Range(1, 0, 3))
    assert positions(ledger_rig) == {0: 0, 1: 4}


def test_a_batch_that_another_pass_took_is_overtaken(ledger_rig: LedgerRig) -> None:
    older = open_ranges(ledger_rig, {0: 0})
    newer = open_ranges(ledger_rig, {0: 0})
    move(ledger_rig, newer, Range(0, 0, 10))
    for rounds in (older, newer):
        with pytest.raises(Overtaken):
            move(ledger_rig, rounds, Range(0, 0, 10))
    assert positions(ledger_rig) == {0: 10}


def test_the_chain_holds_when_an_older_pass_moves_after_a_newer_one_began(ledger_rig: LedgerRig) -> None:
    older = open_ranges(ledger_rig, {0: 0})
    newer = open_ranges(ledger_rig, {0: 0})
    move(ledger_rig, older, Range(0, 0, 10))
    with pytest.raises(Overtaken):
        move(ledger_rig, newer, Range(0, 0, 5))
    move(ledger_rig, older, Range(0, 10, 12))
    move(ledger_rig, newer, Range(0, 12, 13))
    assert chain(ledger_rig) == 13


def test_a_pass_that_begins_where_the_queue_no_longer_is_is_overtaken(ledger_rig: LedgerRig) -> None:
    """It read the positions, then another pass moved them: its ranges would overlap."""
    rounds = open_ranges(ledger_rig, {0: 0})
    move(ledger_rig, rounds, Range(0, 0, 10))
    with pytest.raises(Overtaken):
        open_ranges(ledger_rig, {0: 0})
    assert ledger_rig.one("SELECT COUNT(*) FROM intake") == 1


def chain(rig: LedgerRig) -> int:
    """Where the ranges of partition 0 end, which must follow each other without gap or overlap."""
    at = 0
    for start, end in rig.rows("SELECT from_pos, to_pos FROM intake WHERE part = 0 ORDER BY round"):
        assert start == at <= end
        at = int(end)
    return at


def test_passes_that_begin_together_leave_one_chain(ledger_rig: LedgerRig) -> None:
    """However two tries of one drain interleave, ranges chain without gap or overlap."""
    open_ranges(ledger_rig, {0: 0})
    barrier = threading.Barrier(3)
    fenced: list[str] = []
    ended: list[str] = []

    def take() -> None:
        ledger = Ledger.open(ledger_rig.url)
        barrier.wait(30)
        for _ in range(8):
            try:
                with ledger.read() as tx:
                    at = custody.positions(tx, ledger_rig.source)[0]
                with ledger.write(QUEUE, ledger_rig.epoch, alone=True) as tx:
                    rounds = custody.open_ranges(tx, ledger_rig.source, DRAIN, {0: at}, {0: at + 10})
                for step in (at, at + 5):
                    with ledger.write(QUEUE, ledger_rig.epoch) as tx:
                        custody.move(tx, ledger_rig.source, rounds, [Range(0, step, step + 5)], 0)
                ended.append("whole")
            except Overtaken:
                fenced.append("overtaken")
        ledger.close()

    threads = [threading.Thread(target=take) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(fenced) + len(ended) == 24
    assert chain(ledger_rig) > 0


def test_what_vanished_and_what_was_seen_again_is_counted_with_the_range(ledger_rig: LedgerRig) -> None:
    rounds = open_ranges(ledger_rig, {0: 0, 1: 0})
    move(ledger_rig, rounds, Range(0, 0, 10, 3, vanished=4), Range(1, 0, 2), again=2)
    move(ledger_rig, rounds, Range(0, 10, 11), again=1)
    counted = ledger_rig.rows("SELECT SUM(again), SUM(vanished_max), MAX(leader_epoch) FROM intake")
    assert counted == [(3, 4, 3)]


def test_a_first_intake_is_known_by_its_end_whoever_goes_on_with_it(ledger_rig: LedgerRig) -> None:
    with ledger_rig.write() as tx:
        custody.begin(tx, ledger_rig.source, DRAIN, {0: (2, 8), 1: (0, 0)})
    with ledger_rig.read_tx() as tx:
        assert custody.first_until(tx, ledger_rig.source) == {0: 8, 1: 0}
    assert positions(ledger_rig) == {0: 2, 1: 0}
    rounds = open_ranges(ledger_rig, {0: 2, 1: 0})
    move(ledger_rig, rounds, Range(0, 2, 8))
    with ledger_rig.read_tx() as tx:
        assert custody.first_until(tx, ledger_rig.source) == {0: 8, 1: 0}


def test_a_pass_with_nothing_to_read_adds_no_range_but_the_drains_first(ledger_rig: LedgerRig) -> None:
    """Outcomes are awaited with a pass every moment: the ledger must not grow by waiting."""
    for _ in range(5):
        with ledger_rig.ledger.write(QUEUE, ledger_rig.epoch, alone=True) as tx:
            custody.open_ranges(tx, ledger_rig.source, DRAIN, {0: 7, 1: 0}, {0: 7, 1: 0})
    assert ledger_rig.rows("SELECT part, COUNT(*) FROM intake GROUP BY part ORDER BY part") == [
        (0, 1),
        (1, 1),
    ]


# Groups


def test_a_group_has_one_row_however_often_it_is_seen(ledger_rig: LedgerRig) -> None:
    group = Group("v1:2", "s", "c", "T", "transient", "retry", "rule", "orchestrator", "me")
    other = Group("v1:2", "s", "c2", "T", "transient", "retry", "rule", "orchestrator", "me")
    for known in ({}, {}):
        custody.group_ids(ledger_rig.ledger, QUEUE, ledger_rig.epoch, [group, other, group], known)
        assert len(known) == 2
    assert ledger_rig.one("SELECT COUNT(*) FROM grp WHERE fingerprint = 'v1:2'") == 2


# What was sent


def sent_job(rig: LedgerRig, *places: tuple[int, int]) -> tuple[str, list[int]]:
    ids = rig.entries(len(places))
    job = rig.job(*ids)
    rig.execute("UPDATE entry SET state = 'replayed', settled_drain = :d WHERE job = :j", d=DRAIN, j=job)
    for ordinal, (part, pos) in enumerate(places):
        rig.execute(
            "INSERT INTO delivery (job, ordinal, part, pos, sent_at) VALUES (:j, :o, :p, :s, 't')",
            j=job,
            o=ordinal,
            p=part,
            s=pos,
        )
    return job, ids


def test_what_was_sent_is_found_by_job_and_ordinal(ledger_rig: LedgerRig) -> None:
    job, ids = sent_job(ledger_rig, (0, 10), (1, 20))
    with ledger_rig.read_tx() as tx:
        found = custody.sent_by_ordinal(tx, [(job, 1), (job, 7), ("no such job", 0)])
    assert {claim: sent.entry for claim, sent in found.items()} == {(job, 1): ids[1]}


def test_what_was_sent_is_found_by_where_it_went(ledger_rig: LedgerRig) -> None:
    _, ids = sent_job(ledger_rig, (0, 10), (1, 20))
    with ledger_rig.read_tx() as tx:
        assert custody.sent_spans(tx) == {0: (10, 10), 1: (20, 20)}
        found = custody.sent_by_place(
            tx, [("orders.topic", 1, 20), ("orders.topic", 0, 20), ("elsewhere", 0, 10)]
        )
    assert {place: sent.entry for place, sent in found.items()} == {("orders.topic", 1, 20): ids[1]}


def test_an_entry_that_left_its_job_was_not_sent_by_it(ledger_rig: LedgerRig) -> None:
    number = ledger_rig.entry()
    job = ledger_rig.job(number)
    ledger_rig.execute("UPDATE entry SET state = 'open', job = NULL WHERE id = :e", e=number)
    with ledger_rig.read_tx() as tx:
        assert custody.sent_by_ordinal(tx, [(job, 0)]) == {}


def states(rig: LedgerRig, ids: list[int]) -> list[str]:
    return [rig.state(e) for e in ids]


def test_what_came_back_is_returned_whether_confirmed_or_not_and_only_once(ledger_rig: LedgerRig) -> None:
    ids = [ledger_rig.entry(s) for s in ("replayed", "confirmed", "returned", "handed_back")]
    for _ in range(2):
        with ledger_rig.write() as tx:
            custody.mark_returned(tx, ids, DRAIN)
    assert states(ledger_rig, ids) == ["returned", "returned", "returned", "handed_back"]


def test_a_return_is_evidence_that_what_was_in_doubt_was_sent(ledger_rig: LedgerRig) -> None:
    job = ledger_rig.job()
    number = ledger_rig.entry("ambiguous", job=job)
    with ledger_rig.write() as tx:
        custody.mark_returned(tx, [number], DRAIN)
    assert ledger_rig.state(number) == "returned"
    assert ledger_rig.one("SELECT settled_drain FROM entry WHERE id = :e", e=number) == DRAIN
