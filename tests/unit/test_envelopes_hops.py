"""Letters that went through more than one convention, and what of their headers a replay keeps."""

from __future__ import annotations

import pytest
from tests.letters import Pairs, be32, be64, kafka

from dlq.envelopes import decode, survives

CONNECT: Pairs = (
    ("__connect.errors.topic", "orders"),
    ("__connect.errors.partition", "3"),
    ("__connect.errors.offset", "42"),
    ("__connect.errors.connector.name", "sink"),
    ("__connect.errors.exception.class.name", "org.apache.kafka.connect.errors.DataException"),
)


def spring(topic: str) -> Pairs:
    return (
        ("kafka_dlt-exception-fqcn", "ours.Repair"),
        ("kafka_dlt-original-topic", topic),
        ("kafka_dlt-original-partition", be32(0)),
        ("kafka_dlt-original-offset", be64(1)),
        ("kafka_dlt-original-consumer-group", "repair"),
    )


def smallrye(topic: str) -> Pairs:
    return (
        ("dead-letter-exception-class-name", "ours.Quarkus"),
        ("dead-letter-topic", topic),
        ("dead-letter-partition", "2"),
        ("dead-letter-offset", "5"),
    )


def test_the_latest_hops_failure_and_the_earliest_hops_origin_count() -> None:
    u = decode(kafka(("own", "1"), *CONNECT, *spring("orders.dlq")))
    assert (u.format, u.error_type, u.component) == ("spring-kafka", "ours.Repair", "repair")
    assert u.origin == "orders/3/42@connect-sink"
    u = decode(kafka(("own", "1"), *spring("orders"), *CONNECT))
    assert (u.format, u.error_type) == ("kafka-connect", "org.apache.kafka.connect.errors.DataException")
    assert u.origin == "orders/0/1@repair"


@pytest.mark.parametrize(
    ("letter", "latest", "origin"),
    [
        ((*smallrye("orders"), *spring("dead-letter-topic-orders")), "spring-kafka", "orders/2/5@"),
        ((*smallrye("orders-dlt"), *spring("orders")), "smallrye", "orders/0/1@repair"),
        ((*smallrye("orders.DLT"), *spring("orders")), "smallrye", "orders/0/1@repair"),
        ((*smallrye("a"), *spring("b")), "spring-kafka", "a/2/5@"),
    ],
)
def test_smallrye_writes_before_all_others_so_the_topics_tell_who_came_later(
    letter: Pairs, latest: str, origin: str
) -> None:
    u = decode(kafka(*letter))
    assert (u.format, u.origin) == (latest, origin)


def test_a_broken_origin_of_the_first_hop_leaves_the_next() -> None:
    u = decode(kafka(("__connect.errors.topic", "\x00"), *CONNECT[1:], *spring("orders.dlq")))
    assert (u.origin_topic, u.origin_partition) == ("orders.dlq", 0)


FAILURES = [
    "wf-error-type",
    "dlq",
    "dlq-retry-count",
    "kafka_dlt-original-topic",
    "kafka_dlt-exception-stacktrace",
    "kafka_dlt-key-exception-fqcn",
    "kafka_dlt-original-consumer-group",
    "kafka_original-offset",
    "kafka_exception-message",
    "kafka_key-exception-stacktrace",
    "kafka_deliveryAttempt",
    "retry_topic-attempts",
    "retry_topic-backoff-timestamp",
    "springDeserializerExceptionValue",
    "x-original-topic",
    "x-original-timestamp-type",
    "x-exception-stacktrace",
    "__connect.errors.exception.stacktrace",
    "__streams.errors.topic",
    "__dlq.errors.delivery.count",
    "dead-letter-reason",
    "dead-letter-cause-class-name",
    "delayed-retry-count",
    "MT-Reason",
    "MT-Fault-StackTrace",
    "NServiceBus.Retries",
    "NServiceBus.Retries.Timestamp",
    "NServiceBus.FailedQ",
    "NServiceBus.TimeOfFailure",
    "NServiceBus.ExceptionInfo.Data.Message type",
    "ce_knativeerrordest",
    "ce-knativeerrordata",
    "knativeerrorcode",
    "x-death",
    "x-first-death-reason",
    "x-last-death-queue",
    "DeadLetterReason",
    "DeadLetterErrorDescription",
    "CloudPubSubDeadLetterSourceDeliveryCount",
    "REAL_TOPIC",
    "RECONSUMETIMES",
    "ORIGIN_MESSAGE_ID",
    "ErrorCode",
    "ErrorMessage",
    "RULE_ARN",
    "EXHAUSTED_RETRY_CONDITION",
    "SCHEDULE_ARN",
    "IS_PAYLOAD_TRUNCATED",
]
OWN = [
    "traceparent",
    "tracestate",
    "b3",
    "x-datadog-trace-id",
    "correlation-id",
    "kafka_correlationId",
    "kafka_replyTopic",
    "dedupe-key",
    "idempotency-key",
    "retry-count",
    "content-type",
    "ce_id",
    "ce_source",
    "ce_specversion",
    "__TypeId__",
    "__value_schema_id",
    "__key_schema_id",
    "NServiceBus.MessageId",
    "NServiceBus.CorrelationId",
    "NServiceBus.EnclosedMessageTypes",
    "MT-MessageType",
    "RequestID",
    "ExtendedPayloadSize",
    "dead-letter-office",
    "x-original-url",
    "wfx",
]


