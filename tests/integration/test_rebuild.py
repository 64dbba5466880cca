"""A ledger lost, restored, doubled; a topic recreated, truncated: on a real broker, mended by command.

Each step of a rebuild at which a process could die is tried in ``tests/unit/test_ledger_rebuild.py``.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from confluent_kafka import Consumer, TopicPartition
from confluent_kafka.admin import AdminClient
from tests.integration.command import Commands
from tests.integration.rig import Rig, wait_until

from dlq.errors import Refused
from dlq.intake import take_custody
from dlq.triage import categorize
from dlq_demo.broker import create_topic


@pytest.fixture
def rig(make_rig: Callable[..., Rig]) -> Rig:
    made = make_rig()
    made.begin()
    return made


@pytest.fixture
def dlq(rig: Rig) -> Commands:
    return Commands(rig)


def drained(rig: Rig, run: str) -> None:
    rig.release(rig.drain(run))


def taken(rig: Rig, run: str) -> None:
    drain = rig.open(run)
    take_custody(drain, 60)
    categorize(drain)
    rig.release(drain)


def ledger(rig: Rig) -> Path:
    return rig.folder / "ledger.db"


def backup(rig: Rig) -> Path:
    path = rig.folder / "backup.db"
    with sqlite3.connect(ledger(rig)) as now, sqlite3.connect(path) as then:
        now.backup(then)
    return path


def restore(rig: Rig, path: Path | None) -> None:
    """The ledger as it was at a backup; None: there is none any more."""
    for name in ("ledger.db", "ledger.db-wal", "ledger.db-shm"):
        (rig.folder / name).unlink(missing_ok=True)
    if path is not None:
        path.rename(ledger(rig))


def positions(rig: Rig) -> dict[int, int]:
    rows = rig.sql(
        "SELECT i.part, i.to_pos FROM intake i JOIN source s ON s.id = i.source AND s.retired_at IS NULL "
        "WHERE i.round = (SELECT MAX(round) FROM intake WHERE source = i.source AND part = i.part)"
    )
    return dict(tuple(row) for row in rows)


def test_a_lost_ledger_is_rebuilt_and_sends_nothing_before_a_person_says_so(dlq: Commands, rig: Rig) -> None:
    queue = rig.queue
    rig.letters(60, kinds=("TransientNetwork", "DataCorruption"))
    rig.consumer()
    drained(rig, "r1")
    sent = len(rig.check_effects())
    assert sent == 30
    at = positions(rig)

    restore(rig, None)
    assert "dlq ledger create" in dlq.refusal("replay", queue, exits=2)
    dlq.run("ledger", "create", queue)
    assert "dlq ledger rebuild" in dlq.refusal("replay", queue, exits=3), (
        "a new ledger on an old queue is noticed"
    )

    done = dlq.json("ledger", "rebuild", queue, "--who", "alice")
    assert (done["adopted"], done["doubted"]) == (60, 0)
    assert {int(part): pos for part, pos in done["positions"].items()} == at == positions(rig)
    assert rig.states() == {"ambiguous": 60}
    assert rig.sql("SELECT who FROM decision WHERE kind = 'rebuild'") == [("alice",)]
    rig.check_custody()

    # What comes now is drained as ever; what is in doubt stays where it is.
    rig.letters(20)
    drained(rig, "r2")
    assert rig.states() == {"ambiguous": 60, "confirmed": 20}
    assert len(rig.effects()) == sent + 20
    assert dlq.json("status", queue)["unsettled"] == 60

    part, place = rig.sql("SELECT part, place FROM entry WHERE state = 'ambiguous' ORDER BY id")[0]
    dlq.run("ledger", "resolve", queue, f"{part}/{place}", "--as", "open", "--why", "it never ran")
    dlq.run("ledger", "resolve", queue, "--all", "--as", "replayed", "--why", "the target has them")
    assert len(rig.effects()) == sent + 20
    drained(rig, "r3")
    now = rig.states()
    assert now["replayed"] == 59
    assert now.get("confirmed", 0) + now.get("open:waiting_for_person", 0) == 21
    assert dlq.json("verify", queue)["proven"]


def test_an_older_ledger_is_refused_and_rebuilt(dlq: Commands, rig: Rig) -> None:
    queue = rig.queue
    rig.letters(30)
    taken(rig, "r1")
    older = backup(rig)
    rig.consumer()
    drained(rig, "r2")
    rig.letters(15)
    drained(rig, "r3")
    sent = len(rig.check_effects())
    assert sent == 45

    restore(rig, older)
    assert "older backup" in dlq.refusal("take", queue, exits=3)
    assert rig.states() == {"open:ready": 30}, "it believes that nothing was sent yet"
    done = dlq.json("ledger", "rebuild", queue)
    assert (done["adopted"], done["doubted"]) == (15, 30)
    drained(rig, "r4")
    assert rig.states() == {"ambiguous": 45}
    assert len(rig.effects()) == sent
    rig.check_custody()
    assert "nothing to rebuild" in dlq.run("ledger", "rebuild", queue).stdout


def test_what_the_group_committed_beyond_the_archive_is_read_again(dlq: Commands, rig: Rig) -> None:
    """Archive and ledger are older than the queue's own memory: everything since waits for a person."""
    rig.letters(10)
    taken(rig, "r1")
    restore(rig, None)
    client = Consumer({"bootstrap.servers": rig.bootstrap, "group.id": f"dlq-drain.{rig.queue}"})
    rig.letters(12)
    ends = {p: client.get_watermark_offsets(TopicPartition(rig.dlq, p), timeout=10)[1] for p in range(3)}
    theirs = '{"ledger": "somebody", "epoch": 40}'
    client.commit(
        offsets=[TopicPartition(rig.dlq, p, end, metadata=theirs) for p, end in ends.items()],
        asynchronous=False,
    )
    client.close()

    dlq.run("ledger", "create", rig.queue)
    done = dlq.json("ledger", "rebuild", rig.queue)
    assert done["adopted"] == 10
    rig.consumer()
    drained(rig, "r2")
    assert rig.states() == {"ambiguous": 10, "open:first_intake": 12}
    assert rig.effects() == []
    assert rig.sql("SELECT epoch FROM queue")[0][0] > 40
    rig.check_custody()


