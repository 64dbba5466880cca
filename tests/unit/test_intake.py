"""Taking into custody: killed anywhere, overtaken, fenced, lied to; each record is in the ledger once."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from tests.memory_rig import TOPIC, Killed, MemoryRig, Sleeper, Tripwire, failure, wire

from dlq import intake
from dlq.archive import Archive, Rows
from dlq.drain import Drain
from dlq.entry import Headers, Record
from dlq.errors import Fenced, Overtaken, Refused, SourceError
from dlq.intake import Intake, take_custody
from dlq.ledger import Ledger
from dlq.ledger import jobs as ledger
from dlq.opening import open_drain
from dlq.ports import Connection
from dlq.replay import drain_remaining, replay_canary
from dlq.triage import assign

Make = Callable[..., MemoryRig]


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several batches out of few records."""
    monkeypatch.setattr(intake, "MAX_ENTRIES", 4)


def orphans(queue: MemoryRig) -> int:
    """Segment files without a row in the ledger."""
    known = {uri for (uri,) in queue.rows("SELECT uri FROM segment")}
    return len(set(Archive(queue.config.archive, queue.config.name).segments()) - known)


# What it does


def test_everything_up_to_the_cutoff_is_taken_byte_for_byte(queue: MemoryRig) -> None:
    awkward: list[tuple[bytes | None, bytes | None, Headers]] = [
        (None, None, ()),
        (b"", b"", (("n", None), ("n", b""), ("n", b"\xff\x00"))),
        (b"\xff", b"\x00\x80", failure(1)),
        (b"k", b"v" * 100_000, failure(2)),
    ]
    for key, value, headers in awkward:
        queue.log.append(0, key, value, headers)
    drain = queue.open()
    taken = queue.take(drain)
    assert (taken.taken, taken.again, taken.reached) == (4, 0, True)
    for (part, pos, row_no, uri, sha), (key, value, headers) in zip(
        queue.rows(
            "SELECT e.part, e.pos, e.row_no, s.uri, e.payload_sha FROM entry e JOIN segment s ON s.id = e.segment "
            "ORDER BY e.id"
        ),
        awkward,
        strict=True,
    ):
        rows = Rows(drain.archive.read(uri))
        stored = rows[row_no]
        assert (stored.part, stored.pos) == (part, pos)
        assert (stored.key, stored.value, stored.headers) == (key, value, headers)
        assert rows.payload_sha(row_no) == sha
    queue.check()


def test_an_entry_says_what_its_record_said(queue: MemoryRig) -> None:
    queue.put(1, headers=failure(7, dedupe="d-7", retry_count=b"2"))
    queue.take(queue.open())
    row = queue.entry((0, 0))
    assert (row.state, row.reason, row.target, row.attempts) == ("open", "new", TOPIC, 2)
    assert (row.correlation_id, row.dedupe_key, row.origin) == ("c-7", "d-7", "orders/0/1000007@workers")
    assert queue.one("SELECT error_type, component, category, remedy FROM grp") == (
        "TransientNetwork",
        "payments.charge",
        "transient",
        "retry",
    )


def test_the_queue_is_told_what_is_in_custody(queue: MemoryRig) -> None:
    queue.put(10)
    drain = queue.open()
    queue.take(drain)
    assert {p: offset for p, (offset, _) in queue.log.commits.items()} == queue.positions() == {0: 5, 1: 5}
    assert all(f'"{drain.ledger.id}"' in metadata for _, metadata in queue.log.commits.values())


def test_an_empty_queues_positions_are_told_again_each_time(queue: MemoryRig) -> None:
    queue.log.commits.clear()
    queue.take(queue.open())
    assert {p: offset for p, (offset, _) in queue.log.commits.items()} == {0: 0, 1: 0}


def test_gaps_and_what_vanished_are_part_of_the_chain(queue: MemoryRig) -> None:
    queue.put(4, part=0)
    aborted = queue.log.begin()
    queue.log.append(0, b"k", b"never seen", transaction=aborted)
    queue.log.abort(aborted)
    queue.put(4, part=0)
    queue.log.expire(0, 2)
    taken = queue.take(queue.open())
    assert (taken.taken, taken.vanished_max) == (6, 2)
    assert queue.positions()[0] == 10
    assert queue.one("SELECT SUM(vanished_max) FROM intake") == 2
    queue.check()


