"""Whatever a dead letter carries or claims, it ends replayed or open with the reason, and never holds up the others."""

from __future__ import annotations

import ctypes
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import confluent_kafka
import pytest
from tests.integration.rig import Rig, Seen, failure

from dlq.errors import ConfigError
from dlq.intake import take_custody
from dlq.replay import drain_remaining
from dlq.triage import inspect_sample

Headers = Sequence[tuple[str, bytes | None]]
NOISE = random.Random(7).randbytes(2_000_000)  # does not compress


class Letter(NamedTuple):
    name: str
    key: bytes | None
    value: bytes | None
    headers: Headers
    ends: str
    """The state it must end in, as :meth:`Rig.states` says it."""
    timestamp: int = 0


def failed(
    number: int, rig: Rig, error_type: str = "TransientNetwork", **changed: bytes | None
) -> list[tuple[str, bytes | None]]:
    """The failure's headers, some changed (``_`` for ``-``; None takes the header away)."""
    instead = {name.replace("_", "-"): value for name, value in changed.items()}
    kept = [
        (n, instead.get(n, v))
        for n, v in failure(number, error_type, topic=rig.origin)
        if instead.get(n, v) is not None
    ]
    return [*kept, *((n, v) for n, v in instead.items() if v is not None and n not in dict(kept))]


def drained(rig: Rig, letters: Sequence[Letter], among: int = 150) -> dict[str, str]:
    """Dead-letter ``letters`` among ordinary ones, drain, and say how each ended."""
    rig.begin()
    consumer = rig.consumer()
    rig.letters(among)
    places = [
        rig.produce(
            rig.dlq,
            [(one.key, one.value, one.headers)],
            **({"timestamp": one.timestamp} if one.timestamp else {}),
        )[0]
        for one in letters
    ]
    rig.letters(among)
    drain = rig.drain("r1")
    inspect_sample(drain)
    consumer.stop()
    rig.check_custody()
    rig.check_nothing_pending()
    rig.check_effects()
    by_place = {
        (e.part, int(e.place)): e
        for e in rig.sql("SELECT part, place, state, reason, correlation_id FROM entry")
    }
    ordinary = [e for place, e in by_place.items() if place not in places]
    assert len(ordinary) == 2 * among
    assert {e.state for e in ordinary} == {"confirmed"}, "hostile letters held up ordinary ones"
    ends = {one.name: by_place[place] for one, place in zip(letters, places, strict=True)}
    return {name: f"open:{e.reason}" if e.state == "open" else e.state for name, e in ends.items()}


def wanted(letters: Sequence[Letter]) -> dict[str, str]:
    return {one.name: one.ends for one in letters}


