from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlq.entry import Headers, Record
from dlq.envelopes import decode

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
FAILURE: Headers = (
    ("content-type", b"application/json"),
    ("correlation-id", b"wf-17"),
    ("traceparent", f"00-{TRACE}-00f067aa0ba902b7-01".encode()),
    ("dedupe-key", b"order-17"),
    ("retry-count", b"2"),
    ("wf-error-type", b"PluginTimeout"),
    ("wf-error-message", "no answer after 30 s (µ)".encode()),
    ("wf-component", b"payments.charge"),
    ("wf-stage", b"charge"),
    ("wf-attempts", b"4"),
    ("wf-failed-at", b"1764015660123"),
    ("wf-origin-topic", b"orders"),
    ("wf-origin-partition", b"3"),
    ("wf-origin-offset", b"42"),
    ("wf-origin-timestamp", b"1764015650000"),
    ("wf-consumer-group", b"orders-workers"),
    ("wf-stack-trace", b"Traceback"),
)


def letter(*headers: tuple[str, bytes | None], flaw: str | None = None) -> Record:
    return Record(0, "1", 1, b"key", b"value", headers, 0, flaw)


def with_header(name: str, value: bytes | None) -> Record:
    return letter(*((n, value if n == name else v) for n, v in FAILURE))


def test_the_orchestrators_headers_are_understood():
    u = decode(letter(*FAILURE))
    assert (u.format, u.error_type, u.cause_type) == ("orchestrator", "PluginTimeout", None)
    assert (u.message, u.component, u.stage) == ("no answer after 30 s (µ)", "payments.charge", "charge")
    assert (u.attempts, u.failed_at_ms) == (4, 1764015660123)
    assert u.origin == "orders/3/42@orders-workers"
    assert (u.origin_timestamp_ms, u.consumer_group) == (1764015650000, "orders-workers")
    assert (u.correlation_id, u.trace_id, u.dedupe_key, u.retry_count) == ("wf-17", TRACE, "order-17", 2)


def test_one_failure_header_is_enough_for_the_orchestrators_format():
    assert decode(letter(("wf-error-type", b"RateLimit"))).format == "orchestrator"
    assert decode(letter(("wf-colour", b"red"))).format == "unknown"


@pytest.mark.parametrize("record", [letter(), letter(flaw="unrepresentable_headers"), letter(("x", None))])
def test_a_record_that_says_nothing_is_unknown(record: Record):
    u = decode(record)
    assert u.format == "unknown"
    assert (u.error_type, u.message, u.correlation_id, u.origin, u.retry_count) == (None, None, None, None, 0)


def test_of_a_repeated_header_the_last_counts():
    u = decode(letter(*FAILURE, ("wf-error-type", b"RateLimit"), ("wf-origin-offset", b"43")))
    assert u.error_type == "RateLimit"
    assert u.origin == "orders/3/43@orders-workers"


@pytest.mark.parametrize(
    ("name", "value", "field"),
    [
        ("wf-attempts", b"four", "attempts"),
        ("wf-attempts", b"-1", "attempts"),
        ("wf-attempts", b"1_0", "attempts"),
        ("wf-attempts", "٤".encode(), "attempts"),
        ("wf-failed-at", b"99999999999999999", "failed_at_ms"),
        ("wf-origin-offset", b"9223372036854775808", "origin_offset"),
        ("wf-origin-offset", b"9" * 5000, "origin_offset"),
        ("wf-origin-partition", b"2147483648", "origin_partition"),
        ("wf-origin-topic", b"orders/../dlq", "origin_topic"),
        ("wf-origin-topic", b"t" * 250, "origin_topic"),
        ("wf-origin-topic", b"orders\n", "origin_topic"),
        ("wf-error-type", None, "error_type"),
        ("wf-error-type", b"\x00", "error_type"),
        ("traceparent", b"garbage", "trace_id"),
        ("correlation-id", b"", "correlation_id"),
        ("dedupe-key", None, "dedupe_key"),
    ],
)
def test_a_broken_header_costs_its_own_field_only(name: str, value: bytes | None, field: str):
    whole, broken = decode(letter(*FAILURE)), decode(with_header(name, value))
    differs = [f for f in whole.__struct_fields__ if getattr(whole, f) != getattr(broken, f)]
    assert differs == [field]
    assert getattr(broken, field) is None


def test_an_empty_message_is_not_a_missing_one():
    assert decode(with_header("wf-error-message", b"")).message == ""
    assert decode(with_header("wf-error-message", None)).message is None


