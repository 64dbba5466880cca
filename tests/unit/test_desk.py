"""What a person does by command: free a first intake, say what became of doubts, draft a value, restore to a file."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from tests.memory_rig import MemoryRig, failure

from dlq import drafts, first_intake, hold, restore
from dlq.archive import Rows
from dlq.entry import payload_sha
from dlq.errors import ArchiveError, ConfigError, Fenced, QueueBusy, Refused, SourceError
from dlq.explain import history
from dlq.export import imported
from dlq.ports import Connection
from dlq.recovery.doubts import resolve
from dlq.replay import drain_remaining, replay_batches, replay_canary
from dlq.review import apply_review, file_work, proposals
from dlq.sample import _shares
from dlq.selection import Selection
from dlq.status import status
from dlq.triage import categorize

EVERYTHING = Selection(everything=True)


@pytest.fixture
def old_letters(make_queue: Callable[..., MemoryRig], ledger_url: str) -> MemoryRig:
    """A queue whose first intake found letters, on either database."""
    rig = make_queue(ledger=ledger_url)
    rig.put(4)
    rig.put(2, "DataCorruption")
    return rig


def replay(rig: MemoryRig, run: str) -> Any:
    drain = rig.open(run)
    rig.take(drain)
    categorize(drain)
    for job in replay_canary(drain, "retry_transient", 30)["jobs"]:
        replay_batches(drain, job, 30)
    drain_remaining(drain, 30)
    return drain


def doubtful(rig: MemoryRig, how_many: int) -> None:
    rig.write(
        "UPDATE entry SET state = 'ambiguous', reason = 'the cursor is gone' WHERE id IN "
        "(SELECT id FROM entry WHERE queue = :q AND state = 'open' ORDER BY id LIMIT :n)",
        q=rig.config.name,
        n=how_many,
    )


# A first intake


def test_a_first_intake_is_sent_only_after_it_was_freed(old_letters: MemoryRig) -> None:
    rig = old_letters
    rig.consumer()
    rig.release(replay(rig, "r1"))
    assert rig.delivered() == []

    drain = rig.open("desk")
    freed = first_intake.free(drain, (), who="alice@desk")
    rig.release(drain)
    assert sorted((row["error_type"], row["entries"]) for row in freed) == [
        ("DataCorruption", 2),
        ("TransientNetwork", 4),
    ]
    assert rig.delivered() == [], "freeing sends nothing"
    assert rig.reasons() == {"ready": 4, "waiting_for_person": 2}
    assert {who for (who,) in rig.rows("SELECT who FROM decision WHERE kind = 'first_intake'")} == {
        "alice@desk"
    }

    rig.release(replay(rig, "r2"))
    assert len(rig.delivered()) == 4


def test_one_group_of_a_first_intake_can_be_freed(old_letters: MemoryRig) -> None:
    rig = old_letters
    drain = rig.taken()
    group = rig.one("SELECT id FROM grp WHERE error_type = 'DataCorruption'")
    first_intake.free(drain, [group], who="alice")
    assert rig.reasons() == {"first_intake": 4, "waiting_for_person": 2}


# Doubts


@pytest.mark.parametrize(
    ("fate", "left"), [("open", {"open": 6}), ("discarded", {"discarded": 3, "open": 3})]
)
def test_a_person_says_what_became_of_doubts(fate: Any, left: dict[str, int], old_letters: MemoryRig) -> None:
    rig = old_letters
    drain = rig.taken()
    first_intake.free(drain, (), who="alice")
    doubtful(rig, 3)
    assert resolve(drain, EVERYTHING, fate, who="alice@desk", why="saw it in the logs") == 3
    assert rig.states() == left
    said = rig.rows("SELECT who, subject, choice FROM decision WHERE kind = :k", k=f"resolve:{fate}")
    assert {who for who, _, _ in said} == {"alice@desk"}
    assert all(choice.endswith("saw it in the logs") for _, _, choice in said)
    with pytest.raises(Refused, match="in doubt"):
        resolve(drain, EVERYTHING, fate, who="alice", why="again")


def test_what_is_said_to_be_sent_is_settled_and_never_sent_again(old_letters: MemoryRig) -> None:
    rig = old_letters
    drain = rig.taken()
    first_intake.free(drain, (), who="alice")
    doubtful(rig, 3)
    assert resolve(drain, EVERYTHING, "replayed", who="alice", why="the orders are there") == 3
    rig.release(drain)
    rig.consumer()
    replay(rig, "r2")
    assert len(rig.delivered()) == len(rig.rows("SELECT id FROM entry WHERE state = 'confirmed'"))
    assert len(rig.rows("SELECT id FROM entry WHERE state = 'replayed'")) == 3


def test_a_doubt_about_one_entry_is_decided_by_its_name(old_letters: MemoryRig) -> None:
    rig = old_letters
    drain = rig.taken()
    doubtful(rig, 6)
    resolve(drain, Selection(entries=("0/1",)), "discarded", who="alice", why="x")
    assert rig.entry((0, 1)).state == "discarded"
    found = history(rig.ledger, rig.config.name, "0/1")
    assert [d["subject"] for d in found["decisions"]] == [f"entry {found['entry']}"]
    assert rig.states()["ambiguous"] == 5


# Choosing


def test_entries_are_chosen_by_group_drain_and_time(queue: MemoryRig) -> None:
    queue.put(2)
    first = queue.taken(run="r1")
    queue.release(first)
    queue.put(3, "DataCorruption")
    second = queue.taken(run="r2")
    group = queue.one("SELECT id FROM grp WHERE error_type = 'DataCorruption'")
    now = datetime.now(UTC)

    def count(chosen: Selection) -> int:
        with queue.ledger.read() as tx:
            from sqlalchemy import func, select

            from dlq.ledger.schema import entry

            condition = chosen.condition(tx, queue.config.name)
            return int(tx.execute(select(func.count()).select_from(entry).where(condition)).scalar_one())

    assert count(EVERYTHING) == 5
    assert count(Selection(groups=(group,))) == 3
    assert count(Selection(drains=(first.id,))) == 2
    assert count(Selection(drains=(first.id, second.id))) == 5
    assert count(Selection(drains=(first.id,), groups=(group,))) == 0
    assert count(Selection(since=now - timedelta(hours=1))) == 5
    assert count(Selection(until=now - timedelta(hours=1))) == 0
    assert count(Selection(entries=("0/0", "1/0"))) == 2


@pytest.mark.parametrize(
    ("chosen", "what"),
    [
        (Selection(entries=("0/99",)), "no entry 0/99"),
        (Selection(entries=("zero",)), "is no entry"),
        (Selection(groups=(99,)), "no group 99"),
        (Selection(drains=("x",)), "no drain x"),
    ],
)
def test_what_the_ledger_does_not_have_is_named(chosen: Selection, what: str, queue: MemoryRig) -> None:
    queue.put(1)
    queue.taken()
    with queue.ledger.read() as tx, pytest.raises(ConfigError, match=what):
        chosen.condition(tx, queue.config.name)


# Drafts


def test_a_draft_keeps_key_and_headers_and_the_original(queue: MemoryRig) -> None:
    (place,) = queue.put(1, "DataCorruption", key=b"k", value=b'{"amount": "1O"}')
    drain = queue.taken()
    made = drafts.edit(queue.config, f"{place[0]}/{place[1]}", b'{"amount": 10}', "alice", Connection)
    assert made.sha == payload_sha(b"k", b'{"amount": 10}')

    uri, row, sha = queue.one(
        "SELECT s.uri, d.row_no, d.payload_sha FROM draft d JOIN segment s ON s.id = d.segment"
    )
    stored = Rows(drain.archive.read(uri))[row]
    original = queue.log.read(*place, place[1] + 1)[0]
    assert (stored.key, stored.value, stored.headers) == (b"k", b'{"amount": 10}', original.headers)
    assert sha == made.sha
    assert queue.entry(place).payload_sha == payload_sha(b"k", b'{"amount": "1O"}')
    assert history(queue.ledger, queue.config.name, f"{place[0]}/{place[1]}")["drafts"][0]["who"] == "alice"


def test_a_draft_needs_no_lease_and_changes_no_state(queue: MemoryRig) -> None:
    queue.put(1, "DataCorruption", part=0)
    queue.taken()  # still held
    before = queue.rows("SELECT * FROM entry")
    drafts.edit(queue.config, "0/0", b"new", "alice", Connection)
    assert queue.rows("SELECT * FROM entry") == before


@pytest.mark.parametrize(
    ("state", "reason", "what"),
    [
        ("open", "new", "no drain has looked at it"),
        ("open", "ready", "the next drain replays it"),
        ("open", "fixed", "the next drain replays it"),
        ("open", "returned", "wait for its end"),
        ("discarded", "x", "is discarded"),
    ],
)
def test_only_what_waits_for_a_person_is_edited(state: str, reason: str, what: str, queue: MemoryRig) -> None:
    queue.put(1, "DataCorruption", part=0)
    drain = queue.taken()
    settled = drain.id if state == "discarded" else None
    queue.write("UPDATE entry SET state = :s, reason = :r, settled_drain = :d", s=state, r=reason, d=settled)
    with pytest.raises(Refused, match=what):
        drafts.edit(queue.config, "0/0", b"new", "alice", Connection)
    assert queue.rows("SELECT id FROM draft") == []


def test_the_value_an_entry_has_already_is_no_draft(queue: MemoryRig) -> None:
    queue.put(1, "DataCorruption", part=0, value=b"same")
    queue.taken()
    with pytest.raises(Refused, match="already"):
        drafts.edit(queue.config, "0/0", b"same", "alice", Connection)


def test_an_entry_without_its_headers_is_not_edited(queue: MemoryRig) -> None:
    queue.log.append(0, b"k", b"v", flaw="unrepresentable_headers")
    queue.taken()
    with pytest.raises(Refused, match="unrepresentable headers"):
        drafts.edit(queue.config, "0/0", b"new", "alice", Connection)


def test_an_entry_without_its_headers_is_not_replayed_by_a_review_either(queue: MemoryRig) -> None:
    queue.log.append(0, b"k", b"v", failure(1), flaw="unrepresentable_headers")
    drain = queue.taken()
    file_work(drain)
    queue.write("UPDATE entry SET state = 'ambiguous'")
    (proposed,) = proposals(drain, queue.config.name)
    queue.consumer()
    apply_review(drain, {proposed["subject"]: {"choice": "replay", "hash": proposed["hash"]}}, "alice", 5)
    assert queue.delivered() == []
    assert queue.reasons() == {"unrepresentable_headers": 1}


# Restore to a file


def test_a_file_holds_the_bytes_as_they_were_taken_whatever_became_of_them(
    queue: MemoryRig, tmp_path: Path
) -> None:
    queue.put(30)
    queue.log.append(1, None, None, (("a", None), ("a", b"\xff"), ("a", b"")))
    queue.consumer()
    replay(queue, "r1")
    before = queue.states()
    path = tmp_path / "out.jsonl"
    seen: list[tuple[int, int]] = []
    done = restore.to_file(queue.config, EVERYTHING, path, lambda n, of: seen.append((n, of)))
    assert done.entries == 31
    assert seen[-1] == (31, 31)
    written = {(r.part, r.pos): r for r in map(imported, path.read_bytes().splitlines())}
    for part in range(queue.log.partitions):
        for record in queue.log.read(part, *queue.log.marks(part)):
            back = written[record.part, record.pos]
            assert (back.key, back.value, back.headers, back.timestamp_ms) == (
                record.key,
                record.value,
                record.headers,
                record.timestamp_ms,
            )
    assert queue.states() == before
    with pytest.raises(ConfigError, match="exists"):
        restore.to_file(queue.config, EVERYTHING, path)


def test_a_file_is_not_written_from_an_archive_that_changed(queue: MemoryRig, tmp_path: Path) -> None:
    queue.put(5)
    queue.taken()
    for path in (queue.folder / "archive").rglob("*.parquet"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(bytes(data))
    with pytest.raises(ArchiveError, match="other bytes"):
        restore.to_file(queue.config, EVERYTHING, tmp_path / "out.jsonl")
    assert list(tmp_path.glob("out*")) == []


# Holding, looking


def test_a_hold_outlasts_its_lease_and_ends_with_the_command(
    queue: MemoryRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hold, "LEASE_S", 0.3)
    monkeypatch.setattr(hold, "_BEAT_S", 0.05)
    monkeypatch.setattr("dlq.ledger.lease.GRACE_S", 0.0)
    with hold.hold(queue.config, "test", connections=Connection) as held:
        first = queue.one("SELECT lease_until FROM queue")
        until = datetime.now(UTC) + timedelta(seconds=0.6)
        while datetime.now(UTC) < until:  # longer than the lease: only the beat keeps others out
            with pytest.raises(QueueBusy):
                queue.open("other")
        assert queue.one("SELECT lease_until FROM queue") > first
    assert queue.one("SELECT holder FROM queue") is None
    assert queue.one("SELECT verdict FROM drain WHERE id = :d", d=held.drain.id) == "done"
    queue.open("other")


def test_a_hold_that_failed_frees_the_queue(queue: MemoryRig) -> None:
    with pytest.raises(ZeroDivisionError), hold.hold(queue.config, "test", connections=Connection) as held:
        raise ZeroDivisionError
    assert queue.one("SELECT verdict FROM drain WHERE id = :d", d=held.drain.id) == "failed"
    queue.open("other")


def test_a_hold_that_was_taken_over_does_not_free_the_queue_of_the_next(queue: MemoryRig) -> None:
    with hold.hold(queue.config, "test", connections=Connection) as held:
        queue.expire_lease()
        other = queue.open("other")
        with pytest.raises(Fenced):
            held.drain.phase("on")
    assert queue.one("SELECT holder FROM queue") == other.id


def test_a_status_says_what_waits_for_what(queue: MemoryRig) -> None:
    queue.put(5)
    queue.put(2, "DataCorruption")
    drain = queue.taken()
    queue.put(3)
    drain.phase("categorize")
    found = status(queue.config, Connection)
    assert (found["depth"], found["unsettled"], found["outstanding"]) == (3, 7, 10)
    assert [(row["entries"], row["reason"]) for row in found["open"]] == [
        (5, "ready"),
        (2, "waiting_for_person"),
    ]
    assert (found["holder"]["drain"], found["holder"]["phase"]) == (drain.id, "categorize")
    json.dumps(found)
    queue.release(drain)
    found = status(queue.config, Connection)
    assert found["holder"] is None
    assert found["last_drain"]["id"] == drain.id


def test_a_status_of_a_queue_that_can_not_be_reached_says_what_the_ledger_knows(
    queue: MemoryRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def down(*_: object) -> Any:
        raise SourceError("Kafka can't be reached")

    queue.put(2)
    queue.taken()
    monkeypatch.setattr("dlq.sources.memory.MemoryDlq.depth", down)
    found = status(queue.config, Connection)
    assert (found["depth"], found["outstanding"], found["ratio"]) == (None, None, None)
    assert found["unsettled"] == 2
    assert found["findings"] == ["Kafka can't be reached"]


@pytest.mark.parametrize(
    ("depths", "most", "shares"),
    [
        ({0: 100, 1: 100}, 10, {0: 5, 1: 5}),
        ({0: 1, 1: 100, 2: 0}, 10, {0: 1, 1: 9}),
        ({0: 2, 1: 2}, 10, {0: 2, 1: 2}),
        (dict.fromkeys(range(20), 5), 10, dict.fromkeys(range(10), 1)),
        ({}, 10, {}),
    ],
)
def test_a_sample_is_shared_out_among_partitions(
    depths: dict[int, int], most: int, shares: dict[int, int]
) -> None:
    found = _shares(depths, most)
    assert sum(found.values()) == sum(shares.values())
    assert sorted(found.values()) == sorted(shares.values())
    assert all(found[part] <= depths[part] for part in found)
