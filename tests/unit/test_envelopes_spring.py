"""Spring's dead letters, header by header as spring-kafka 3.3 wrote them to a real broker."""

from __future__ import annotations

import pytest
from tests.letters import (
    DEAD_MS,
    SENT_MS,
    TRACE,
    Pairs,
    be32,
    be64,
    differences,
    failure,
    kafka,
    origin,
    with_header,
)

from dlq.envelopes import decode

WRAPPER = "org.springframework.kafka.listener.ListenerExecutionFailedException"
TRACE_TEXT = f"""{WRAPPER}: Listener failed
\tat org.springframework.kafka.listener.KafkaMessageListenerContainer.run(KafkaMessageListenerContainer.java:2998)
\tSuppressed: java.io.IOException: while closing
\t\tat ours.Closer.close(Closer.java:3)
\tCaused by: java.lang.Error: of the suppressed
Caused by: java.lang.IllegalStateException: bad v1
\tat ours.Billing.charge(Billing.java:31)
Caused by: java.util.concurrent.TimeoutException: no answer
\tat ours.Client.call(Client.java:12)
\t... 31 more
"""


def dead_letter(prefix: str = "kafka_dlt-", group: str = "kafka_dlt-original-consumer-group") -> Pairs:
    return (
        ("correlation-id", "c-1"),
        ("traceparent", f"00-{TRACE}-00f067aa0ba902b7-01"),
        ("kafka_deliveryAttempt", be32(3)),
        (f"{prefix}exception-fqcn", WRAPPER),
        (f"{prefix}exception-cause-fqcn", "java.lang.IllegalStateException"),
        (f"{prefix}exception-message", "Listener failed; bad v1"),
        (f"{prefix}exception-stacktrace", TRACE_TEXT),
        (f"{prefix}original-topic", "orders"),
        (f"{prefix}original-partition", be32(1)),
        (f"{prefix}original-offset", be64(42)),
        (f"{prefix}original-timestamp", be64(SENT_MS)),
        (f"{prefix}original-timestamp-type", "CreateTime"),
        (group, "billing"),
    )


def test_a_dead_letter_topics_headers_are_understood() -> None:
    u = decode(kafka(*dead_letter()))
    assert u.format == "spring-kafka"
    assert failure(u) == (
        WRAPPER,
        "java.lang.IllegalStateException",
        "Listener failed; bad v1",
        "billing",
        None,
        3,
    )
    assert origin(u) == ("orders", None, 1, 42, SENT_MS)
    assert (u.origin, u.failed_at_ms) == ("orders/1/42@billing", DEAD_MS)
    assert (u.correlation_id, u.trace_id) == ("c-1", TRACE)
    assert u.causes == ("java.lang.IllegalStateException", "java.util.concurrent.TimeoutException")


def test_retry_topics_write_other_names_and_one_attempt_too_many() -> None:
    headers = dead_letter("kafka_")[:2] + dead_letter("kafka_")[3:]
    retries: Pairs = (
        ("retry_topic-original-timestamp", SENT_MS.to_bytes(6, "big")),
        ("retry_topic-attempts", be32(2)),
        ("retry_topic-backoff-timestamp", (SENT_MS + 100).to_bytes(6, "big")),
        ("retry_topic-original-timestamp", SENT_MS.to_bytes(6, "big")),
        ("retry_topic-attempts", be32(4)),
        ("retry_topic-backoff-timestamp", (SENT_MS + 300).to_bytes(6, "big")),
    )
    u = decode(kafka(*headers, *retries))
    assert u.format == "spring-retry-topic"
    assert failure(u) == (
        WRAPPER,
        "java.lang.IllegalStateException",
        "Listener failed; bad v1",
        "billing",
        None,
        3,
    )
    assert origin(u) == ("orders", None, 1, 42, SENT_MS)


@pytest.mark.parametrize(
    ("raw", "attempts"),
    [
        (be32(1), 0),
        (b"\x04", 3),
        (b"\xff", 254),
        (b"\x00\x04", None),
        (b"", None),
        (None, None),
        (be32(-1), None),
    ],
)
def test_attempts_of_retry_topics_are_four_bytes_and_were_one(
    raw: bytes | None, attempts: int | None
) -> None:
    assert decode(kafka(("retry_topic-attempts", raw))).attempts == attempts


@pytest.mark.parametrize(
    ("raw", "ms"),
    [
        (SENT_MS.to_bytes(6, "big"), SENT_MS),
        (b"\x01", 1),
        (b"\xff", None),
        (b"\x00" * 9, None),
        (b"", None),
        (str(SENT_MS).encode(), None),
    ],
)
def test_times_of_retry_topics_are_of_variable_length(raw: bytes, ms: int | None) -> None:
    assert decode(kafka(("retry_topic-original-timestamp", raw))).origin_timestamp_ms == ms


def test_of_a_retry_topics_repeated_times_the_last_counts() -> None:
    first, last = (1_764_000_000_000).to_bytes(6, "big"), (1_764_000_100_000).to_bytes(6, "big")
    times = (("retry_topic-original-timestamp", first), ("retry_topic-original-timestamp", last))
    u = decode(kafka(("kafka_original-topic", b"orders"), *times))
    assert u.origin_timestamp_ms == 1_764_000_100_000