def test_a_killed_rebuild_leaves_the_queue_closed_until_it_is_run_again(dlq: Commands, rig: Rig) -> None:
    for n in range(8):
        rig.letters(20)
        taken(rig, f"r{n}")
    restore(rig, None)
    dlq.run("ledger", "create", rig.queue)
    dlq.kill_when(lambda: rig.count() >= 20, "ledger", "rebuild", rig.queue, what="some segments are adopted")
    rig.expire_lease()
    with pytest.raises(Refused, match="rebuild"):
        rig.open("early")
    dlq.run("ledger", "rebuild", rig.queue)
    assert rig.states() == {"ambiguous": 160}
    rig.consumer()
    drained(rig, "after")
    assert rig.effects() == []
    rig.check_custody()


def test_a_recreated_topic_is_adopted_by_command_only(dlq: Commands, rig: Rig) -> None:
    rig.letters(12, kinds=("DataCorruption",))
    taken(rig, "r1")
    admin = AdminClient({"bootstrap.servers": rig.bootstrap})
    admin.delete_topics([rig.dlq])[rig.dlq].result(30)
    wait_until(lambda: rig.dlq not in admin.list_topics(timeout=10).topics, "the topic is gone")
    create_topic(rig.bootstrap, rig.dlq, 3)
    rig.letters(6)
    assert "adopt-source" in dlq.refusal("take", rig.queue, exits=3)

    done = dlq.json("ledger", "adopt-source", rig.queue, "--who", "alice")
    assert done["was"] != done["now"]
    assert done["positions"] == {"0": 0, "1": 0, "2": 0}
    rig.consumer()
    drained(rig, "r2")
    assert rig.states() == {"open:waiting_for_person": 12, "open:first_intake": 6}
    assert rig.effects() == []
    dlq.run("plan", rig.queue, "--approve")
    drained(rig, "r3")
    assert len(rig.effects()) == 6
    assert dlq.json("verify", rig.queue)["proven"]
    assert "nothing to adopt" in dlq.refusal("ledger", "adopt-source", rig.queue, exits=3)


def test_a_truncated_topic_is_adopted_as_another_life_of_it(dlq: Commands, rig: Rig) -> None:
    """A real topic can't be cut at its end from outside: the ledger is told that it had read further."""
    rig.letters(12)
    taken(rig, "r1")
    rig.write("UPDATE intake SET to_pos = to_pos + 100, cutoff = cutoff + 100 WHERE part = 0 AND to_pos > 0")
    said = dlq.refusal("take", rig.queue, exits=3)
    assert "truncated" in said
    assert f"dlq ledger adopt-source {rig.queue}" in said

    rig.letters(3)
    done = dlq.json("ledger", "adopt-source", rig.queue)
    assert done["now"] == done["was"] + "#2"
    rig.letters(2)
    rig.consumer()
    drained(rig, "r2")
    # What was in custody is replayed, and what came after; what the topic held is read again and waits, or is a twin.
    assert rig.states() == {"confirmed": 14, "open:first_intake": 3, "duplicate": 12}
    assert len(rig.effects()) == 14
    assert dlq.json("verify", rig.queue)["proven"]
