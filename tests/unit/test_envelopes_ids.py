"""Trace ids of each propagator, retries, and a queue's own dedupe key."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.letters import TRACE, kafka, sqs

from dlq.envelopes import Envelopes, JsonPath, decode

SHORT = "a3ce929d0e0e4736"


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("b3", f"{TRACE}-00f067aa0ba902b7-1-05e3ac9a4f6e3b90", TRACE),
        ("b3", f"{SHORT}-00f067aa0ba902b7", SHORT.zfill(32)),
        ("b3", "0", None),
        ("B3", TRACE.upper(), TRACE),
        ("X-B3-TraceId", TRACE, TRACE),
        ("x-b3-traceid", SHORT, SHORT.zfill(32)),
        ("X-B3-TraceId", "0" * 32, None),
        ("X-B3-TraceId", TRACE[:20], None),
        ("X-Amzn-Trace-Id", f"Root=1-{TRACE[:8]}-{TRACE[8:]};Parent=53995c3f42cd8ad8;Sampled=1", TRACE),
        ("X-Amzn-Trace-Id", f"Self=1-0-0;Root=1-{TRACE[:8]}-{TRACE[8:]}", TRACE),
        ("AWSTraceHeader", f"Root=1-{TRACE[:8]}-{TRACE[8:]}", TRACE),
        ("X-Amzn-Trace-Id", f"Root=2-{TRACE[:8]}-{TRACE[8:]}", None),
        ("x-datadog-trace-id", str(int(SHORT, 16)), SHORT.zfill(32)),
        ("x-datadog-trace-id", "0", None),
        ("x-datadog-trace-id", str(2**64), None),
        ("x-datadog-trace-id", SHORT, None),
        ("ce_traceparent", f"00-{TRACE}-00f067aa0ba902b7-01", TRACE),
        ("b3", "", None),
        ("b3", None, None),
    ],
)
def test_each_propagators_trace_is_the_id_open_telemetry_knows_it_by(
    name: str, value: str | None, expected: str | None
) -> None:
    assert decode(kafka((name, value))).trace_id == expected


def test_datadogs_upper_half_lies_among_its_tags() -> None:
    tags = f"_dd.p.dm=-1,_dd.p.tid={TRACE[:16]}"
    assert (
        decode(kafka(("x-datadog-trace-id", str(int(TRACE[16:], 16))), ("x-datadog-tags", tags))).trace_id
        == TRACE
    )


def test_the_best_propagator_counts_and_a_broken_one_leaves_the_next() -> None:
    other = "f" * 32
    assert decode(kafka(("b3", other), ("traceparent", f"00-{TRACE}-00f067aa0ba902b7-01"))).trace_id == TRACE
    assert decode(kafka(("b3", other), ("traceparent", "broken"))).trace_id == other


def test_an_attribute_beats_the_queues_own_trace() -> None:
    system = {"AWSTraceHeader": f"Root=1-{'f' * 8}-{'f' * 24}"}
    assert decode(sqs("{}", {"traceparent": f"00-{TRACE}-00f067aa0ba902b7-01"}, system)).trace_id == TRACE
    assert decode(sqs("{}", {}, system)).trace_id == "f" * 32


@pytest.mark.parametrize(
    ("headers", "replays", "retries"),
    [
        ((), 0, None),
        ((("retry-count", "0"),), 0, 0),
        ((("Retry_Count", "2"),), 2, 2),
        ((("dlq-retry-count", "3"), ("retry-count", "1")), 3, 3),
        ((("x-retry-count", "4"),), 0, 4),
        ((("x-retry-count", "4"), ("retry-count", "1")), 1, 1),
        ((("MT-Fault-RetryCount", "5"),), 0, 5),
        ((("MT-Fault-RetryCount", "5"), ("retry-count", "1")), 1, 1),
        ((("retry-count", "many"),), 0, None),
    ],
)
def test_replays_are_counted_apart_from_a_producers_own_retries(
    headers: tuple[tuple[str, str], ...], replays: int, retries: int | None
) -> None:
    u = decode(kafka(*headers))
    assert (u.retry_count, u.retries) == (replays, retries)


ORDER = {
    "order": {"id": "o-1", "n": 7, "odd name": "x"},
    "lines": [{"sku": "s-1"}],
    "none": None,
    "yes": True,
}


@pytest.mark.parametrize(
    ("path", "key"),
    [
        ("$.order.id", "o-1"),
        ("$.order.n", "7"),
        ("$['order']['odd name']", "x"),
        ('$.lines[0]["sku"]', "s-1"),
        ("$.lines[1].sku", None),
        ("$.order", None),
        ("$.none", None),
        ("$.yes", None),
        ("$.missing.deep", None),
        ("$.order.id.deeper", None),
        ("$.lines.sku", None),
        ("$.order[0]", None),
    ],
)
def test_a_queues_dedupe_key_lies_at_its_path(path: str, key: str | None) -> None:
    envelopes = Envelopes(dedupe=JsonPath(path))
    assert envelopes.decode(kafka(value=json.dumps(ORDER).encode())).dedupe_key == key
    assert envelopes.decode(sqs(ORDER)).dedupe_key == key


@pytest.mark.parametrize("value", [None, b"", b"not json", b"[1]", b'"text"', b"\xff"])
def test_a_value_without_the_path_has_no_key(value: bytes | None) -> None:
    assert Envelopes(dedupe=JsonPath("$.order.id")).decode(kafka(value=value)).dedupe_key is None


def test_a_header_beats_the_path() -> None:
    letter = kafka(("dedupe-key", "header"), value=json.dumps(ORDER).encode())
    assert Envelopes(dedupe=JsonPath("$.order.id")).decode(letter).dedupe_key == "header"


@pytest.mark.parametrize(
    "path", ["", "$", "order.id", "$.", "$..id", "$.lines[*].sku", "$.a b", "$.a[-1]", "/order/id"]
)
def test_a_path_that_names_no_single_value_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match="names no single value; write it as"):
        JsonPath(path)


def test_recorded_letters_of_a_real_spring_are_understood() -> None:
    """Written by spring-kafka 3.3 through a real broker: two listeners, a retry topic, two deserializers."""
    from dlq.export import imported

    lines = (Path(__file__).parent / "recorded" / "spring-kafka.jsonl").read_bytes().splitlines()
    found = {
        (u.format, u.origin_topic, u.cause_type, u.attempts, u.origin)
        for u in map(decode, map(imported, lines))
    }
    error = "org.springframework.kafka.support.serializer.DeserializationException"
    assert found == {
        ("spring-retry-topic", "retried", "java.lang.IllegalStateException", 3, "retried/0/0@retrier"),
        ("spring-kafka", "orders", "java.lang.IllegalStateException", 3, "orders/1/0@billing"),
        ("spring-kafka", "orders", "java.net.ConnectException", 3, "orders/0/0@billing"),
        ("spring-kafka", "json", error, None, "json/0/0@json"),
        ("spring-kafka", "json", error, None, "json/1/0@json"),
    }