def test_hostile_payloads_and_headers_are_replayed_as_they_are_or_open_with_the_reason(
    make_rig: Callable[..., Rig],
) -> None:
    rig = make_rig(parts=3)
    n = iter(range(10_000, 20_000))

    def head(**changed: bytes | None) -> Headers:
        return failed(next(n), rig, **changed)

    letters = [
        Letter("empty value", b"k1", b"", head(), "confirmed"),
        Letter("null value", b"k2", None, head(), "confirmed"),
        Letter("null key", None, b"v", head(), "confirmed"),
        Letter("empty key", b"", b"v", head(), "confirmed"),
        Letter("null key and value", None, None, head(), "confirmed"),
        Letter("1 MB value", b"k3", NOISE[:1_000_000], head(), "confirmed"),
        Letter("key and value that are no UTF-8", b"\xff\xfe\x00", b"\x80\x81\x00\xc3(", head(), "confirmed"),
        Letter("a hundred repeats of a header", b"k4", b"v", [*head(), *[("h", b"%d" % i) for i in range(100)],
        ("h", None), ("h", b"")], "confirmed"),
        Letter("a 200 kB header", b"k5", b"v", [*head(), ("big", NOISE[:200_000])], "confirmed"),
        Letter("an empty header name", b"k6", b"v", [*head(), ("", b"v")], "confirmed"),
        Letter("header names with markup", b"k7", b"v", [*head(), ("<script>alert(1)</script>", b"v"),
        ("\u202eevil\x1b[31m", b"v")], "confirmed"),
        Letter("numbers that are none", b"k8", b"v", head(wf_attempts=b"three", wf_failed_at=b"yesterday",
        wf_origin_timestamp=b"\xff"), "confirmed"),
        Letter("an origin place that is none", b"k9", b"v", head(wf_origin_partition=b"-1",
        wf_origin_offset=b"9" * 30), "confirmed"),
        Letter("an origin place beyond a bigint", b"k10", b"v", head(wf_origin_partition=b"2147483648",
        wf_origin_offset=b"9223372036854775808"), "confirmed"),
        Letter("a null key and an origin partition that isn't", None, b"v", head(wf_origin_partition=b"77"),
        "confirmed"),
        Letter("a retry count that is none", b"k11", b"v", head(retry_count=b"\x00\x01"), "confirmed"),
        Letter("header values that are no UTF-8", b"k12", b"v", head(wf_error_message=b"\xff\xfe",
        wf_component=b"\x80", wf_stage=b"\xc3(", correlation_id=b"\xff" * 16), "confirmed"),
        Letter("NUL and control characters", b"k13", b"v", head(wf_error_message=b"a\x00b\x1b[2J\r\n",
        wf_component=b"c\x00d", correlation_id=b"x\x00y", dedupe_key=b"d\x00"), "confirmed"),
        Letter("a megabyte of message", b"k14", b"v", head(wf_error_message=b"<b>" * 200_000), "confirmed"),
        Letter("an endless correlation id", b"k15", b"v", head(correlation_id=b"c" * 100_000), "confirmed"),
        Letter("a trace parent that is none", b"k16", b"v", head(traceparent=b"00-zz-yy-01"), "confirmed"),
        Letter("null failure headers", b"k17", b"v", [*head(wf_error_message=None), ("wf-error-message", None),
        ("wf-stage", None)], "confirmed"),
        Letter("no headers", b"k18", b"v", [], "open:target_not_allowed"),
        Letter("no failure headers", b"k19", b"v", [("tenant", b"t")], "open:target_not_allowed"),
        Letter("an error type nobody knows", b"k20", b"v", failed(next(n), rig, "Flux"), "open:waiting_for_person"),
        Letter("no error type", b"k21", b"v", head(wf_error_type=None, wf_error_message=None),
        "open:waiting_for_person"),
        Letter("an error type that is no UTF-8", b"k22", b"v", head(wf_error_type=b"\xff\xfe",
        wf_error_message=None), "open:waiting_for_person"),
        Letter("replayed too often before", b"k23", b"v", head(retry_count=b"3"), "open:returns_limit"),
        Letter("a pickle", b"k24", b"cos\nsystem\n(S'false'\ntR.", head(), "confirmed"),
    ]  # fmt: skip
    assert drained(rig, letters) == wanted(letters)
    shown = " ".join(
        str(row) for row in rig.sql("SELECT correlation_id, dedupe_key, origin FROM entry")
    ) + str(rig.sql("SELECT * FROM grp"))
    assert not any(c in shown for c in "\x00\x1b\u202e"), (
        "control characters of a dead letter are kept where people look"
    )


