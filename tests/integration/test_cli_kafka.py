"""``dlq`` on a real broker, run as a user runs it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Consumer, TopicPartition
from tests.integration.command import Commands, write_ambiguous
from tests.integration.rig import Rig, failure, wait_until

from dlq_demo.broker import create_topic


@pytest.fixture
def rig(make_rig: Callable[..., Rig]) -> Rig:
    return make_rig()


@pytest.fixture
def dlq(rig: Rig) -> Commands:
    return Commands(rig)


def committed(rig: Rig) -> dict[int, int]:
    """What the drain's group has committed on the DLQ."""
    client = Consumer({"bootstrap.servers": rig.bootstrap, "group.id": f"dlq-drain.{rig.queue}"})
    try:
        parts = client.list_topics(rig.dlq, timeout=10).topics[rig.dlq].partitions
        found = client.committed([TopicPartition(rig.dlq, p) for p in parts], timeout=10)
        return {p.partition: p.offset for p in found if p.offset >= 0}
    finally:
        client.close()


def drained(rig: Rig, run: str) -> None:
    """A whole drain in this process: the command's own is tried elsewhere."""
    rig.release(rig.drain(run))


def test_the_night_when_airflow_is_down(dlq: Commands, rig: Rig) -> None:
    """From an empty queue and no drain ever, to a green verdict: status, take, letters, replay, status."""
    queue = rig.queue
    assert dlq.json("take", queue)["taken"] == 0, (
        "a set-up takes the empty queue, so that nothing waits for a decision"
    )
    rig.letters(60, kinds=("TransientNetwork", "RateLimit", "DataCorruption"))
    rig.consumer()
    before = dlq.json("status", queue)
    assert (before["depth"], before["unsettled"], before["outstanding"]) == (60, 0, 60)

    done = dlq.run("replay", queue)
    assert "verdict: green" in done.stdout
    assert "conservation proven" in done.stdout
    for stage in ("take_custody", "categorize", "retry_transient", "drain_remaining", "verify_conservation"):
        assert f"{stage}: " in done.stderr, f"the stage {stage} said nothing"

    rig.check_custody()
    assert len(rig.check_effects()) == 40
    after = dlq.json("status", queue)
    assert (after["depth"], after["unsettled"]) == (0, 20)
    assert [(row["entries"], row["reason"]) for row in after["open"]] == [(20, "waiting_for_person")]
    assert after["holder"] is None
    assert after["last_drain"]["verdict"] == "green"
    assert (rig.folder / "report" / f"{after['last_drain']['id']}.html").exists()

    proof = dlq.json("verify", queue)
    assert proof["proven"]
    assert proof["drain"] == after["last_drain"]["id"], "a proof is of the last run that did something"
    assert proof["witnesses"]["target"].startswith("40 replays found")


def test_nothing_is_told_to_the_queue_by_a_look(dlq: Commands, rig: Rig) -> None:
    rig.letters(30)
    assert len(dlq.lines("sample", rig.queue, "-n", "12", "--json")) == 12
    dlq.json("status", rig.queue)
    assert committed(rig) == {}
    assert rig.sql("SELECT COUNT(*) FROM drain")[0][0] == 0


def test_a_sample_shows_the_oldest_of_each_partition_redacted(dlq: Commands, rig: Rig) -> None:
    headers = failure(1, "DataCorruption", wf_error_message=b"no bearer abcdef123456 for me\x1b[2J")
    for part in (0, 1, 2):
        rig.produce(rig.dlq, [(b"k", b"secret \x1b[2J \xff", headers)] * 5, partition=part)
    rows = dlq.lines("sample", rig.queue, "-n", "6", "--json")
    assert sorted(row["place"] for row in rows) == ["0/0", "0/1", "1/0", "1/1", "2/0", "2/1"]
    assert all("abcdef123456" not in row["message"] for row in rows)
    assert "exported" not in rows[0]

    shown = dlq.run("sample", rig.queue, "-n", "3")
    assert "secret" not in shown.stdout
    assert "\x1b" not in shown.stdout

    payloads = dlq.run("sample", rig.queue, "-n", "3", "--payload")
    assert "secret \\x1b[2J \\xff" in payloads.stdout
    assert "secrets" in payloads.stderr, "it warns"
    assert "\x1b" not in payloads.stdout

    # Without a ledger, too: what counts at that moment is to see.
    dlq.configure(ledger=f"sqlite:///{rig.folder}/none.db")
    assert len(dlq.lines("sample", rig.queue, "--json")) == 10


