"""Repair: one change for a whole group, drafted, approved by its hash, sent as every plan is; the original stays."""

from __future__ import annotations

import gzip
import json
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from io import BytesIO
from typing import Any

import fastavro
import pytest
from sqlalchemy import select, text
from tests.memory_rig import MemoryRig, failure
from tests.schema_registry import RegistryDouble

from dlq import drafts, repair, review
from dlq.archive import Archive, Rows
from dlq.codecs import CodecError, RegistryError, decode
from dlq.codecs.registry import SchemaRegistry
from dlq.drain import Drain
from dlq.entry import Record, payload_sha
from dlq.errors import ArchiveError, ConfigError, Refused
from dlq.explain import encoding, history
from dlq.ledger.schema import entry
from dlq.patch import Patch
from dlq.ports import Connection
from dlq.report.write import build_report, render
from dlq.review import apply_review, file_work, proposals
from dlq.selection import Selection

Make = Callable[..., MemoryRig]

SECRET = "4111-1111-1111-1111"
ADD = Patch(b'[{"op": "add", "path": "/currency", "value": "EUR"}]')
"""What the stricter consumer asks for: a currency."""


def order(n: int, **more: Any) -> bytes:
    return json.dumps({"order": n, "card": SECRET, **more}).encode()


def strict(record: Record) -> bool:
    """Whether the stricter consumer fails on a record."""
    document = json.loads(record.value or b"")
    return document.get("currency") not in ("EUR", "USD") or not isinstance(document["order"], int)


def put(rig: MemoryRig, count: int, **more: Any) -> list[tuple[int, int]]:
    return [
        rig.put(1, "DataCorruption", value=order(n, **more), key=b"k%d" % n)[0]
        for n in range(rig._number, rig._number + count)
    ]


def group(rig: MemoryRig, error_type: str = "DataCorruption") -> Selection:
    return Selection(groups=(rig.one("SELECT id FROM grp WHERE error_type = :t", t=error_type),))


def make(rig: MemoryRig, patch: Patch = ADD, chosen: Selection | None = None, **how: Any) -> repair.Repair:
    connections = how.pop("connections", Connection)
    return repair.make(rig.config, chosen or group(rig), patch, "ada", connections, **how)


def approve(rig: MemoryRig, drain: Drain, made: repair.Repair, seconds: float = 20) -> dict[str, Any]:
    (one,) = [p for p in proposals(drain, rig.config.name) if p["subject"] == f"repair {made.id}"]
    assert one["hash"] == made.hash
    return apply_review(
        drain, {one["subject"]: {"choice": "replay", "hash": made.hash or ""}}, "bob", seconds
    )


def waiting(rig: MemoryRig, count: int = 40, **more: Any) -> Drain:
    """A drain that holds ``count`` entries that wait for a person."""
    put(rig, count, **more)
    return rig.taken()


# The common case


def test_the_consumer_got_stricter_and_one_change_mends_them_all(make_queue: Make, ledger_url: str) -> None:
    rig = make_queue(ledger=ledger_url)
    rig.begin()
    places = put(rig, 300)
    lame = rig.put(1, "DataCorruption", value=b"not json")[0]
    drain = rig.taken()
    made = make(rig)
    assert (made.entries, made.drafted, made.unchanged, made.failed.total()) == (301, 300, 0, 1)
    assert rig.states() == {"open": 301}, "drafting changes no entry and sends nothing"
    assert rig.delivered() == []

    rig.consumer(strict)
    done = approve(rig, drain, made)
    assert (done["replayed"], done["confirmed"], done["returned"], done["refused"]) == (300, 300, 0, [])
    assert rig.states() == {"confirmed": 300, "open": 1}
    assert rig.reasons() == {"repair_failed": 1}
    assert {json.loads(r.value or b"")["currency"] for r in rig.delivered()} == {"EUR"}
    rig.check()

    canary, rest = rig.rows("SELECT size, canary FROM job ORDER BY canary DESC")
    assert (canary, rest) == ((26, 1), (274, 0))
    assert rig.entry(places[0]).payload_sha == payload_sha(b"k0", order(0)), (
        "the ledger keeps the original's sum"
    )
    for line in rig.rows(
        "SELECT je.payload_sha, d.payload_sha, s.kind FROM job_entry je JOIN draft d "
        "ON d.entry = je.entry JOIN segment s ON s.id = je.segment"
    ):
        assert line[0] == line[1]
        assert line[2] == "draft"
    (why,) = rig.rows("SELECT entry, why FROM repair_failure")
    assert why[0] == rig.entry(lame).id
    assert "operation 1" in why[1]