def test_only_the_partitions_asked_for_are_taken(queue: MemoryRig) -> None:
    queue.put(10)
    drain = queue.open()
    assert Intake(drain, [1]).run(30).taken == 5
    assert queue.positions() == {0: 0, 1: 5}
    assert Intake(drain, [0]).run(30).taken == 5
    queue.check()


def test_a_partition_added_since_is_taken_from_its_beginning(queue: MemoryRig) -> None:
    queue.put(4)
    queue.take(queue.open("r1"))
    queue.log.widen(3)
    queue.put(3, part=2)
    queue.release(queue.attach("r1"))
    assert queue.take(queue.open("r2")).taken == 3
    assert queue.reasons() == {"new": 7}, "they are no first intake"
    queue.check()


def test_the_time_may_be_up_before_the_cutoff(queue: MemoryRig) -> None:
    queue.put(10)
    drain = queue.open()
    taken = Intake(drain).run(0)
    assert (taken.taken, taken.reached) == (0, False)
    assert queue.take(drain).taken == 10


def test_progress_is_told_as_it_goes(queue: MemoryRig) -> None:
    queue.put(12)
    seen: list[tuple[int, int]] = []
    Intake(queue.open()).run(30, lambda done, of: seen.append((done, of)))
    assert seen == sorted(seen)
    assert seen[-1] == (12, 12)


def test_a_dry_run_takes_nothing_and_says_how_much_there_is(queue: MemoryRig) -> None:
    from dlq.drain import dry

    queue.put(10)
    before = queue.rows("SELECT * FROM intake"), dict(queue.log.commits)
    with dry(queue.config, run_id="d", connections=Connection) as look:
        assert take_custody(look, 30) == {"taken": 0, "depth": 10}
    assert before == (queue.rows("SELECT * FROM intake"), dict(queue.log.commits))
    assert queue.rows("SELECT 1 FROM entry") == []


def test_the_stage_says_what_it_did(queue: MemoryRig) -> None:
    queue.put(10)
    drain = queue.open()
    said = take_custody(drain, 30)
    assert (said["taken"], said["again"], said["reached"]) == (10, 0, True)
    assert drain.noted("take_custody") == said
    assert queue.one("SELECT phase FROM drain WHERE id = :d", d=drain.id) == "take_custody"


# Killed


def steps_of_an_intake(make_queue: Make) -> int:
    queue = make_queue()
    queue.begin()
    queue.put(10)
    wired = Tripwire()
    queue.take(wire(queue.open(), wired))
    return wired.steps


def test_killed_at_any_step_the_retry_takes_the_rest_and_nothing_twice(make_queue: Make) -> None:
    """After read, after the segment, within and after the transaction, before the queue is told: everywhere."""
    last = steps_of_an_intake(make_queue)
    assert last > 30
    left_segments = left_rows_untold = 0
    for at in range(last):
        queue = make_queue()
        queue.begin()
        queue.put(10)
        with pytest.raises(Killed):
            queue.take(wire(queue.open(), Tripwire(at)))
        left_segments += orphans(queue)
        told = {p: offset for p, (offset, _) in queue.log.commits.items()}
        left_rows_untold += told != queue.positions()
        retry = queue.attach() if at % 2 else queue.open()  # the next task's, or the cleared drain's
        taken = queue.take(retry)
        total = queue.one("SELECT COUNT(*) FROM entry")
        assert total == 10, f"killed at step {at}"
        assert taken.reached
        assert (
            {p: offset for p, (offset, _) in queue.log.commits.items()} == queue.positions() == {0: 5, 1: 5}
        )
        queue.check()
    assert left_segments, "no kill came between a segment and its rows"
    assert left_rows_untold, "no kill came between the rows and telling the queue"