def test_a_forged_origin_chooses_no_target(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig()
    outside = rig.another_topic("other")
    letters = [
        Letter(f"origin {topic[:20]}", b"k%d" % i, b"v", failed(20_000 + i, rig,
        wf_origin_topic=topic.encode()), "open:target_not_allowed")
        for i, topic in enumerate(
            [outside, rig.dlq, "__consumer_offsets", "__transaction_state", f"{rig.origin}-repartition", "",
            "..", "a/b", "x" * 300, rig.origin.upper(), f"{rig.origin}\x00"]
        )
    ]  # fmt: skip
    letters.append(
        Letter(
            "two origins, the last counts",
            b"kk",
            b"v",
            [*failed(20_100, rig), ("wf-origin-topic", outside.encode())],
            "open:target_not_allowed",
        )
    )
    assert drained(rig, letters, among=20) == wanted(letters)
    assert rig.log(outside) == []


def test_what_cannot_be_produced_stays_open_with_the_reason_and_the_rest_goes(
    make_rig: Callable[..., Rig],
) -> None:
    now = int(time.time() * 1000)
    day = 86_400_000
    rig = make_rig(
        dlq_config={"message.timestamp.after.max.ms": str(1000 * day)},
        origin_config={
            "message.timestamp.before.max.ms": str(30 * day),
            "message.timestamp.after.max.ms": str(day),
        },
    )
    letters = [
        Letter("too large", b"k1", NOISE[:1_100_000], failed(30_000, rig), "open:too_large_for_the_target"),
        Letter(
            "just too large, by our headers",
            b"k2",
            NOISE[:1_048_100],
            failed(30_001, rig),
            "open:too_large_for_the_target",
        ),
        Letter("older than the target takes", b"k3", b"v", failed(30_002, rig), "confirmed", now - 365 * day),
        Letter(
            "older than half the target's retention",
            b"k4",
            b"v",
            failed(30_003, rig),
            "confirmed",
            now - 4 * day,
        ),
        Letter(
            "from the future",
            b"k5",
            b"v",
            failed(30_004, rig),
            "open:timestamp_refused_by_the_target",
            now + 300 * day,
        ),
        Letter(
            "too large too", b"k6", NOISE[:1_900_000], failed(30_005, rig), "open:too_large_for_the_target"
        ),
        Letter("at the epoch", b"k7", b"v", failed(30_006, rig), "confirmed", 1),
    ]
    assert drained(rig, letters) == wanted(letters)
    sent = {s.key: s for s in rig.log(rig.origin) if s.key in (b"k3", b"k4", b"k7")}
    # such a timestamp would have retention delete the replay at once; what it was is in a header of ours
    assert all(abs(s.timestamp - now) < 600_000 for s in sent.values())
    assert {s.header("dlq-original-timestamp") for s in sent.values()} == {
        str(now - 365 * day),
        str(now - 4 * day),
        "1",
    }
    # the next drain tries none of them again by itself
    before = rig.states()
    rig.release(rig._drains[0])
    rig.drain("r2")
    assert rig.states() == before


def test_a_target_that_takes_small_batches_only_gets_them_all(make_rig: Callable[..., Rig]) -> None:
    """The limit is a batch's: what goes one by one may not go together."""
    rig = make_rig(origin_config={"max.message.bytes": "20000"})
    letters = [
        Letter(f"{i}", b"same", NOISE[i * 3_000 : i * 3_000 + 3_000], failed(40_000 + i, rig), "confirmed")
        for i in range(60)
    ]
    letters.insert(
        30, Letter("too large", b"same", NOISE[:21_000], failed(41_000, rig), "open:too_large_for_the_target")
    )
    assert drained(rig, letters, among=20) == wanted(letters)


def test_a_compacted_target_is_refused_unless_allowed(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(origin_config={"cleanup.policy": "compact"})
    with pytest.raises(ConfigError, match="allow_compacted"):
        rig.open()


def test_a_null_key_to_a_compacted_target_stays_open_and_the_rest_goes(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(origin_config={"cleanup.policy": "compact"}, target={"allow_compacted": True})
    letters = [
        Letter("null key", None, b"v", failed(50_000, rig), "open:record_refused_by_the_target"),
        Letter("another null key", None, b"v", failed(50_001, rig), "open:record_refused_by_the_target"),
        Letter("keyed", b"k", b"v", failed(50_002, rig), "confirmed"),
    ]
    assert drained(rig, letters, among=60) == wanted(letters)


def test_forged_claims_to_be_a_replay_of_ours_are_believed_only_for_the_same_payload(
    make_rig: Callable[..., Rig],
) -> None:
    rig = make_rig(parts=1)
    rig.begin()
    rig.consumer()
    rig.letters(4)
    first = rig.drain("r1")
    rig.release(first)
    assert rig.states() == {"confirmed": 4}
    job, key, value, offset = _sent(rig, 0)
    _, other_key, other_value, _ = _sent(rig, 1)
    forged = [
        (
            "claims a job that never was",
            b"n1",
            b"v",
            [*failed(60_000, rig), ("dlq-job", b"nobody.1"), ("dlq-ordinal", b"0")],
        ),
        (
            "claims an ordinal beyond the job",
            b"n2",
            b"v",
            [*failed(60_001, rig), ("dlq-job", job), ("dlq-ordinal", b"999999")],
        ),
        (
            "claims with numbers that are none",
            b"n3",
            b"v",
            [*failed(60_002, rig), ("dlq-job", b"\xff\xfe"), ("dlq-ordinal", b"-1")],
        ),
        (
            "claims an ordinal beyond a bigint",
            b"n4",
            b"v",
            [*failed(60_003, rig), ("dlq-job", job), ("dlq-ordinal", b"9" * 40)],
        ),
        (
            "claims another's place with another payload",
            b"n5",
            b"evil",
            [*failed(60_004, rig), ("dlq-job", job), ("dlq-ordinal", b"0")],
        ),
        (
            "names a replay's place with another payload",
            b"n6",
            b"evil",
            failed(60_005, rig, wf_origin_partition=b"0", wf_origin_offset=offset),
        ),
        (
            "claims another's place with that one's payload",
            key,
            value,
            [*failed(60_006, rig), ("dlq-job", job), ("dlq-ordinal", b"0")],
        ),
        (
            "wears all our headers",
            b"n7",
            b"v",
            [
                *failed(60_007, rig),
                ("dlq-drain", b"x"),
                ("dlq-entry", b"x"),
                ("dlq-key", b"x"),
                ("dlq-retry-count", b"0"),
            ],
        ),
        ("takes another's dedupe key with another payload", b"n8", b"evil", failed(2, rig)),
        ("takes another's dedupe key with that one's payload", other_key, other_value, failed(1, rig)),
    ]
    places = rig.produce(rig.dlq, [(key, value, headers) for _, key, value, headers in forged])
    rig.drain("r2")
    rig.check_custody()
    rig.check_nothing_pending()
    rig.check_effects()
    found = {
        (e.part, int(e.place)): e
        for e in rig.sql(
            "SELECT part, place, CASE state WHEN 'open' THEN 'open:' || reason ELSE state END AS state FROM entry"
        )
    }
    assert {name: found[place].state for (name, *_), place in zip(forged, places, strict=True)} == {
        "claims a job that never was": "confirmed",
        "claims an ordinal beyond the job": "confirmed",
        "claims with numbers that are none": "confirmed",
        "claims an ordinal beyond a bigint": "confirmed",
        "claims another's place with another payload": "open:conflict",
        "names a replay's place with another payload": "open:conflict",
        "claims another's place with that one's payload": "open:returned",
        "wears all our headers": "confirmed",
        "takes another's dedupe key with another payload": "open:conflict",
        "takes another's dedupe key with that one's payload": "duplicate",
    }
    # of the first four, only the one whose replay came back with its own payload is touched
    assert [
        e.state for e in rig.sql("SELECT state FROM entry WHERE taken_drain = :d ORDER BY id", d=first.id)
    ] == ["returned", *["confirmed"] * 3]


def test_a_forged_claim_on_what_is_not_sent_yet_settles_nothing(make_rig: Callable[..., Rig]) -> None:
    """The job's id can be guessed from any record replayed by it."""
    rig = make_rig(parts=1)
    rig.begin()
    rig.consumer()
    rig.letters(100)
    rig.worker("open:r1", "take", "categorize", "canary", "batches", die="committed:6").expect_killed()
    planned = rig.sql(
        "SELECT je.job, je.ordinal FROM job_entry je JOIN entry e ON e.id = je.entry AND e.job = je.job WHERE "
        "e.state = 'planned' ORDER BY 1, 2"
    )
    assert len(planned) > 10
    last = planned[-1]
    row = rig.sql(
        "SELECT e.place FROM job_entry je JOIN entry e ON e.id = je.entry WHERE je.job = :j AND je.ordinal = :o",
        j=last.job,
        o=last.ordinal,
    )[0]
    original = next(s for s in rig.log(rig.dlq) if s.offset == int(row.place))
    rig.produce(
        rig.dlq,
        [
            (
                original.key,
                original.value,
                [*failed(70_000, rig), ("dlq-job", last.job.encode()), ("dlq-ordinal", b"%d" % last.ordinal)],
            )
        ],
    )
    drain = rig.attach("r1")
    take_custody(drain, 30)
    rig.replay(drain)
    drain_remaining(drain, 30)
    rig.check_custody()
    rig.check_nothing_pending()
    rig.check_effects()
    # A dead letter can be in the queue before its replay's cursor is read, so such a claim may be true. Either way both
    # are accounted for: the one it names was sent, once, and the one that came waits as its return.
    assert rig.states() == {"confirmed": 99, "returned": 1, "open:returned": 1}


def test_header_names_the_client_cannot_represent_leave_the_entry_open(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(parts=1)
    rig.begin()
    rig.consumer()
    rig.letters(30)
    raw_produce(
        rig,
        b"key",
        b"value",
        [(n.encode(), v or b"") for n, v in failed(80_000, rig)] + [(b"\xff\xfe", b"v")],
    )
    rig.letters(30)
    rig.drain("r1")
    rig.check_custody()
    rig.check_nothing_pending()
    assert len(rig.check_effects()) == 60
    assert rig.states() == {"confirmed": 60, "open:unrepresentable_headers": 1}


def _sent(rig: Rig, number: int) -> tuple[bytes, bytes | None, bytes | None, bytes]:
    """Of the ``number``-th replay on the origin: its job, key, value and offset."""
    seen: Seen = sorted((s for s in rig.log(rig.origin) if s.header("dlq-job")), key=lambda s: s.offset)[
        number
    ]
    return (seen.header("dlq-job") or "").encode(), seen.key, seen.value, b"%d" % seen.offset


def raw_produce(rig: Rig, key: bytes, value: bytes, headers: Sequence[tuple[bytes, bytes]]) -> None:
    """Produce by librdkafka's C interface, which takes any bytes as a header's name (the Python one takes text)."""
    folder = Path(confluent_kafka.__file__).resolve().parent.parent / "confluent_kafka.libs"
    library = next(iter(folder.glob("librdkafka*")), None)
    if library is None:
        pytest.skip("this confluent-kafka has no librdkafka of its own to call")
    kafka = ctypes.CDLL(str(library))
    pointer = ctypes.c_void_p
    for name in ("rd_kafka_conf_new", "rd_kafka_new", "rd_kafka_headers_new"):
        getattr(kafka, name).restype = pointer
    said = ctypes.create_string_buffer(512)
    config = pointer(kafka.rd_kafka_conf_new())
    assert kafka.rd_kafka_conf_set(config, b"bootstrap.servers", rig.bootstrap.encode(), said, 512) == 0, (
        said.value
    )
    client = pointer(kafka.rd_kafka_new(0, config, said, 512))
    made = pointer(kafka.rd_kafka_headers_new(ctypes.c_size_t(len(headers))))
    for name, content in headers:
        assert (
            kafka.rd_kafka_header_add(
                made, name, ctypes.c_ssize_t(len(name)), content, ctypes.c_ssize_t(len(content))
            )
            == 0
        )
    topic, value_tag, key_tag, headers_tag, end = 1, 4, 5, 10, 0  # rd_kafka_vtype_t
    size = ctypes.c_size_t
    arguments = (
        topic,
        rig.dlq.encode(),
        value_tag,
        value,
        size(len(value)),
        key_tag,
        key,
        size(len(key)),
        headers_tag,
        made,
        end,
    )
    assert kafka.rd_kafka_producev(client, *arguments) == 0
    assert kafka.rd_kafka_flush(client, 10_000) == 0
    kafka.rd_kafka_destroy(client)