def test_a_sample_is_of_what_is_not_in_custody(dlq: Commands, rig: Rig) -> None:
    rig.letters(9)
    dlq.run("take", rig.queue)
    assert "nothing is in the queue" in dlq.run("sample", rig.queue).stdout
    rig.letters(2)
    assert len(dlq.lines("sample", rig.queue, "--json")) == 2


def test_a_first_intake_is_planned_freed_and_then_replayed(dlq: Commands, rig: Rig) -> None:
    queue = rig.queue
    rig.letters(20, kinds=("TransientNetwork", "DataCorruption"))
    rig.consumer()
    taken = dlq.run("take", queue)
    assert "20 entries are of the queue's first intake" in taken.stderr
    assert dlq.json("plan", queue)["replay"] == []

    rehearsed = dlq.json("plan", queue, "--approve", "--dry-run")
    assert sum(row["entries"] for row in rehearsed["first_intake"]) == 20
    assert rehearsed["freed"] is None
    assert rig.states() == {"open:first_intake": 20}

    freed = dlq.json("plan", queue, "--approve", "--who", "alice")
    assert sum(row["entries"] for row in freed["freed"]) == 20
    assert [(row["entries"], row["target"]) for row in freed["replay"]] == [(10, rig.origin)]
    assert [(row["entries"], row["reason"]) for row in freed["waiting"]] == [(10, "waiting_for_person")]
    assert rig.effects() == [], "a plan sends nothing"
    assert {who for (who,) in rig.sql("SELECT who FROM decision WHERE kind = 'first_intake'")} == {"alice"}

    dlq.run("replay", queue)
    assert len(rig.check_effects()) == 10


def test_some_partitions_and_some_groups(dlq: Commands, rig: Rig) -> None:
    rig.begin()
    rig.letters(30, kinds=("TransientNetwork", "RateLimit"))
    rig.consumer()
    dlq.run("take", rig.queue, "--part", "0", "--part", "2")
    assert {part for (part,) in rig.sql("SELECT DISTINCT part FROM entry")} == {0, 2}
    plan = dlq.json("plan", rig.queue)["replay"]
    group = next(row["group"] for row in plan if row["error_type"] == "RateLimit")
    assert dlq.json("plan", rig.queue, "--group", str(group))["replay"] == [
        row for row in plan if row["group"] == group
    ]
    dlq.run("replay", rig.queue, "--group", str(group))
    assert {s.header("dlq-entry") for s in rig.check_effects()}
    assert rig.sql("SELECT DISTINCT grp FROM entry WHERE state = 'confirmed'") == [(group,)]
    assert rig.count("state = 'confirmed'") == rig.count(f"grp = {group}")


def test_a_deep_queue_asks_a_person_where_the_file_says_so(dlq: Commands, rig: Rig) -> None:
    dlq.configure(limits={"dr": 5}, approval={"dr": "person"})
    rig.begin()
    rig.letters(12)
    rig.consumer()
    said = dlq.refusal("replay", rig.queue, exits=3)
    assert "--approve-dr" in said
    assert rig.effects() == []
    assert rig.count() == 12, "everything is in custody"
    dlq.run("replay", rig.queue, "--approve-dr", "--who", "alice")
    assert len(rig.check_effects()) == 12
    assert rig.sql("SELECT who, choice FROM decision WHERE kind = 'approve_dr'") == [("alice", "Approve")]


def test_a_busy_queue_is_exit_status_3_and_says_who_holds_it(dlq: Commands, rig: Rig) -> None:
    drain = rig.open("held")
    said = dlq.refusal("take", rig.queue, exits=3)
    assert drain.id in said
    assert dlq.json("status", rig.queue)["holder"]["drain"] == drain.id