def test_a_segment_without_rows_is_registered_and_its_entries_are_read_again(queue: MemoryRig) -> None:
    queue.put(3)
    drain = queue.open()
    wired = wire(drain, lambda: None)
    write = wired.archive.write

    def die_after(*arguments: Any) -> Any:
        write(*arguments)
        raise Killed

    wired.archive.write = die_after  # type: ignore[method-assign]
    with pytest.raises(Killed):
        queue.take(wired)
    assert orphans(queue) == 1
    again = queue.open()
    assert queue.rows("SELECT kind, rows FROM segment") == [("orphan", 3)]
    assert queue.rows("SELECT 1 FROM entry") == []
    queue.take(again)
    assert sorted(k for (k,) in queue.rows("SELECT kind FROM segment")) == ["intake", "orphan"]
    assert queue.one("SELECT COUNT(*) FROM entry") == 3
    assert orphans(queue) == 0


def test_a_queue_that_can_not_be_told_is_told_by_the_next_try(queue: MemoryRig) -> None:
    queue.put(3)
    drain = queue.open()
    source = drain.source
    open_pass = source.open_pass

    def deaf(*arguments: Any, **more: Any) -> Any:
        reading = open_pass(*arguments, **more)
        reading.acknowledge = lambda _batch: (_ for _ in ()).throw(SourceError("can't be told"))  # type: ignore[method-assign]
        return reading

    source.open_pass = deaf  # type: ignore[method-assign]
    with pytest.raises(SourceError):
        queue.take(drain)
    assert queue.one("SELECT COUNT(*) FROM entry") > 0
    assert queue.take(queue.attach()).reached
    assert {p: offset for p, (offset, _) in queue.log.commits.items()} == queue.positions()
    queue.check()


# Others


def test_a_newer_drain_fences_the_older_ones_intake_wherever_it_sleeps(make_queue: Make) -> None:
    at, slept = random.randrange(2), True  # every other step, the rest another time
    while slept:
        at += 2
        queue = make_queue()
        queue.begin()
        queue.put(10)
        zombie = queue.open("old")
        newer: list[Drain] = []

        def take_over(queue: MemoryRig = queue, newer: list[Drain] = newer) -> None:
            queue.expire_lease()
            newer.append(queue.open("new"))
            queue.take(newer[0])

        sleeper = Sleeper(at, take_over)
        with suppress(Fenced):
            queue.take(wire(zombie, sleeper, within=False))
        slept = sleeper.slept
        if not slept:
            continue
        with pytest.raises(Fenced):
            queue.take(zombie)
        queue.take(newer[0])
        assert queue.one("SELECT COUNT(*) FROM entry") == 10
        queue.check()
    assert at > 15


def test_two_tries_of_one_drain_keep_one_chain_wherever_one_of_them_sleeps(make_queue: Make) -> None:
    """Whichever moves first goes on; the other ends, or goes on behind it."""
    at, slept, ended = random.randrange(2), True, 0  # every other step, the rest another time
    while slept:
        at += 2
        queue = make_queue()
        queue.begin()
        queue.put(10)
        older, newer = queue.open(), queue.attach()

        def wake(queue: MemoryRig = queue, newer: Drain = newer) -> None:
            with suppress(Overtaken):
                queue.take(newer)

        sleeper = Sleeper(at, wake)
        try:
            queue.take(wire(older, sleeper, within=False))
        except Overtaken:
            ended += 1
        slept = sleeper.slept
        queue.put(3)
        queue.take(newer)
        assert queue.one("SELECT COUNT(*) FROM entry") == 13
        queue.check()
    assert ended, "the tries never met"


def test_a_second_ledger_on_the_queue_is_refused(queue: MemoryRig, tmp_path: Path) -> None:
    queue.put(3)
    drain = queue.open()
    queue.take(drain)
    queue.release(drain)
    url = f"sqlite:///{tmp_path}/second.db"
    Ledger.create(url).close()
    second = queue.config.model_copy(update={"ledger": url})
    with pytest.raises(Refused, match="second one"):
        open_drain(second, run_id="r2", connections=Connection)
    elsewhere = second.model_copy(update={"archive": str(tmp_path / "another archive")})
    with pytest.raises(Refused, match="another ledger"):
        open_drain(elsewhere, run_id="r2", connections=Connection)


