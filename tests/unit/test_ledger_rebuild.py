"""A ledger that was lost, or is an older backup: noticed, rebuilt from the archive; and nothing is sent by itself."""

from __future__ import annotations

import random
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.memory_rig import Killed, MemoryRig, Tripwire, failure

from dlq.archive import Archive
from dlq.drain import drain_id
from dlq.errors import QueueBusy, Refused
from dlq.ledger import Ledger, lease
from dlq.ports import Connection
from dlq.recovery.adopt import adopt_source
from dlq.recovery.doubts import resolve
from dlq.recovery.rebuild import Rebuilt, rebuild
from dlq.replay import drain_remaining, replay_batches, replay_canary
from dlq.selection import Selection
from dlq.sources.memory import MemoryDlq
from dlq.triage import categorize

EVERYTHING = Selection(everything=True)


def replay(rig: MemoryRig, run: str) -> None:
    """A whole drain: take, categorize, replay, what is left."""
    drain = rig.open(run)
    rig.take(drain)
    categorize(drain)
    for job in replay_canary(drain, "retry_transient", 30)["jobs"]:
        replay_batches(drain, job, 30)
    drain_remaining(drain, 30)
    rig.release(drain)


def backup(rig: MemoryRig) -> Path:
    path = rig.folder / "backup.db"
    with sqlite3.connect(rig.folder / "ledger.db") as now, sqlite3.connect(path) as then:
        now.backup(then)
    return path


def restore(rig: MemoryRig, path: Path) -> None:
    for drain in rig._drains:
        drain.close()
    rig.ledger.close()
    for name in ("ledger.db", "ledger.db-wal", "ledger.db-shm"):
        (rig.folder / name).unlink(missing_ok=True)
    shutil.copyfile(path, rig.folder / "ledger.db")
    rig.ledger = Ledger.open(rig.config.ledger)


def lose(rig: MemoryRig) -> None:
    """The ledger is gone; a new, empty one is in its place."""
    empty = rig.folder / "empty.db"
    Ledger.create(f"sqlite:///{empty}").close()
    restore(rig, empty)


def rebuilt(rig: MemoryRig, run: str = "rebuild") -> Rebuilt:
    return rebuild(rig.config, who="alice@desk", run_id=run, connections=Connection)


def test_a_lost_ledger_is_refused_and_rebuilt_with_everything_in_doubt(queue: MemoryRig) -> None:
    queue.put(30)
    queue.put(10, "DataCorruption")
    queue.consumer()
    replay(queue, "r1")
    assert len(queue.delivered()) == 30
    before = queue.positions()
    lose(queue)

    with pytest.raises(Refused, match="dlq ledger rebuild"):
        queue.open("r2")
    done = rebuilt(queue)

    assert (done.adopted, done.doubted) == (40, 0)
    assert queue.states() == {"ambiguous": 40}
    assert queue.positions() == before == done.positions
    assert queue.one("SELECT DISTINCT reason FROM entry") == "rebuilt"
    assert queue.one("SELECT who FROM decision WHERE kind = 'rebuild'") == "alice@desk"
    queue._check_chain()


def test_a_rebuilt_entry_knows_when_retention_would_have_deleted_it(queue: MemoryRig) -> None:
    queue.log.retention_ms = 3_600_000
    queue.log.append(0, b"k", b"v", failure(0), timestamp_ms=1_700_000_000_000)
    queue.taken()
    taken = queue.one("SELECT expires_at FROM entry")
    lose(queue)
    rebuilt(queue)
    assert queue.one("SELECT expires_at FROM entry") == taken == "2023-11-14T23:13:00.000+00:00"


def test_a_rebuilt_ledger_sends_nothing_before_a_person_says_so(queue: MemoryRig) -> None:
    first, *_ = queue.put(20)
    queue.consumer()
    replay(queue, "r1")
    lose(queue)
    rebuilt(queue)

    replay(queue, "r2")
    assert len(queue.delivered()) == 20, "something was sent, and nobody had said so"

    drain = queue.open("desk")
    place = f"{first[0]}/{first[1]}"
    assert resolve(drain, Selection(entries=(place,)), "open", who="alice", why="it never ran") == 1
    queue.release(drain)
    replay(queue, "r3")
    assert len(queue.delivered()) == 21
    assert queue.entry(first).state == "confirmed"
    assert queue.states() == {"ambiguous": 19, "confirmed": 1}