def test_the_cloud_stream_binder_names_no_cause_so_the_trace_does() -> None:
    u = decode(
        kafka(
            ("x-original-topic", "orders"),
            ("x-original-partition", be32(2)),
            ("x-original-offset", be64(5)),
            ("x-original-timestamp", be64(SENT_MS)),
            ("x-original-timestamp-type", "CreateTime"),
            ("x-exception-fqcn", "org.springframework.messaging.MessageHandlingException"),
            ("x-exception-message", "error occurred in message handler"),
            ("x-exception-stacktrace", TRACE_TEXT),
        )
    )
    assert u.format == "spring-cloud-stream"
    assert (u.error_type, u.cause_type) == (
        "org.springframework.messaging.MessageHandlingException",
        "java.util.concurrent.TimeoutException",
    )
    assert origin(u) == ("orders", None, 2, 5, SENT_MS)


def test_through_two_hops_the_first_origin_and_the_last_exception_count() -> None:
    second: Pairs = (
        ("kafka_deliveryAttempt", be32(5)),
        ("kafka_dlt-exception-fqcn", "java.lang.IllegalArgumentException"),
        ("kafka_dlt-exception-cause-fqcn", "java.lang.IllegalArgumentException"),
        ("kafka_dlt-exception-message", "again"),
        ("kafka_dlt-original-topic", "orders-dlt"),
        ("kafka_dlt-original-partition", be32(0)),
        ("kafka_dlt-original-offset", be64(9)),
        ("kafka_dlt-original-timestamp", be64(DEAD_MS)),
        ("kafka_dlt-original-consumer-group", "second"),
    )
    u = decode(kafka(*dead_letter(), *second))
    assert (u.error_type, u.message, u.attempts, u.component) == (
        "java.lang.IllegalArgumentException",
        "again",
        5,
        "second",
    )
    assert u.origin == "orders/1/42@billing"
    assert u.origin_timestamp_ms == SENT_MS


def test_of_a_key_that_cannot_be_read_the_keys_exception_counts() -> None:
    error = "org.springframework.kafka.support.serializer.DeserializationException"
    u = decode(
        kafka(
            ("kafka_dlt-key-exception-fqcn", error),
            ("kafka_dlt-exception-cause-fqcn", error),
            ("kafka_dlt-key-exception-message", "failed to deserialize"),
            (
                "kafka_dlt-key-exception-stacktrace",
                f"{error}: failed\n\tat x\nCaused by: org.apache.kafka.common.errors.SerializationException: size 6",
            ),
        )
    )
    assert failure(u)[:3] == (error, error, "failed to deserialize")
    assert u.causes == ("org.apache.kafka.common.errors.SerializationException",)


def test_where_the_named_cause_is_a_wrapper_the_trace_has_the_one_that_tells() -> None:
    """A client of java.net.http that is refused: the deepest exception says less than the one above it."""
    stack = f"""{WRAPPER}: Listener failed
Caused by: java.lang.RuntimeException: call failed
Caused by: java.net.ConnectException
Caused by: java.net.ConnectException
Caused by: java.nio.channels.ClosedChannelException
"""
    record = with_header(
        kafka(*dead_letter()), "kafka_dlt-exception-cause-fqcn", b"java.lang.RuntimeException"
    )
    u = decode(with_header(record, "kafka_dlt-exception-stacktrace", stack.encode()))
    assert u.cause_type == "java.net.ConnectException"


def test_a_null_message_is_not_an_empty_one() -> None:
    record = kafka(*dead_letter())
    assert decode(with_header(record, "kafka_dlt-exception-message", b"")).message == ""
    assert decode(with_header(record, "kafka_dlt-exception-message", None)).message is None


def test_what_java_serialized_is_never_read() -> None:
    serialized = b"\xac\xed\x00\x05sr\x00\x1fours.Gadget"
    u = decode(kafka(("springDeserializerExceptionValue", serialized), *dead_letter()))
    assert "Gadget" not in repr(u)


@pytest.mark.parametrize(
    ("name", "value", "field"),
    [
        ("kafka_dlt-original-partition", b"1", "origin_partition"),
        ("kafka_dlt-original-partition", be32(-1), "origin_partition"),
        ("kafka_dlt-original-offset", be32(42), "origin_offset"),
        ("kafka_dlt-original-offset", be64(-7), "origin_offset"),
        ("kafka_dlt-original-timestamp", be64(2**62), "origin_timestamp_ms"),
        ("kafka_dlt-original-topic", b"\x00orders", "origin_topic"),
        ("kafka_deliveryAttempt", b"3", "attempts"),
        ("kafka_dlt-exception-fqcn", None, "error_type"),
        ("correlation-id", b"", "correlation_id"),
    ],
)
def test_a_broken_header_costs_its_own_field_only(name: str, value: bytes | None, field: str) -> None:
    record = kafka(*dead_letter())
    assert differences(record, with_header(record, name, value)) == {field}