def test_a_recreated_topic_is_refused(queue: MemoryRig) -> None:
    drain = queue.taken(3)
    queue.release(drain)
    queue.log.recreate()
    with pytest.raises(Refused, match="recreated"):
        queue.open("r2")
    assert queue.one("SELECT holder FROM queue") is None, "a refused drain holds nothing"


def test_an_offset_lost_or_behind_is_no_reason_to_read_again(queue: MemoryRig) -> None:
    drain = queue.taken(6)
    queue.release(drain)
    queue.log.commits.clear()
    second = queue.open("r2")
    assert queue.take(second).taken == 0
    queue.release(second)
    for part, (_, metadata) in list(queue.log.commits.items()):
        queue.log.commits[part] = (1, metadata)
    third = queue.open("r3")
    taken = queue.take(third)
    assert (taken.taken, taken.again) == (0, 0)
    assert {p: offset for p, (offset, _) in queue.log.commits.items()} == {0: 3, 1: 3}
    said = [text for (text,) in queue.rows("SELECT text FROM event WHERE stage = 'open_drain' ORDER BY id")]
    assert any("gone" in text for text in said)
    assert any("behind" in text for text in said)


# The first intake


def test_old_letters_wait_for_a_decision_and_later_ones_do_not(make_queue: Make) -> None:
    queue = make_queue()
    queue.put(6)
    drain = queue.open()
    queue.take(drain)
    assign(drain)
    assert queue.reasons() == {"first_intake": 6}
    queue.put(4)
    queue.take(drain)
    assign(drain)
    assert queue.reasons() == {"first_intake": 6, "ready": 4}


def test_a_first_intake_from_the_end_takes_none_of_the_old_letters(make_queue: Make) -> None:
    queue = make_queue(start="latest")
    queue.put(6)
    drain = queue.open()
    queue.take(drain)
    queue.put(2)
    queue.take(drain)
    assign(drain)
    assert queue.reasons() == {"ready": 2}
    assert queue.rows("SELECT part, pos FROM entry ORDER BY part") == [(0, 3), (1, 3)]
    queue.check()


def test_a_first_intake_of_an_empty_queue_needs_no_decision(make_queue: Make) -> None:
    queue = make_queue()
    queue.begin()
    assert queue.reasons() == {}
    drain = queue.taken(3)
    assert queue.reasons() == {"ready": 3}
    assert drain.noted("take_custody") is None


def test_killed_in_its_first_intake_the_next_drain_goes_on_with_it_as_such(make_queue: Make) -> None:
    """What was in the queue when it began waits for a decision, whoever takes it; what came later doesn't."""
    queue = make_queue()
    queue.put(10)
    for at in range(1 + random.randrange(4), 60, 4):
        queue = make_queue()
        queue.put(10)
        wired = Tripwire(at)
        try:
            queue.take(wire(queue.open("r1"), wired))
        except Killed:
            pass
        else:
            break
        begun = bool(queue.rows("SELECT 1 FROM intake"))
        queue.put(4)
        queue.expire_lease()
        drain = queue.open("r2")
        queue.take(drain)
        assign(drain)
        assert queue.reasons() == ({"first_intake": 10, "ready": 4} if begun else {"first_intake": 14}), (
            f"killed at step {at}"
        )
        queue.check()


def test_nothing_of_a_first_intake_is_replayed_unasked(make_queue: Make) -> None:
    queue = make_queue()
    queue.put(6)
    drain = queue.open()
    queue.take(drain)
    assign(drain)
    queue.consumer()
    assert replay_canary(drain, "retry_transient", 30)["plan"] is None
    drain_remaining(drain, 30)
    assert queue.delivered() == []
    assert queue.states() == {"open": 6}


# Returns