@pytest.mark.slow
def test_a_killed_command_keeps_others_out_for_minutes_at_most_and_an_ended_one_not_at_all(
    dlq: Commands, rig: Rig
) -> None:
    rig.begin()
    rig.letters(100)  # and nobody consumes: the replay would wait
    consumer = rig.consumer()
    consumer.stop()

    process = dlq.start("replay", rig.queue)
    wait_until(lambda: rig.count("state = 'replayed'"), "the canary is sent", seconds=60)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "what was committed stands" in err
    assert dlq.json("status", rig.queue)["holder"] is None

    process = dlq.start("replay", rig.queue)
    wait_until(lambda: rig.sql("SELECT holder FROM queue")[0][0], "it is opened", seconds=60)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    dlq.refusal("take", rig.queue, exits=3)
    rig.expire_lease()
    rig.consumer()
    dlq.run("replay", rig.queue)
    rig.check_effects()
    assert rig.states() == {"confirmed": 100}


def test_an_entry_is_edited_from_a_file(dlq: Commands, rig: Rig, tmp_path: Path) -> None:
    rig.begin()
    rig.produce(
        rig.dlq, [(b"k", b'{"amount": "1O"}', failure(1, "DataCorruption", topic=rig.origin))], partition=0
    )
    assert "no entry 0/0" in dlq.refusal("edit", rig.queue, "0/0", "--value", os.devnull, exits=2)
    dlq.run("take", rig.queue)
    value = tmp_path / "fixed.json"
    value.write_bytes(b'{"amount": 10}')
    made = dlq.json("edit", rig.queue, "0/0", "--value", str(value), "--who", "alice")
    assert (made["size"], made["size_before"]) == (14, 16)
    told = dlq.run("edit", rig.queue, "0/0", "--value", "-", stdin=b"again")
    assert f"dlq_review__{rig.queue}" in told.stdout
    assert rig.sql("SELECT who, payload_sha FROM draft WHERE id = :i", i=made["draft"]) == [
        ("alice", made["payload_sha"])
    ]
    assert [d["id"] for d in dlq.json("explain", "--entry", rig.queue, "0/0")["drafts"]] == [
        made["draft"],
        made["draft"] + 1,
    ]
    assert rig.effects() == []


def test_an_entry_that_failed_again_is_a_red_verdict_and_explained_with_both_its_lives(
    dlq: Commands, rig: Rig
) -> None:
    rig.begin()
    rig.letters(1)
    rig.consumer(fails=lambda _: True)
    verdict = dlq.json("replay", rig.queue, exits=1)
    assert verdict["verdict"] == "red"
    assert any("replay success 0.0%" in reason for reason in verdict["reasons"])
    (part, place), (back_part, back) = rig.sql("SELECT part, place FROM entry ORDER BY id")
    found = dlq.json("explain", "--entry", rig.queue, f"{part}/{place}")
    assert (found["state"], found["group"]["error_type"]) == ("returned", "TransientNetwork")
    assert [(j["kind"], j["target"], j["passed"], j["sent_to_pos"]) for j in found["jobs"]] == [
        ("replay", rig.origin, True, 0)
    ]
    assert [(o["part"], o["place"]) for o in found["came_back_as"]] == [(back_part, back)]
    assert [d["kind"] for d in found["decisions"]] == ["replay"]
    again = dlq.json(
        "explain", "--entry", rig.queue, found["entry"].rsplit("/", 2)[0] + f"/{back_part}/{back}"
    )
    assert [(o["part"], o["place"]) for o in again["came_back_of"]] == [(part, place)]
    assert again["attempts"] == 1
    text = dlq.run("explain", "--entry", rig.queue, f"{part}/{place}").stdout
    assert "came back as" in text
    assert rig.origin in text


# Restore


def same_bytes(rig: Rig, topic: str) -> tuple[list[Any], list[Any]]:
    """(key, value, headers, timestamp) of the DLQ's records and of a topic's, sorted."""

    def all_of(name: str) -> list[Any]:
        return sorted(((s.key, s.value, s.headers, s.timestamp) for s in rig.log(name)), key=repr)

    return all_of(rig.dlq), all_of(topic)