def test_what_is_approved_is_the_payload_sums(queue: MemoryRig) -> None:
    """Two repairs of the same entries have other hashes, and other plans."""
    drain = waiting(queue, 3)
    one = make(queue)
    other = make(queue, Patch(b'[{"op": "add", "path": "/currency", "value": "USD"}]'))
    assert one.hash != other.hash
    subjects = [p["subject"] for p in proposals(drain, queue.config.name)]
    assert subjects == [f"repair {other.id}"], "the newer draft replaces the older"
    again = {f"repair {one.id}": {"choice": "replay", "hash": one.hash or ""}}
    assert "changed since" in apply_review(drain, again, "bob", 5)["refused"][0]
    queue.consumer(strict)
    assert approve(queue, drain, other)["confirmed"] == 3
    assert {json.loads(r.value or b"")["currency"] for r in queue.delivered()} == {"USD"}
    sent = queue.one("SELECT hash FROM plan WHERE decision IS NOT NULL")
    assert sent not in (one.hash, other.hash)


def test_a_wrong_repair_stops_at_its_canary(queue: MemoryRig) -> None:
    drain = waiting(queue, 200)
    made = make(queue, Patch(b'[{"op": "add", "path": "/currency", "value": "euro"}]'))
    queue.consumer(strict)
    done = approve(queue, drain, made)
    assert (done["replayed"], done["confirmed"], done["returned"]) == (1, 0, 1)
    assert queue.states() == {"open": 200, "returned": 1}
    assert queue.reasons()["waiting_for_person"] == 199
    queue.check()


def test_a_repaired_replay_that_fails_again_is_a_return_of_its_original(queue: MemoryRig) -> None:
    (place,) = put(queue, 1)
    drain = queue.taken()
    made = make(queue, Patch(b'[{"op": "add", "path": "/currency", "value": "euro"}]'))
    queue.consumer(strict)
    approve(queue, drain, made)
    original = queue.entry(place)
    (back,) = queue.rows("SELECT * FROM entry WHERE return_of = :e", e=original.id)
    assert (original.state, back.state, back.attempts) == ("returned", "open", 1)
    assert back.payload_sha != original.payload_sha, "what came back is the repaired value"
    queue.release(drain)

    # It failed again, so it is repaired again: nothing of the first repair stands in the way.
    drain = queue.taken(run="r2")
    queue.write("UPDATE entry SET reason = 'returns_limit' WHERE id = :e", e=back.id)
    again = make(
        queue,
        Patch(b'[{"op": "replace", "path": "/currency", "value": "EUR"}]'),
        group(queue, "TransientNetwork"),
    )
    assert approve(queue, drain, again)["confirmed"] == 1
    assert queue.states() == {"returned": 1, "confirmed": 1}
    queue.check()


def test_a_repair_sends_in_order_of_intake_and_in_jobs_as_every_plan(make_queue: Make) -> None:
    rig = make_queue(limits={"jobs": 3}, partitions=1, target_partitions=1)
    rig.begin()
    drain = waiting(rig, 100)
    made = make(rig)
    rig.consumer(strict)
    assert approve(rig, drain, made)["confirmed"] == 100
    assert rig.one("SELECT COUNT(*) FROM job") == 4
    rig.check()


# What is chosen


def test_only_what_waits_for_a_person_is_drafted_and_the_rest_is_counted(queue: MemoryRig) -> None:
    drain = waiting(queue, 10)
    states = {1: "conflict", 2: "ready", 3: "twin_not_sent", 4: "new", 5: "unrepresentable_headers"}
    for number, reason in states.items():
        queue.write("UPDATE entry SET reason = :r WHERE id = :e", r=reason, e=number)
    queue.write("UPDATE entry SET state = 'discarded', settled_drain = :d WHERE id = 6", d=drain.id)
    queue.write("UPDATE entry SET target = NULL, reason = 'target_not_allowed' WHERE id = 7")
    made = make(queue)
    assert made.drafted == made.entries == 3
    assert made.left_out == {**dict.fromkeys(states.values(), 1), "discarded": 1, "target_not_allowed": 1}
    assert sorted(e for (e,) in queue.rows("SELECT entry FROM draft")) == [8, 9, 10]