def test_what_comes_after_a_rebuild_is_drained_as_ever(queue: MemoryRig) -> None:
    queue.put(10)
    queue.consumer()
    replay(queue, "r1")
    lose(queue)
    rebuilt(queue)
    queue.put(6)
    replay(queue, "r2")
    assert queue.states() == {"ambiguous": 10, "confirmed": 6}


def test_what_a_lost_ledger_had_not_taken_waits_for_a_decision(queue: MemoryRig) -> None:
    queue.put(4)
    replay_nothing = queue.open("r1")
    queue.take(replay_nothing)
    queue.release(replay_nothing)
    queue.put(6)
    lose(queue)
    rebuilt(queue)
    queue.consumer()
    replay(queue, "r2")
    assert queue.delivered() == []
    assert queue.reasons() == {"first_intake": 6}


def test_what_an_older_ledger_believes_open_is_in_doubt(queue: MemoryRig) -> None:
    queue.put(12)
    queue.put(3, "DataCorruption")
    drain = queue.taken()
    queue.release(drain)
    saved = backup(queue)
    queue.consumer()
    replay(queue, "r2")
    queue.put(5)
    replay(queue, "r3")
    assert len(queue.delivered()) == 17
    restore(queue, saved)

    with pytest.raises(Refused, match="restored from an older backup"):
        queue.open("r4")
    done = rebuilt(queue)

    assert (done.doubted, done.adopted) == (15, 5)
    assert queue.states() == {"ambiguous": 20}
    replay(queue, "r5")
    assert len(queue.delivered()) == 17
    queue._check_chain()


def test_a_plan_of_an_older_ledger_is_over(queue: MemoryRig) -> None:
    """The backup was made while a job ran; the job has long ended since."""
    queue.put(40)
    drain = queue.open("r1")
    queue.take(drain)
    categorize(drain)
    canary = replay_canary(drain, "retry_transient", 0)  # no time: nothing consumed, nothing sent
    assert canary["plan"]
    queue.write("UPDATE entry SET state = 'planned', job = (SELECT MIN(id) FROM job) WHERE state = 'open'")
    queue.write("UPDATE job SET state = 'running', ended = NULL WHERE id = (SELECT MIN(id) FROM job)")
    saved = backup(queue)
    queue.release(drain)
    queue.write("UPDATE job SET state = 'closed'")
    queue.write("UPDATE entry SET state = 'open', job = NULL, reason = 'ready' WHERE state = 'planned'")
    queue.consumer()
    replay(queue, "r2")
    sent = len(queue.delivered())
    restore(queue, saved)
    queue.expire_lease()

    assert rebuilt(queue).doubted == 40
    assert queue.states() == {"ambiguous": 40}
    assert queue.rows("SELECT id FROM job WHERE state IN ('approved', 'running')") == []
    replay(queue, "r3")
    assert len(queue.delivered()) == sent


def test_a_ledger_that_only_missed_replays_is_noticed_too(queue: MemoryRig) -> None:
    """Nothing was taken since the backup, so the positions agree; the epochs don't."""
    queue.put(8)
    queue.release(queue.taken())
    saved = backup(queue)
    queue.consumer()
    replay(queue, "r2")
    restore(queue, saved)
    with pytest.raises(Refused):
        queue.open("r3")
    rebuilt(queue)
    replay(queue, "r4")
    assert len(queue.delivered()) == 8


def test_after_a_rebuild_the_other_ledger_is_refused(queue: MemoryRig, tmp_path: Path) -> None:
    queue.put(5)
    queue.release(queue.taken())
    other = backup(queue)
    lose(queue)
    rebuilt(queue)
    restore(queue, other)
    with pytest.raises(Refused, match="was last used by ledger"):
        queue.open("r2")