@pytest.fixture
def hostile(rig: Rig) -> Rig:
    """Letters of every kind, taken; half of them replayed."""
    rig.begin()
    rig.letters(20)
    odd = [("a", None), ("a", b"\xff\x00"), ("a", b""), *failure(1, "DataCorruption", topic=rig.origin)]
    rig.produce(
        rig.dlq, [(None, None, odd), (b"", b"", odd), (b"k", b"v" * 900_000, []), (b"\xff", b"\xfe", odd)]
    )
    return rig


def test_a_scratch_topic_gets_the_bytes_as_they_were(dlq: Commands, hostile: Rig) -> None:
    hostile.consumer()
    drained(hostile, "r1")
    before = hostile.states()
    assert "confirmed" in before
    scratch = f"{hostile.queue}.scratch"
    assert "does not exist" in dlq.refusal(
        "restore", hostile.queue, "--to", "topic", scratch, "--all", exits=2
    )
    create_topic(hostile.bootstrap, scratch, 3)
    done = dlq.json("restore", hostile.queue, "--to", "topic", scratch, "--all")
    assert done["entries"] == 24
    letters, restored = same_bytes(hostile, scratch)
    assert restored == letters
    assert hostile.states() == before


def test_a_record_the_scratch_topic_never_takes_is_left_out_and_named(dlq: Commands, hostile: Rig) -> None:
    dlq.run("take", hostile.queue)
    scratch = f"{hostile.queue}.small"
    create_topic(
        hostile.bootstrap, scratch, 1, {"max.message.bytes": "10000", "compression.type": "uncompressed"}
    )
    done = dlq.json("restore", hostile.queue, "--to", "topic", scratch, "--all")
    large = [s for s in hostile.log(hostile.dlq) if len(s.value or b"") > 10_000]
    compressible = done["entries"] == 24
    assert compressible or [why for _, why in done["left_out"]] == ["too large for the target"]
    assert len(hostile.log(scratch)) == done["entries"] == 24 - len(done["left_out"])
    assert large


@pytest.mark.parametrize("which", ["dlq", "origin", "internal"])
def test_a_topic_that_matters_is_no_scratch_topic(which: str, dlq: Commands, rig: Rig) -> None:
    rig.letters(1)
    dlq.run("take", rig.queue)
    name = {"dlq": rig.dlq, "origin": rig.origin, "internal": "__consumer_offsets"}[which]
    dlq.refusal("restore", rig.queue, "--to", "topic", name, "--all", exits=2)
    assert len(rig.log(rig.dlq)) == 1
    assert rig.log(rig.origin) == []


def test_a_file_is_written_and_explained(dlq: Commands, hostile: Rig, tmp_path: Path) -> None:
    dlq.run("take", hostile.queue)
    path = tmp_path / "out.jsonl"
    assert dlq.json("restore", hostile.queue, "--to", "file", str(path), "--all")["entries"] == 24
    lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert {line["topic"] for line in lines} == {hostile.dlq}
    said = dlq.lines("explain", str(path))
    assert [s["failure"]["error_type"] for s in said].count("DataCorruption") == 3
    dlq.refusal("restore", hostile.queue, "--to", "file", str(path), "--all", exits=2)


def test_entries_are_handed_back_to_the_queue_and_wait_for_a_person_when_taken_again(
    dlq: Commands, hostile: Rig
) -> None:
    queue = hostile.queue
    dlq.run("take", queue)
    letters = {(s.part, s.offset): s for s in hostile.log(hostile.dlq)}
    done = dlq.json("restore", queue, "--to", "dlq", "--all", "--who", "alice")
    assert done["entries"] == 24
    assert hostile.states() == {"handed_back": 24}
    assert hostile.sql("SELECT who, kind FROM decision") == [("alice", "hand_back")]
    assert dlq.json("verify", queue)["proven"]

    back = [s for s in hostile.log(hostile.dlq) if (s.part, s.offset) not in letters]
    assert len(back) == 24
    for seen in back:
        _, part, offset = str(seen.header("dlq-entry")).rsplit("/", 2)
        was = letters[int(part), int(offset)]
        ours = [h for h in seen.headers or () if h[0].startswith("dlq-")]
        assert (seen.key, seen.value, seen.headers, seen.timestamp) == (
            was.key,
            was.value,
            (*(was.headers or ()), *ours),
            was.timestamp,
        )
        assert {name for name, _ in ours} >= {"dlq-drain", "dlq-job", "dlq-ordinal", "dlq-entry", "dlq-key"}

    hostile.consumer()
    drained(hostile, "r1")
    assert hostile.states() == {"handed_back": 24, "open:handed_back_again": 24}
    assert hostile.count("return_of IS NOT NULL") == 24
    assert hostile.effects() == [], "what a person handed back is not replayed by itself"