def test_a_selection_of_which_nothing_waits_is_refused(queue: MemoryRig) -> None:
    waiting(queue, 2)
    queue.write("UPDATE entry SET reason = 'ready'")
    with pytest.raises(Refused, match=r"no entry waits for a person \(2 ready\)"):
        make(queue)
    with pytest.raises(ConfigError, match="no group 99"):
        make(queue, chosen=Selection(groups=(99,)))
    assert queue.rows("SELECT id FROM repair") == []


def test_one_entry_is_the_case_n_1(queue: MemoryRig) -> None:
    drain = waiting(queue, 5)
    made = make(queue, chosen=Selection(entries=("0/0",)))
    assert (made.drafted, made.chosen) == (1, "entry 0/0")
    queue.consumer(strict)
    assert approve(queue, drain, made)["confirmed"] == 1
    assert queue.states() == {"open": 4, "confirmed": 1}


def test_entries_that_came_after_are_not_of_the_repair(queue: MemoryRig) -> None:
    drain = waiting(queue, 4)
    made = make(queue)
    put(queue, 3)
    queue.take(drain)
    queue.consumer(strict)
    assert approve(queue, drain, made)["replayed"] == 4


def test_an_equal_key_with_another_payload_stays_a_conflict_and_a_twin_a_twin(queue: MemoryRig) -> None:
    """What a repair changes of the sums changes nothing of who is whose copy."""
    twin = failure(1, "DataCorruption", offset=7)
    conflict = failure(1, "DataCorruption", offset=8, dedupe="d")
    first = failure(1, "DataCorruption", offset=7, dedupe="d")
    for headers, n in ((first, 1), (twin, 1), (conflict, 2)):
        queue.log.append(0, b"k", order(n), headers)
    drain = queue.taken()
    assert queue.reasons() == {"waiting_for_person": 1, "twin_not_sent": 1, "conflict": 1}
    made = make(queue)
    assert (made.drafted, made.left_out) == (1, {"conflict": 1, "twin_not_sent": 1})
    queue.consumer(strict)
    approve(queue, drain, made)
    assert queue.states() == {"confirmed": 1, "duplicate": 1, "open": 1}
    assert queue.reasons() == {"conflict": 1}
    assert len(queue.delivered()) == 1
    queue.check()


def test_in_a_queue_ordered_by_key_none_overtakes_one_that_could_not_be_repaired(make_queue: Make) -> None:
    rig = make_queue(ordering="per_key", partitions=1)
    rig.begin()
    for key, value in ((b"a", b"broken"), (b"a", order(1)), (b"b", order(2)), (b"b", order(3))):
        rig.put(1, "DataCorruption", key=key, value=value)
    drain = rig.taken()
    made = make(rig)
    assert (made.drafted, made.failed.total()) == (3, 1)
    rig.consumer(strict)
    assert approve(rig, drain, made)["confirmed"] == 2
    assert [(json.loads(r.value or b"")["order"], r.key) for r in rig.delivered()] == [(2, b"b"), (3, b"b")]
    assert any("earlier entry of their key" in t for (t,) in rig.rows("SELECT text FROM event"))
    # Once the first of the key is dealt with, the rest of the repair goes.
    drafts.edit(rig.config, "0/0", order(0, currency="EUR"), "ada", Connection)
    both = {
        p["subject"]: {"choice": "replay", "hash": p["hash"]}
        for p in proposals(drain, rig.config.name)
        if not p["subject"].startswith("work")
    }
    assert apply_review(drain, both, "bob", 20)["confirmed"] == 2
    assert [json.loads(r.value or b"")["order"] for r in rig.delivered() if r.key == b"a"] == [0, 1]


# What is written down


def test_a_dry_run_tries_it_all_and_writes_nothing(queue: MemoryRig) -> None:
    waiting(queue, 30)
    queue.put(2, "DataCorruption", value=b"[]")
    queue.take(queue.attach())
    before = {
        t: queue.rows(f"SELECT * FROM {t}") for t in ("entry", "segment", "draft", "repair", "decision")
    }
    files = sorted((queue.folder / "archive").rglob("*"))
    made = make(queue, dry_run=True, chosen=Selection(everything=True))
    assert (made.id, made.hash, made.drafted) == (None, None, 30)
    assert {t: queue.rows(f"SELECT * FROM {t}") for t in before} == before
    assert sorted((queue.folder / "archive").rglob("*")) == files