def test_the_commits_of_a_second_ledger_are_noticed_without_the_archive(queue: MemoryRig) -> None:
    queue.put(5)
    queue.release(queue.taken())
    lose(queue)
    shutil.rmtree(queue.folder / "archive")
    with pytest.raises(Refused, match="another ledger"):
        queue.open("r2")
    done = rebuilt(queue)
    assert done.adopted == 0
    replay(queue, "r3")
    assert queue.delivered() == []
    assert queue.reasons() == {"first_intake": 5}, "the log has them still: they are read again, and wait"


def test_a_segment_that_is_gone_is_read_again_and_waits(queue: MemoryRig) -> None:
    for run in ("r1", "r2", "r3"):
        queue.put(4, part=0)
        drain = queue.open(run)
        queue.take(drain)
        queue.release(drain)
    drain_two = drain_id(queue.config.name, "r2")
    shutil.rmtree(queue.folder / "archive" / queue.config.name / "segments" / drain_two)
    lose(queue)

    done = rebuilt(queue)
    assert done.adopted == 8
    assert any("the archive lacks what lies from 4 to 8" in finding for finding in done.findings)
    assert done.positions[0] == 4
    queue.consumer()
    replay(queue, "r4")
    assert queue.delivered() == []
    assert queue.states() == {"ambiguous": 8, "open": 4}
    assert queue.reasons() == {"first_intake": 4}
    queue._check_chain()


def test_gaps_of_the_log_are_no_holes_of_the_archive(queue: MemoryRig) -> None:
    """Markers and aborted records are in no segment, and yet they were read."""
    queue.put(3, part=0)
    queue.release(queue.taken(run="r1"))
    aborted = queue.log.begin()
    for _ in range(4):
        queue.log.append(0, None, b"never", transaction=aborted)
    queue.log.abort(aborted)
    queue.put(3, part=0)
    queue.release(queue.taken(run="r2"))
    lose(queue)
    done = rebuilt(queue)
    assert (done.adopted, done.positions[0], done.findings) == (6, 11, [])


def test_a_segment_without_rows_is_adopted_by_a_rebuild(queue: MemoryRig) -> None:
    queue.put(5, part=0)
    queue.release(queue.taken(run="r1"))
    queue.write("DELETE FROM entry WHERE settled_drain IS NOT NULL")
    saved = backup(queue)
    queue.put(5, part=0)
    queue.release(queue.taken(run="r2"))
    restore(queue, saved)
    # As open_drain registers it before it would be read again.
    queue.write(
        "INSERT INTO segment (queue, uri, sha256, rows, kind) VALUES (:q, 'segments/x/y.parquet', 'z', 1, 'orphan')",
        q=queue.config.name,
    )
    assert rebuilt(queue).adopted == 5
    assert queue.states() == {"ambiguous": 10}


def test_an_archive_file_with_a_flipped_bit_is_named_and_its_entries_read_again(queue: MemoryRig) -> None:
    queue.put(5, part=0)
    queue.release(queue.taken(run="r1"))
    (path,) = (queue.folder / "archive" / queue.config.name / "segments").rglob("*.parquet")
    data = bytearray(path.read_bytes())
    data[-20] ^= 0xFF
    path.write_bytes(bytes(data))
    lose(queue)
    done = rebuilt(queue)
    assert done.adopted == 0
    assert path.name in done.findings[0]
    replay(queue, "r2")
    assert queue.reasons() == {"first_intake": 5}


def test_a_return_stays_linked_to_what_it_came_back_of(queue: MemoryRig) -> None:
    (place,) = queue.put(1)
    queue.consumer(lambda _record: True)
    replay(queue, "r1")
    assert queue.states() == {"returned": 1, "open": 1}
    lose(queue)
    rebuilt(queue)

    original = queue.entry(place)
    linked = queue.one("SELECT id FROM entry WHERE return_of = :o", o=original.id)
    assert queue.states() == {"ambiguous": 2}

    # Freed, it is not taken for a twin of its first life, which would settle it unseen.
    drain = queue.open("desk")
    resolve(drain, EVERYTHING, "open", who="alice", why="both never ran")
    categorize(drain)
    assert queue.one("SELECT duplicate_of FROM entry WHERE id = :i", i=linked) is None