def test_only_open_entries_are_handed_back(dlq: Commands, rig: Rig) -> None:
    rig.begin()
    rig.letters(10, kinds=("TransientNetwork", "DataCorruption"))
    rig.consumer()
    drained(rig, "r1")
    assert dlq.json("restore", rig.queue, "--to", "dlq", "--all")["entries"] == 5
    assert rig.states() == {"confirmed": 5, "handed_back": 5}
    assert dlq.json("restore", rig.queue, "--to", "dlq", "--all")["entries"] == 0


@pytest.mark.slow
def test_a_killed_hand_back_is_settled_by_the_next_and_the_rest_is_not_replayed(
    dlq: Commands, rig: Rig
) -> None:
    dlq.configure(limits={"rate": 50, "dr": 1_000_000})
    rig.begin()
    rig.letters(300)
    dlq.run("take", rig.queue)

    def half() -> bool:
        return rig.count("state = 'handed_back'") > 50

    dlq.kill_when(half, "restore", rig.queue, "--to", "dlq", "--all", what="some are handed back")
    rig.expire_lease()
    dlq.configure()
    rig.consumer()
    drained(rig, "r1")
    assert rig.effects() == [], "what was to be handed back was replayed, and nobody said so"
    states = rig.states()
    handed = states.pop("handed_back")
    assert states == {"open:hand_back_unfinished": 300 - handed, "open:handed_back_again": handed}
    assert dlq.json("verify", rig.queue)["proven"]
    rig.check_custody()


# Doubts


def test_doubts_are_resolved_and_the_proof_holds(dlq: Commands, rig: Rig) -> None:
    rig.begin()
    rig.letters(9)
    dlq.run("take", rig.queue)
    write_ambiguous(rig, 9)
    rig.consumer()
    drained(rig, "r1")
    assert rig.effects() == []
    (group,) = rig.sql("SELECT id FROM grp WHERE error_type = 'RateLimit'")[0]
    assert (
        dlq.json("ledger", "resolve", rig.queue, "--group", str(group), "--as", "replayed", "--why", "seen")[
            "resolved"
        ]
        == 3
    )
    place = "/".join(
        map(str, rig.sql("SELECT part, place FROM entry WHERE state = 'ambiguous' ORDER BY id")[0])
    )
    dlq.run("ledger", "resolve", rig.queue, place, "--as", "discarded", "--why", "too old", "--who", "alice")
    dlq.run("ledger", "resolve", rig.queue, "--all", "--as", "open", "--why", "never ran")
    assert rig.states() == {"replayed": 3, "discarded": 1, "open:ready": 5}
    drained(rig, "r2")
    assert len(rig.effects()) == 5
    assert rig.states() == {"replayed": 3, "discarded": 1, "confirmed": 5}
    assert dlq.json("verify", rig.queue)["proven"]
    assert "in doubt" in dlq.refusal(
        "ledger", "resolve", rig.queue, "--all", "--as", "open", "--why", "x", exits=3
    )


def test_a_broken_law_is_exit_status_1_and_named(dlq: Commands, rig: Rig) -> None:
    rig.begin()
    rig.letters(6)
    dlq.run("take", rig.queue)
    for path in (rig.folder / "archive").rglob("*.parquet"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(bytes(data))
    said = dlq.run("verify", rig.queue, exits=1)
    assert "NOT PROVEN" in said.stdout
    assert "archive segment broken" in said.stdout
    assert "other bytes" in dlq.refusal(
        "restore", rig.queue, "--to", "file", str(rig.folder / "x"), "--all", exits=1
    )


def test_dlq_is_a_program_too(dlq: Commands) -> None:
    program = Path(sys.executable).with_name("dlq")
    said = subprocess.run(
        [program, "--help"], env=dlq.environment, capture_output=True, text=True, check=True
    )
    assert said.stdout == dlq.run("--help").stdout