@pytest.fixture
def replayed(queue: MemoryRig) -> tuple[MemoryRig, Drain]:
    """Two entries that were replayed and whose outcome is not known."""
    drain = queue.taken(2)
    queue.topics.positions[TOPIC] = {0: 0, 1: 0}
    from dlq import plan
    from dlq.jobs import JobRun

    (job,) = plan.make(drain, "x", plan.ready(drain), who="w", saw="s")
    with JobRun(drain, job.id) as run:
        run.send(2, 1e12)
        run.close("done", "ready")
    assert queue.states() == {"replayed": 2}
    return queue, drain


def dead_letter(
    queue: MemoryRig,
    record: Record,
    *,
    value: bytes | None = None,
    drop: tuple[str, ...] = (),
    **headers: bytes,
) -> tuple[int, int]:
    """A failed replay as it comes back: all its headers but those that start with ``drop``, some changed."""
    kept = tuple(h for h in record.headers if not h[0].startswith(drop)) if drop else record.headers
    changed = {name.replace("_", "-"): content for name, content in headers.items()}
    kept = tuple((name, changed.pop(name, content)) for name, content in kept)
    said = (("wf-error-type", b"TransientNetwork"), *(changed.items()))
    pos = queue.log.append(0, record.key, record.value if value is None else value, (*kept, *said))
    return 0, pos


def test_a_replay_that_failed_again_is_known_by_our_headers(replayed: tuple[MemoryRig, Drain]) -> None:
    queue, drain = replayed
    (first, second) = queue.delivered()
    place = dead_letter(queue, first)
    assert queue.take(drain).returns == 1
    back = queue.entry(place)
    original = queue.rows("SELECT * FROM entry WHERE id = :e", e=back.return_of)[0]
    assert (back.state, back.reason, back.attempts) == ("open", "returned", 1)
    assert original.state == "returned"
    assert f"{original.part}/{original.pos}".encode() in (dict(first.headers)["dlq-entry"] or b"")
    assert queue.states() == {"open": 1, "replayed": 1, "returned": 1}
    assert second


def test_a_replay_that_failed_again_is_known_by_the_place_it_failed_at(
    replayed: tuple[MemoryRig, Drain],
) -> None:
    """Whoever dead-letters it drops our headers, but says where the record lay."""
    queue, drain = replayed
    record = queue.delivered()[0]
    place = dead_letter(
        queue,
        record,
        drop=("dlq-", "wf-"),
        wf_origin_topic=TOPIC.encode(),
        wf_origin_partition=b"%d" % record.part,
        wf_origin_offset=b"%d" % (record.pos or 0),
    )
    queue.take(drain)
    assert queue.entry(place).reason == "returned"
    assert queue.states() == {"open": 1, "replayed": 1, "returned": 1}


def test_a_return_that_keeps_its_first_origin_is_still_a_return(replayed: tuple[MemoryRig, Drain]) -> None:
    """Equal payload, equal first origin, equal dedupe key: not a duplicate of its original."""
    queue, drain = replayed
    place = dead_letter(queue, queue.delivered()[0])
    queue.take(drain)
    assign(drain)
    assert (queue.entry(place).state, queue.entry(place).reason) == ("open", "returned")
    assert queue.entry(place).duplicate_of is None


def test_who_claims_to_be_a_replay_but_carries_something_else_waits_for_a_person(
    replayed: tuple[MemoryRig, Drain],
) -> None:
    queue, drain = replayed
    first, _ = queue.delivered()
    place = dead_letter(queue, first, value=b"something else")
    queue.take(drain)
    assign(drain)
    assert (queue.entry(place).state, queue.entry(place).reason) == ("open", "conflict")
    assert queue.states() == {"open": 1, "replayed": 2}, "nothing became a return by a lie"
    assert queue.entry(place).return_of is None


def test_a_place_that_is_claimed_with_something_else_is_a_conflict_too(
    replayed: tuple[MemoryRig, Drain],
) -> None:
    queue, drain = replayed
    record = queue.delivered()[0]
    place = queue.put(1, headers=failure(99, part=record.part, offset=record.pos))[0]
    queue.take(drain)
    assert queue.entry(place).reason == "conflict"
    assert queue.states() == {"open": 1, "replayed": 2}