def test_a_return_taken_after_the_backup_marks_what_the_backup_knows_as_replayed(queue: MemoryRig) -> None:
    queue.put(1)
    queue.consumer()
    replay(queue, "r1")
    saved = backup(queue)
    sent = queue.delivered()[0]
    queue.log.append(0, sent.key, sent.value, sent.headers)  # dead-lettered late, our headers kept
    drain = queue.open("r2")
    queue.take(drain)
    queue.release(drain)
    restore(queue, saved)
    rebuilt(queue)
    assert queue.states() == {"returned": 1, "ambiguous": 1}


def test_a_forged_return_is_not_believed(queue: MemoryRig) -> None:
    """Its headers name an entry, but it carries another payload."""
    (place,) = queue.put(1)
    queue.consumer()
    replay(queue, "r1")
    sent = queue.delivered()[0]
    queue.log.append(0, sent.key, b"something else", sent.headers)
    drain = queue.open("r2")
    queue.take(drain)
    queue.release(drain)
    lose(queue)
    rebuilt(queue)
    assert queue.rows("SELECT id FROM entry WHERE return_of IS NOT NULL") == []
    assert queue.entry(place).state == "ambiguous"


@pytest.mark.parametrize("how", ["lost", "restored"])
def test_an_entry_with_a_flaw_keeps_it_as_its_reason(how: str, queue: MemoryRig) -> None:
    queue.log.append(0, b"k", b"v", flaw="unrepresentable_headers")
    queue.put(1)
    queue.release(queue.taken())
    saved = backup(queue)
    queue.release(queue.open("r2"))
    lose(queue) if how == "lost" else restore(queue, saved)
    rebuilt(queue)
    drain = queue.open("desk")
    assert resolve(drain, EVERYTHING, "open", who="alice", why="x") == 2
    categorize(drain)
    assert queue.reasons() == {"unrepresentable_headers": 1, "ready": 1}


def test_a_ledger_that_is_current_has_nothing_to_rebuild(queue: MemoryRig) -> None:
    queue.put(5)
    queue.release(queue.taken())
    done = rebuilt(queue)
    assert done.behind is None
    assert str(done).startswith("nothing to rebuild")
    assert queue.reasons() == {"ready": 5}
    assert queue.rows("SELECT id FROM decision") == []


def test_an_orphan_whose_entries_retention_took_is_adopted_by_a_current_ledger(queue: MemoryRig) -> None:
    """Killed between segment and rows; before the next drain, the log forgot what the segment holds."""
    queue.put(4, part=0)
    queue.put(2, part=1)
    drain = queue.open("r1")
    write = drain.archive.write

    def die_after(*arguments: Any) -> Any:
        write(*arguments)
        raise Killed

    drain.archive.write = die_after  # type: ignore[method-assign]
    with pytest.raises(Killed):
        queue.take(drain)
    queue.log.expire(0, 3)
    queue.expire_lease()

    done = rebuilt(queue)
    assert (done.behind, done.adopted) == (None, 3), "what the log still has is read again, as new"
    drain = queue.open("r2")
    queue.take(drain)
    assert queue.states() == {"ambiguous": 3, "open": 3}


def test_a_queue_that_is_held_is_not_rebuilt(queue: MemoryRig) -> None:
    queue.put(1)
    drain = queue.taken()
    saved = backup(queue)
    queue.release(drain)
    replay(queue, "r2")
    restore(queue, saved)
    with pytest.raises(QueueBusy):
        rebuilt(queue)
    queue.expire_lease()
    rebuilt(queue, "again")
    queue.open("r3")