def test_the_sample_spans_the_entries_and_shows_no_value_unasked(queue: MemoryRig) -> None:
    waiting(queue, 95)
    made = make(queue, Patch(b'[{"op": "move", "from": "/card", "path": "/payment"}]'), dry_run=True)
    assert len(made.sample) == repair.SAMPLE
    assert made.redacted()[0]["changes"] == [
        ("/card", "text of 19", "nothing"),
        ("/payment", "nothing", "text of 19"),
    ]
    assert SECRET not in json.dumps(made.redacted())
    assert SECRET not in repr(made)
    assert made.sample[0].changes[1].plain() == ("/payment", "nothing", f'"{SECRET}"')
    assert len({shown.entry for shown in made.sample}) == repair.SAMPLE


def test_no_payload_reaches_the_ledger_the_log_or_the_report(
    queue: MemoryRig, caplog: pytest.LogCaptureFixture
) -> None:
    drain = waiting(queue, 30)
    queue.put(1, "DataCorruption", value=b'["%s"]' % SECRET.encode())
    queue.take(drain)
    queue.write("UPDATE entry SET reason = 'waiting_for_person'")
    made = make(
        queue, Patch(b'[{"op": "test", "path": "/order", "value": 7}, {"op": "remove", "path": "/card"}]')
    )
    queue.consumer(lambda _: True)
    approve(queue, drain, made)
    tables = [t for (t,) in queue.rows("SELECT name FROM sqlite_master WHERE type = 'table'")]
    for table in tables:
        assert SECRET not in str(queue.rows(f"SELECT * FROM {table}")), table
    assert SECRET not in caplog.text
    assert SECRET not in render(build_report(drain))
    assert SECRET not in json.dumps(proposals(drain, queue.config.name))


def test_the_patch_lies_in_the_archive_and_its_sum_with_the_decision(queue: MemoryRig) -> None:
    drain = waiting(queue, 3)
    made = make(queue)
    uri, sha = queue.one("SELECT patch_uri, patch_sha FROM repair")
    assert (drain.archive.root / uri).read_bytes() == ADD.text
    assert sha == ADD.sha == made.patch.sha
    who, subject, saw, choice = queue.one(
        "SELECT who, subject, saw, choice FROM decision WHERE kind = 'repair'"
    )
    assert (who, subject) == ("ada", f"repair {made.id}")
    assert saw.startswith("3 entries of group")
    assert ADD.sha in choice
    queue.consumer(strict)
    approve(queue, drain, made)
    said = queue.one("SELECT who, saw, choice FROM decision WHERE kind = 'review:replay'")
    assert said == ("bob", made.hash, "replay")


def test_the_lineage_is_told_by_explain_and_the_report(queue: MemoryRig) -> None:
    drain = waiting(queue, 30)
    (lame,) = queue.put(1, "DataCorruption", value=b"[1]")
    queue.take(drain)
    queue.write("UPDATE entry SET reason = 'waiting_for_person'")
    made = make(queue)
    queue.consumer(strict)
    approve(queue, drain, made)
    told = history(queue.ledger, queue.config.name, "0/0")
    (draft,) = told["drafts"]
    assert (draft["repair"], draft["who"], draft["patch_sha"]) == (made.id, "ada", ADD.sha)
    assert draft["job"] == told["jobs"][0]["id"]
    assert draft["payload_sha"] == told["jobs"][0]["payload_sha"] != told["payload_sha"]
    assert [d["kind"] for d in told["decisions"]] == ["repair", "review:replay", "replay"]
    failed = history(queue.ledger, queue.config.name, f"{lame[0]}/{lame[1]}")
    assert [(r["id"], r["patch_sha"]) for r in failed["repairs_failed"]] == [(made.id, ADD.sha)]
    assert (failed["state"], failed["reason"]) == ("open", "repair_failed")
    assert failed["drafts"] == []

    (row,) = build_report(drain).repairs
    assert (row.id, row.who, row.drafted, row.failed, row.sent) == (made.id, "ada", 30, 1, 30)
    page = render(build_report(drain))
    assert "Repairs sent" in page
    assert ADD.sha[:12] in page
    assert "a repair was tried" in page


def test_the_original_stays_in_the_archive_and_a_revision_is_its_copy_but_for_the_value(
    queue: MemoryRig,
) -> None:
    headers = (("a", None), ("a", b"\xff"), *failure(1, "DataCorruption"))
    queue.log.append(0, b"k", order(1), headers)
    drain = queue.taken()
    make(queue)
    uri, row = queue.one("SELECT s.uri, d.row_no FROM draft d JOIN segment s ON s.id = d.segment")
    table, about = drain.archive.verified(uri, queue.one("SELECT sha256 FROM segment WHERE kind = 'draft'"))
    revision = Rows(table)[row]
    original = queue.log.read(0, 0, 1)[0]
    assert (revision.key, revision.headers, revision.timestamp_ms, revision.pos) == (
        original.key,
        original.headers,
        original.timestamp_ms,
        original.pos,
    )
    assert json.loads(revision.value or b"") == {"order": 1, "card": SECRET, "currency": "EUR"}
    assert (about["repair"], about["patch"]) == (1, ADD.sha)
    kept, sha = queue.one("SELECT uri, sha256 FROM segment WHERE kind = 'intake'")
    assert Rows(drain.archive.verified(kept, sha)[0])[0].value == order(1)