def test_control_and_invisible_characters_go_and_bad_utf8_is_replaced():
    hostile = b"a\x00b\x1b[31mc\r\nd\xff\xed\xa0\x80 \xe2\x80\xaee"
    message = decode(with_header("wf-error-message", hostile)).message
    assert message is not None
    assert message.startswith("ab[31mc  d")
    assert message.endswith(" e")
    assert message.isprintable()
    message.encode()


def test_lengths_are_capped_before_anything_is_done_with_them():
    huge = "ä".encode() * 5_000_000
    began = time.perf_counter()
    u = decode(letter(*((n, huge) for n, _ in FAILURE)))
    assert time.perf_counter() - began < 30, "the work grows with what was cut off"
    assert u.message == "ä" * 2000
    assert u.error_type == "ä" * 200
    assert u.correlation_id is not None
    assert len(u.correlation_id) == 200


@pytest.mark.parametrize(
    "name",
    [
        "correlation-id",
        "Correlation-ID",
        "X-Correlation-Id",
        "correlationId",
        "correlation_id",
        "kafka_correlationId",
        "X-Request-ID",
        "ce_id",
    ],
)
def test_the_correlation_id_is_found_in_its_usual_spellings(name: str):
    assert decode(letter((name, b"wf-9"))).correlation_id == "wf-9"


def test_the_best_spelling_of_an_id_counts_and_a_broken_one_leaves_the_next():
    both = (("x-request-id", b"req"), ("correlation-id", b"wf"))
    assert decode(letter(*both)).correlation_id == "wf"
    assert decode(letter(("x-request-id", b"req"), ("correlation-id", b" "))).correlation_id == "req"


@pytest.mark.parametrize("name", ["dedupe-key", "idempotency-key", "Idempotency-Key"])
def test_a_dedupe_key_is_taken_from_its_own_headers(name: str):
    assert decode(letter((name, b"k"))).dedupe_key == "k"


def test_nothing_else_becomes_a_dedupe_key():
    u = decode(
        letter(("correlation-id", b"wf"), ("message-id", b"m"), ("x-request-id", b"r"), ("dlq-key", b"k"))
    )
    assert u.dedupe_key is None


def test_two_ids_never_become_one_by_being_cleaned_or_cut():
    raws = [
        b"k" * 300 + b"1",
        b"k" * 300 + b"2",
        b"k\x00",
        b"k",
        b"k\xe2\x80\x8b",
        b"\xff\xfe",
        b"\xff\xfd",
        b"\xff" * 150,
        b"\xfe" * 150,
    ]
    keys = [decode(letter(("dedupe-key", raw))).dedupe_key for raw in raws]
    assert len(set(keys)) == len(raws)
    assert all(key is not None and len(key) <= 200 and key.isprintable() for key in keys)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (f"00-{TRACE}-00f067aa0ba902b7-00", TRACE),
        (f"01-{TRACE}-00f067aa0ba902b7-01-later", TRACE),
        (f"00-{TRACE}-00f067aa0ba902b7-01-later", None),
        (f"ff-{TRACE}-00f067aa0ba902b7-01", None),
        (f"00-{TRACE.upper()}-00f067aa0ba902b7-01", None),
        (f"00-{'0' * 32}-00f067aa0ba902b7-01", None),
        (f"00-{TRACE}-{'0' * 16}-01", None),
        (f"00-{TRACE}-00f067aa0ba902b7", None),
        (f"00-{TRACE}-00f067aa0ba902b7-01\n", None),
    ],
)
def test_a_traceparent_is_validated_as_w3c_says(value: str, expected: str | None):
    assert decode(letter(("traceparent", value.encode()))).trace_id == expected


def test_our_retry_count_overrides_the_records_own():
    assert decode(letter(("dlq-retry-count", b"3"), ("retry-count", b"1"))).retry_count == 3
    assert decode(letter(("dlq-retry-count", b"many"), ("retry-count", b"1"))).retry_count == 1
    assert decode(letter(("retry-count", b"999999999999"))).retry_count == 0


_names = st.one_of(
    st.sampled_from([n for n, _ in FAILURE] + ["idempotency-key", "dlq-retry-count", "X-Correlation-Id"]),
    st.text(max_size=12),
)
_headers = st.lists(st.tuples(_names, st.one_of(st.none(), st.binary(max_size=300))), max_size=20)


@given(_headers)
def test_no_headers_can_make_it_raise_or_keep_what_postgres_cannot(headers: list[tuple[str, bytes | None]]):
    u = decode(letter(*headers))
    for field in u.__struct_fields__:
        value = getattr(u, field)
        if isinstance(value, str):
            value.encode()
            assert value.isprintable()
            assert len(value) <= (2000 if field == "message" else 249)