@pytest.mark.parametrize(
    ("job", "ordinal"),
    [
        (b"no such job", b"0"),
        (b"", b"0"),
        (b"x\x00y", b"0"),
        (b"\xff\xfe", b"0"),
        (b"x" * 5_000, b"0"),
        (None, None),
        (b"j", b"-1"),
        (b"j", b"1e3"),
        (b"j", b"9" * 400),
        (b"j", "٣".encode()),
        (b"j", b""),
    ],
)
def test_a_claim_that_makes_no_sense_is_a_new_entry(
    ledger_url: str, make_queue: Make, job: bytes | None, ordinal: bytes | None
) -> None:
    queue = make_queue(ledger=ledger_url)
    queue.begin()
    queue.put(1, headers=(*failure(1), ("dlq-job", job), ("dlq-ordinal", ordinal)))
    queue.take(queue.open())
    assert queue.reasons() == {"new": 1}


def test_a_claim_on_an_entry_that_was_never_sent_does_not_settle_it(queue: MemoryRig) -> None:
    from dlq import plan

    drain = queue.taken(2)
    (job,) = plan.make(drain, "x", plan.ready(drain), who="w", saw="s")
    value = queue.log.read(0, 0, 1)[0].value
    queue.put(
        1, key=b"k0", value=value, headers=(*failure(9), ("dlq-job", job.id.encode()), ("dlq-ordinal", b"0"))
    )
    queue.take(drain)
    assert queue.states() == {"planned": 2, "open": 1}
    ledger.close(drain.ledger, drain.queue, drain.epoch, job.id, "deadline", "ready")
    queue.check()


def test_an_entry_whose_headers_no_client_can_read_waits_for_a_person(queue: MemoryRig) -> None:
    queue.log.append(0, b"k", b"v", (), flaw="unrepresentable_headers")
    drain = queue.taken()
    assert queue.reasons() == {"unrepresentable_headers": 1}
    queue.consumer()
    drain_remaining(drain, 30)
    assert queue.delivered() == []


def test_what_a_stranger_writes_into_headers_never_stops_an_intake(ledger_url: str, make_queue: Make) -> None:
    queue = make_queue(ledger=ledger_url)
    queue.begin()
    names = [
        name
        for name, _ in (
            *failure(1, dedupe="d"),
            ("retry-count", b""),
            ("dlq-retry-count", b""),
            ("dlq-entry", b""),
        )
    ]
    hostile = [
        b"",
        b"\x00",
        b"a\x00b",
        b"\xff\xfe\x80",
        b"9" * 500,
        b"-1",
        b"<script>",
        "\u202eevil\u200b".encode(),
        b"x" * 70_000,
        None,
    ]
    for content in hostile:
        queue.put(1, headers=tuple((name, content) for name in names))
        for name in names:
            queue.put(1, headers=tuple((n, content if n == name else c) for n, c in failure(1, dedupe="d")))
    drain = queue.open()
    count = len(hostile) * (1 + len(names))
    assert queue.take(drain).taken == count
    assign(drain)
    assert queue.one("SELECT COUNT(*) FROM entry WHERE state = 'open' AND reason <> 'new'") == count
    queue.check()


def test_a_handed_back_entry_that_comes_again_is_linked_and_waits_for_a_person(
    replayed: tuple[MemoryRig, Drain],
) -> None:
    queue, drain = replayed
    queue.write("UPDATE job SET kind = 'hand_back'")
    with queue.ledger.write(queue.config.name, None) as tx:
        for trigger in ("entry_state",):
            tx.exec_driver_sql(f"DROP TRIGGER {trigger}")
        tx.exec_driver_sql("UPDATE entry SET state = 'handed_back'")
    place = dead_letter(queue, queue.delivered()[0])
    queue.take(drain)
    assign(drain)
    back = queue.entry(place)
    assert (back.state, back.reason, back.attempts) == ("open", "handed_back_again", 0)
    assert back.return_of is not None
    assert queue.states() == {"handed_back": 2, "open": 1}