def test_a_value_the_patch_leaves_as_it_is_is_no_draft(queue: MemoryRig) -> None:
    drain = waiting(queue, 4)
    put(queue, 6, currency="EUR")
    queue.take(drain)
    queue.write("UPDATE entry SET reason = 'waiting_for_person'")
    made = make(queue)
    assert (made.drafted, made.unchanged) == (4, 6)


def test_a_repair_that_nothing_took_is_not_offered_and_says_why(queue: MemoryRig) -> None:
    drain = waiting(queue, 4)
    made = make(queue, Patch(b'[{"op": "remove", "path": "/nowhere"}]'))
    assert (made.drafted, made.hash) == (0, None)
    assert made.failed == Counter({"operation 1 (remove /nowhere): there is no such place": 4})
    assert [p["subject"].split()[0] for p in proposals(drain, queue.config.name)] == []
    file_work(drain)
    assert queue.reasons() == {"repair_failed": 4}
    assert make(queue).drafted == 4, "they can be repaired by another"


def test_what_a_later_repair_could_mend_is_not_called_failed(queue: MemoryRig) -> None:
    drain = waiting(queue, 4)
    make(queue, Patch(b'[{"op": "remove", "path": "/nowhere"}]'))
    make(queue)
    file_work(drain)
    assert queue.reasons() == {"waiting_for_person": 4}


# Approval


def test_what_changed_since_it_was_looked_at_is_refused(queue: MemoryRig) -> None:
    drain = waiting(queue, 5)
    made = make(queue)
    queue.write("UPDATE entry SET state = 'discarded', settled_drain = :d WHERE id = 1", d=drain.id)
    refused = {f"repair {made.id}": {"choice": "replay", "hash": made.hash or ""}}
    assert "changed since" in apply_review(drain, refused, "bob", 5)["refused"][0]
    assert queue.delivered() == []
    for wrong in ("discard", "x"):
        (now,) = [p for p in proposals(drain, queue.config.name) if p["subject"] == f"repair {made.id}"]
        assert apply_review(drain, {now["subject"]: {"choice": wrong, "hash": now["hash"]}}, "bob", 5)[
            "refused"
        ]


def test_leaving_a_repair_leaves_it_to_be_decided(queue: MemoryRig) -> None:
    drain = waiting(queue, 5)
    made = make(queue)
    left = apply_review(drain, {f"repair {made.id}": {"choice": "leave", "hash": made.hash or ""}}, "bob", 5)
    assert (left["left"], left["replayed"]) == (5, 0)
    queue.consumer(strict)
    assert approve(queue, drain, made)["confirmed"] == 5


def test_what_is_repaired_is_neither_sent_as_it_was_nor_discarded(queue: MemoryRig) -> None:
    drain = waiting(queue, 30)
    file_work(drain)
    made = make(queue, chosen=Selection(entries=tuple(f"0/{n}" for n in range(15))))
    offered = {p["subject"]: p["hash"] for p in proposals(drain, queue.config.name)}
    assert len(offered) == 2
    queue.consumer(strict)
    choices = {
        s: {"choice": "discard" if s.startswith("work") else "replay", "hash": h} for s, h in offered.items()
    }
    done = apply_review(drain, choices, "bob", 20)
    assert (done["confirmed"], done["discarded"], done["refused"]) == (15, 15, [])
    assert made.id is not None
    queue.check()


def test_an_edit_after_the_repair_is_the_one_that_counts(queue: MemoryRig) -> None:
    drain = waiting(queue, 3)
    made = make(queue)
    edited = drafts.edit(queue.config, "0/0", order(0, currency="USD"), "eve", Connection)
    offered = {p["subject"]: p for p in proposals(drain, queue.config.name)}
    assert sorted(offered) == [f"draft {edited.id}", f"repair {made.id}"]
    assert offered[f"repair {made.id}"]["count"] == 2
    assert offered[f"repair {made.id}"]["hash"] != made.hash
    queue.consumer(strict)
    both = {s: {"choice": "replay", "hash": p["hash"]} for s, p in offered.items()}
    assert apply_review(drain, both, "bob", 20)["confirmed"] == 3
    sent = Counter(json.loads(r.value or b"")["currency"] for r in queue.delivered())
    assert sent == {"USD": 1, "EUR": 2}
    queue.check()