@pytest.mark.parametrize("name", FAILURES)
def test_what_tells_of_a_failure_is_not_part_of_a_replay(name: str) -> None:
    assert not survives(name)


@pytest.mark.parametrize("name", OWN)
def test_what_is_the_records_own_is(name: str) -> None:
    assert survives(name)


def repeated(name: str, kind: str) -> tuple[tuple[str, bytes], tuple[str, bytes], object, object]:
    """A header twice, with other values, and what each of them alone is read as."""
    one, other = {
        "text": (b"a.First", b"a.Second"),
        "decimal": (b"1", b"2"),
        "int": (be32(1), be32(2)),
        "long": (be64(1), be64(2)),
    }[kind]
    read = (1, 2) if kind != "text" else ("a.First", "a.Second")
    return (name, one), (name, other), *read


@pytest.mark.parametrize(
    ("name", "kind", "field", "which"),
    [
        *(
            (f"{prefix}{name}", kind, field, which)
            for prefix in ("kafka_dlt-", "kafka_", "x-")
            for name, kind, field, which in (
                ("original-topic", "text", "origin_topic", "first"),
                ("original-partition", "int", "origin_partition", "first"),
                ("original-offset", "long", "origin_offset", "first"),
                ("original-timestamp", "long", "origin_timestamp_ms", "first"),
                ("exception-fqcn", "text", "error_type", "last"),
                ("exception-cause-fqcn", "text", "cause_type", "last"),
                ("exception-message", "text", "message", "last"),
            )
        ),
        ("__connect.errors.topic", "text", "origin_topic", "first"),
        ("__connect.errors.partition", "decimal", "origin_partition", "first"),
        ("__connect.errors.offset", "decimal", "origin_offset", "first"),
        ("__connect.errors.exception.class.name", "text", "error_type", "last"),
        ("__connect.errors.exception.message", "text", "message", "last"),
        ("__connect.errors.stage", "text", "stage", "last"),
        ("__streams.errors.topic", "text", "origin_topic", "first"),
        ("__streams.errors.partition", "decimal", "origin_partition", "first"),
        ("__streams.errors.offset", "decimal", "origin_offset", "first"),
        ("__streams.errors.exception", "text", "error_type", "last"),
        ("__streams.errors.message", "text", "message", "last"),
        ("dead-letter-topic", "text", "origin_topic", "first"),
        ("dead-letter-partition", "decimal", "origin_partition", "first"),
        ("dead-letter-offset", "decimal", "origin_offset", "first"),
        ("dead-letter-exception-class-name", "text", "error_type", "first"),
        ("dead-letter-cause-class-name", "text", "cause_type", "first"),
        ("dead-letter-reason", "text", "message", "first"),
    ],
)
def test_which_of_a_repeated_header_counts_is_the_producers(
    name: str, kind: str, field: str, which: str
) -> None:
    one, other, first, last = repeated(name, kind)
    u = decode(kafka(one, other))
    assert getattr(u, field) == (first if which == "first" else last)