@contextmanager
def mortal(wire: Tripwire, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever outlives the process is a step at which it may die."""
    write, claim, remember = Ledger.write, Archive.claim_epoch, MemoryDlq.remember

    @contextmanager
    def wired_write(self: Ledger, queue: str, epoch: int | None, **how: Any) -> Iterator[Any]:
        wire()
        with write(self, queue, epoch, **how) as tx:
            yield tx
            wire()
        wire()

    def wired(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **how: Any) -> Any:
            wire()
            done = method(*arguments, **how)
            wire()
            return done

        return call

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "write", wired_write)
        patch.setattr(Archive, "claim_epoch", wired(claim))
        patch.setattr(MemoryDlq, "remember", wired(remember))
        yield


class Moment:
    """The world as it is now, to come back to: ledger, archive, and what the queue was told."""

    def __init__(self, rig: MemoryRig) -> None:
        self._rig = rig
        self._ledger = backup(rig).rename(rig.folder / "moment.db")
        self._archive = shutil.copytree(rig.folder / "archive", rig.folder / "moment")
        self._told = dict(rig.log.commits)

    def again(self) -> None:
        restore(self._rig, self._ledger)
        shutil.rmtree(self._rig.folder / "archive")
        shutil.copytree(self._archive, self._rig.folder / "archive")
        self._rig.log.commits = dict(self._told)


def kills(
    rig: MemoryRig, monkeypatch: pytest.MonkeyPatch, act: Callable[[], object], at_least: int
) -> Iterator[int]:
    """Do ``act`` again and again, each time killed three steps later, until it gets through."""
    monkeypatch.setattr(lease, "GRACE_S", 0.0)
    moment = Moment(rig)
    at = random.randrange(3)
    while True:
        moment.again()
        try:
            with mortal(Tripwire(at), monkeypatch):
                act()
        except Killed:
            rig.expire_lease()
            yield at
            at += 3
        else:
            assert at >= at_least, f"{at} steps are so few that nothing was tried"
            return


@pytest.mark.parametrize("how", ["lost", "restored", "restored, nothing taken since"])
def test_a_rebuild_killed_at_any_step_leaves_nothing_that_could_be_sent(
    how: str, queue: MemoryRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue.put(3)
    queue.release(queue.taken(run="r1"))
    saved = backup(queue).rename(queue.folder / "older.db")
    queue.consumer()
    replay(queue, "r2")
    if how != "restored, nothing taken since":
        queue.put(2)
        replay(queue, "r3")
    doubtful = {"ambiguous": len(queue.delivered())}
    lose(queue) if how == "lost" else restore(queue, saved)

    for at in kills(queue, monkeypatch, lambda: rebuilt(queue), at_least=15):
        try:
            drain = queue.open("early")
        except Refused:
            rebuilt(queue, "again")
        else:  # killed when all but the lease was done
            queue.release(drain)
        assert queue.states() == doubtful, f"killed at step {at}"
        queue._check_chain()
        queue.release(queue.open("r4"))


# Another topic


def adopted(rig: MemoryRig, run: str = "adopt") -> Any:
    return adopt_source(rig.config, who="alice@desk", run_id=run, connections=Connection)


def test_a_recreated_topic_is_adopted_by_a_persons_word_only(queue: MemoryRig) -> None:
    queue.put(4, "DataCorruption")
    queue.release(queue.taken())
    queue.log.recreate()
    queue.put(3)
    with pytest.raises(Refused, match="adopt-source"):
        queue.open("r2")

    done = adopted(queue)
    assert done.was != done.now
    assert queue.one("SELECT who FROM decision WHERE kind = 'adopt_source'") == "alice@desk"
    queue.consumer()
    replay(queue, "r3")
    assert queue.delivered() == [], "what the new topic held is a first intake"
    assert queue.reasons() == {"waiting_for_person": 4, "first_intake": 3}
    queue.put(2)
    replay(queue, "r4")
    assert len(queue.delivered()) == 2


def test_a_truncated_topic_is_another_source_from_then_on(queue: MemoryRig) -> None:
    places = queue.put(4, part=0)
    queue.release(queue.taken())
    # As if the log had been longer once: our position is beyond its end.
    queue.write("UPDATE intake SET to_pos = 100, cutoff = 100 WHERE part = 0 AND to_pos = 4")
    with pytest.raises(Refused, match="truncated"):
        queue.open("r2")

    done = adopted(queue)
    assert done.now == f"{done.was}#2"
    drain = queue.open("r3")
    queue.take(drain)
    again = queue.rows(
        "SELECT s.uri FROM entry e JOIN source s ON s.id = e.source WHERE e.place = :p", p=str(places[0][1])
    )
    assert sorted(uri for (uri,) in again) == [done.was, done.now], (
        "the same offsets, but not the same entries"
    )
    queue.release(drain)
    queue.write("UPDATE intake SET to_pos = 100, cutoff = 100 WHERE part = 0 AND to_pos = 4")
    assert adopted(queue, "adopt again").now == f"{done.was}#3"
    queue.open("r4")


def test_an_old_topic_can_be_gone_back_to(queue: MemoryRig) -> None:
    queue.put(2, part=0)
    queue.release(queue.taken(run="r1"))
    old = queue.log.id
    queue.log.recreate()
    adopted(queue)
    queue.log.id = old
    with pytest.raises(Refused, match="adopt-source"):
        queue.open("r2")
    assert adopted(queue, "back").positions[0] == 2
    queue.write("UPDATE source SET seen_at = seen_at")
    assert queue.one("SELECT COUNT(*) FROM source WHERE retired_at IS NULL") == 1


def test_nothing_is_adopted_where_nothing_changed(queue: MemoryRig) -> None:
    queue.put(2)
    queue.release(queue.taken())
    with pytest.raises(Refused, match="nothing to adopt"):
        adopted(queue)


def test_a_lost_ledger_is_no_matter_of_adoption(queue: MemoryRig) -> None:
    queue.put(2)
    queue.release(queue.taken())
    lose(queue)
    with pytest.raises(Refused, match="rebuild"):
        adopted(queue)


def test_a_lost_ledger_rebuilds_the_life_after_a_truncation(queue: MemoryRig) -> None:
    queue.put(4, part=0)
    queue.release(queue.taken(run="r1"))
    queue.write("UPDATE intake SET to_pos = 100, cutoff = 100 WHERE part = 0 AND to_pos = 4")
    now = adopted(queue).now
    drain = queue.open("r2")
    queue.take(drain)
    queue.release(drain)
    lose(queue)
    done = rebuilt(queue)
    assert done.adopted == 8
    assert done.positions[0] == 4
    assert queue.one("SELECT uri FROM source WHERE retired_at IS NULL") == now
    queue.open("r3")


def test_a_lost_ledger_and_a_recreated_topic_are_two_decisions(queue: MemoryRig) -> None:
    queue.put(2)
    queue.release(queue.taken())
    saved = backup(queue)
    queue.consumer()
    replay(queue, "r2")
    restore(queue, saved)
    queue.log.recreate()
    done = rebuilt(queue)
    assert any("adopt-source" in finding for finding in done.findings)
    with pytest.raises(Refused, match="adopt-source"):
        queue.open("r3")
    adopted(queue)
    replay(queue, "r4")
    assert len(queue.delivered()) == 2
    assert queue.states() == {"ambiguous": 2}


@pytest.mark.parametrize("what", ["recreated", "truncated"])
def test_an_adoption_killed_at_any_step_is_done_by_the_next(
    what: str, queue: MemoryRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue.put(4, part=0)
    queue.release(queue.taken(run="r1"))
    if what == "recreated":
        queue.log.recreate()
    else:
        queue.write("UPDATE intake SET to_pos = 100, cutoff = 100 WHERE part = 0 AND to_pos = 4")
    for _ in kills(queue, monkeypatch, lambda: adopted(queue), at_least=8):
        try:
            queue.open("early")
        except Refused:
            adopted(queue, "again")
            queue.open("r2")
        assert queue.one("SELECT COUNT(*) FROM source WHERE retired_at IS NULL") == 1