def test_a_review_that_died_after_its_plan_goes_on_and_doubles_nothing(
    queue: MemoryRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Died(Exception):
        pass

    drain = waiting(queue, 60)
    made = make(queue)
    queue.consumer(strict)
    run, ran = review.replay_now.__globals__["run_job"], []

    def die(*arguments: Any) -> Any:
        if ran:
            raise Died
        ran.append(run(*arguments))
        return ran[-1]

    with monkeypatch.context() as patched:
        patched.setattr("dlq.replay.run_job", die)
        with pytest.raises(Died):
            approve(queue, drain, made)
    assert queue.states() == {"confirmed": 26, "planned": 34}
    again = {f"repair {made.id}": {"choice": "replay", "hash": made.hash or ""}}
    assert apply_review(queue.attach(), again, "bob", 20)["refused"] == []
    assert queue.states() == {"confirmed": 60}
    queue.check()


# What goes wrong


def test_a_repair_that_died_while_it_was_written_never_counts(
    queue: MemoryRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    drain = waiting(queue, 5)
    put(queue, 5)
    queue.take(drain)
    queue.write("UPDATE entry SET reason = 'waiting_for_person'")
    store, calls = drafts.store, []

    def dies(*arguments: Any, **how: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise ArchiveError("the disk is full")
        return store(*arguments, **how)

    with monkeypatch.context() as patched:
        patched.setattr(drafts, "store", dies)
        with pytest.raises(ArchiveError, match="disk is full"):
            make(queue)
    assert queue.one("SELECT COUNT(*) FROM draft") == 5
    assert proposals(drain, queue.config.name) == []
    assert history(queue.ledger, queue.config.name, "0/0")["drafts"] == []
    made = make(queue)
    assert made.drafted == 10
    queue.consumer(strict)
    assert approve(queue, drain, made)["confirmed"] == 10


def test_a_broken_segment_costs_its_entries_and_stops_nothing(queue: MemoryRig) -> None:
    drain = waiting(queue, 5)
    put(queue, 7)
    queue.take(drain)
    queue.write("UPDATE entry SET reason = 'waiting_for_person'")
    uri = queue.one("SELECT uri FROM segment ORDER BY id LIMIT 1")
    path = queue.folder / "archive" / queue.config.name / uri
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    made = make(queue)
    assert (made.drafted, made.failed.total()) == (7, 5)
    assert "other bytes" in next(iter(made.failed))


def test_many_small_segments_are_read_one_at_a_time(
    queue: MemoryRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    drain = queue.open("r1")
    for _ in range(12):
        put(queue, 3)
        queue.take(drain)
    queue.write("UPDATE entry SET reason = 'waiting_for_person'")
    steps: list[tuple[int, int]] = []
    held: list[weakref.ref[Any]] = []
    most = 0
    verified = Archive.verified

    def watched(self: Archive, *arguments: Any) -> Any:
        nonlocal most
        table, about = verified(self, *arguments)
        held.append(weakref.ref(table))
        most = max(most, sum(ref() is not None for ref in held))
        return table, about

    monkeypatch.setattr(Archive, "verified", watched)
    made = make(queue, progress=lambda done, of: steps.append((done, of)))
    assert made.drafted == 36
    assert steps == [(3 * n, 36) for n in range(1, 13)]
    assert queue.one("SELECT COUNT(*) FROM segment WHERE kind = 'draft'") == 12
    assert most == 1, "a segment is let go before the next is read"


def test_reasons_are_counted_apart_only_so_far(queue: MemoryRig) -> None:
    """Any dead letter may name a schema of its own."""
    for n in range(130):
        queue.put(1, "DataCorruption", value=avro(n, 1))
    queue.taken()
    made = make(queue, dry_run=True)
    assert made.failed.total() == 130
    assert len(made.failed) == 101
    assert made.failed["other reasons"] == 30


# Through a schema registry

ORDER = {
    "type": "record",
    "name": "Order",
    "fields": [
        {"name": "order", "type": "int"},
        {"name": "currency", "type": ["null", "string"], "default": None},
        {"name": "price", "type": {"type": "bytes", "logicalType": "decimal", "precision": 4, "scale": 2}},
    ],
}
NAMED = Patch(
    b'[{"op": "test", "path": "/currency", "value": null}, {"op": "replace", "path": "/currency", "value": "EUR"}]'
)


@pytest.fixture
def double() -> Iterator[RegistryDouble]:
    with RegistryDouble() as running:
        yield running


@pytest.fixture
def framed(make_queue: Make, double: RegistryDouble) -> tuple[MemoryRig, int]:
    """A queue with a registry, and the id of a schema in it."""
    rig = make_queue(schema_registry={"connection": "registry"})
    rig.begin()
    return rig, double.add(ORDER)


def avro(schema: int, n: int, currency: str | None = None) -> bytes:
    stream = BytesIO()
    bare = {**ORDER, "fields": [*ORDER["fields"][:2], {"name": "price", "type": "bytes"}]}
    fastavro.schemaless_writer(stream, bare, {"order": n, "currency": currency, "price": b"\x0f\xff"})
    return b"\0" + schema.to_bytes(4, "big") + stream.getvalue()


def test_avro_is_repaired_with_its_schema_and_what_the_schema_refuses_stays_open(
    framed: tuple[MemoryRig, int], double: RegistryDouble
) -> None:
    rig, schema = framed
    for n in range(40):
        rig.put(1, "DataCorruption", value=avro(schema, n))
    rig.put(1, "DataCorruption", value=avro(schema, 1, "USD"))  # the test operation spares it
    rig.put(1, "DataCorruption", value=avro(9_999, 1))
    rig.put(1, "DataCorruption", value=gzip.compress(avro(schema, 40)))
    drain = rig.taken()
    made = make(rig, NAMED, connections=lambda _: double.connection)
    assert made.drafted == 41
    assert sorted(why.split(":")[0] for why in made.failed) == ["operation 1 (test /currency)", "schema 9999"]
    assert made.sample[0].encoding == f"avro (schema {schema})"
    rig.consumer()
    assert approve(rig, drain, made)["confirmed"] == 41
    assert rig.reasons() == {"repair_failed": 2}
    registry = SchemaRegistry.connect(double.connection)
    documents = [decode(r.value, (), registry).document for r in rig.delivered()]
    registry.close()
    assert sorted(d["order"] for d in documents) == list(range(41))
    assert {(d["currency"], d["price"]) for d in documents} == {("EUR", "\x0fÿ")}

    wrong = make(
        rig,
        Patch(b'[{"op": "add", "path": "/currency", "value": 5}]'),
        connections=lambda _: double.connection,
    )
    assert (wrong.drafted, wrong.hash) == (0, None)
    assert any("Avro schema refuses /currency" in why for why in wrong.failed)


def test_a_registry_that_does_not_answer_is_no_entry_s_fault(
    framed: tuple[MemoryRig, int], double: RegistryDouble
) -> None:
    rig, schema = framed
    rig.put(5, "DataCorruption", value=avro(schema, 1))
    drain = rig.taken()
    double.broken = 503
    with pytest.raises(RegistryError, match="503"):
        make(rig, NAMED, connections=lambda _: double.connection)
    assert rig.rows("SELECT * FROM repair_failure") == []
    assert proposals(drain, rig.config.name) == []
    double.broken = None
    assert make(rig, NAMED, connections=lambda _: double.connection).drafted == 5


def test_an_explanation_says_how_the_value_is_encoded_and_whether_it_can_be_read(
    framed: tuple[MemoryRig, int], double: RegistryDouble
) -> None:
    rig, schema = framed
    for value in (gzip.compress(avro(schema, 1)), avro(schema, 1)[:-1], order(1)):
        rig.put(1, "DataCorruption", part=0, value=value)
    drain = rig.taken()

    def told(offset: int) -> str:
        found = history(rig.ledger, rig.config.name, f"0/{offset}")
        return encoding(rig.config, found["archive"], lambda _: double.connection)

    assert told(0) == f"gzip, avro (schema {schema})"
    assert told(1) == "not read: the value is no Avro of its schema"
    assert told(2) == "json"
    for path in (drain.archive.root / "segments").rglob("*.parquet"):
        path.unlink()
    assert told(2).startswith("not read: archive")


def test_without_a_registry_a_framed_value_says_what_is_missing(queue: MemoryRig) -> None:
    queue.put(2, "DataCorruption", value=avro(3, 1))
    queue.taken()
    made = make(queue, NAMED)
    assert "name its Connection as schema_registry" in next(iter(made.failed))


# An edit is the case n = 1


def test_an_edit_of_a_framed_value_is_a_document_or_the_value_whole(
    framed: tuple[MemoryRig, int], double: RegistryDouble
) -> None:
    rig, schema = framed
    rig.put(1, "DataCorruption", part=0, value=avro(schema, 7))
    drain = rig.taken()

    def edit(value: bytes) -> bytes | None:
        drafts.edit(rig.config, "0/0", value, "ada", lambda _: double.connection)
        uri, row = rig.rows(
            "SELECT s.uri, d.row_no FROM draft d JOIN segment s ON s.id = d.segment ORDER BY d.id"
        )[-1]
        return Rows(drain.archive.read(uri))[row].value

    assert edit(b'{"order": 7, "currency": "EUR", "price": "\\u000f\\u00ff"}') == avro(schema, 7, "EUR")
    assert edit(avro(schema, 7, "USD")) == avro(schema, 7, "USD")
    for wrong, why in (
        (b'{"order": "7", "currency": "EUR", "price": ""}', "refuses /order"),
        (b'{"order": 7, "currency": "EUR"}', "price is missing"),
        (avro(schema, 7)[:-1], "neither such a value nor a document"),
        (avro(schema + 1, 7), "neither such a value nor a document"),
        (b"order 7", "neither such a value nor a document"),
    ):
        with pytest.raises((CodecError, Refused), match=why):
            edit(wrong)


def test_an_edit_given_whole_is_checked_against_its_json_schema(
    framed: tuple[MemoryRig, int], double: RegistryDouble
) -> None:
    rig, _ = framed
    schema = double.add({"type": "object", "required": ["currency"]}, "JSON")
    prefix = b"\0" + schema.to_bytes(4, "big")
    rig.put(1, "DataCorruption", part=0, value=prefix + b'{"order": 1}')
    rig.taken()
    for wrong in (prefix + b'{"order": 2}', b'{"order": 2}'):
        with pytest.raises(CodecError, match="refuses the document: /required"):
            drafts.edit(rig.config, "0/0", wrong, "ada", lambda _: double.connection)
    right = prefix + b'{"order": 2, "currency": "EUR"}'
    for given in (right, right[5:]):
        assert drafts.edit(rig.config, "0/0", given, "ada", lambda _: double.connection).size == len(right)


def test_an_edit_of_a_compressed_value_is_compressed_again(queue: MemoryRig) -> None:
    queue.put(1, "DataCorruption", part=0, value=gzip.compress(order(1)))
    drain = queue.taken()
    drafts.edit(queue.config, "0/0", order(2), "ada", Connection)
    value = Rows(drain.archive.read(queue.one("SELECT uri FROM segment WHERE kind = 'draft'")))[0].value
    assert gzip.decompress(value or b"") == order(2)
    assert queue.one("SELECT payload_sha FROM draft") == payload_sha(b"k0", value)


def test_an_entry_that_can_not_be_read_is_edited_whole_in_its_frame(
    framed: tuple[MemoryRig, int], double: RegistryDouble
) -> None:
    rig, schema = framed
    rig.put(1, "DataCorruption", part=0, value=avro(schema, 7)[:-1])
    rig.put(1, "DataCorruption", part=0, value=gzip.compress(order(1))[:-3])
    rig.taken()

    def edit(place: str, value: bytes) -> drafts.Draft:
        return drafts.edit(rig.config, place, value, "ada", lambda _: double.connection)

    with pytest.raises(Refused, match="whole value in the same frame"):
        edit("0/0", b'{"order": 7}')
    with pytest.raises(CodecError, match="no Avro"):
        edit("0/0", avro(schema, 7)[:-2])
    assert edit("0/0", avro(schema, 8)).size == len(avro(schema, 8))
    assert edit("0/1", b"anything").size == 8, "nothing can be said of what is broken outside in"


def test_json_may_be_replaced_by_anything_a_person_writes(queue: MemoryRig) -> None:
    waiting(queue, 1)
    assert drafts.edit(queue.config, "0/0", b"no json at all", "ada", Connection).size == 14


def test_the_repair_s_own_look_at_the_ledger_holds_up_no_writer(queue: MemoryRig) -> None:
    """It reads in one long look, and writes its drafts beside it; so may others."""
    drain = waiting(queue, 5)
    with queue.ledger.read() as tx:
        assert len(tx.execute(select(entry.c.id)).all()) == 5
        made = make(queue)
        drain.note("test", "somebody else writes")
        assert tx.execute(text("SELECT COUNT(*) FROM draft")).scalar_one() == 0
    assert made.drafted == 5
