"""The dead letters of Kafka itself (Connect, Streams, share groups) and of SmallRye."""

from __future__ import annotations

import pytest
from tests.letters import DEAD_MS, SENT_MS, Pairs, differences, failure, kafka, origin, with_header

from dlq.envelopes import decode

CONNECT: Pairs = (
    ("content-type", "application/json"),
    ("__connect.errors.topic", "orders"),
    ("__connect.errors.partition", "3"),
    ("__connect.errors.offset", "42"),
    ("__connect.errors.connector.name", "warehouse-sink"),
    ("__connect.errors.task.id", "0"),
    ("__connect.errors.stage", "VALUE_CONVERTER"),
    ("__connect.errors.class.name", "org.apache.kafka.connect.json.JsonConverter"),
    ("__connect.errors.exception.class.name", "org.apache.kafka.connect.errors.DataException"),
    (
        "__connect.errors.exception.message",
        "Converting byte[] to Kafka Connect data failed due to serialization error: ",
    ),
    (
        "__connect.errors.exception.stacktrace",
        "org.apache.kafka.connect.errors.DataException: Converting byte[] to Kafka Connect data failed\n"
        "\tat org.apache.kafka.connect.json.JsonConverter.toConnectData(JsonConverter.java:333)\n"
        "Caused by: org.apache.kafka.common.errors.SerializationException: java.io.EOFException\n"
        "Caused by: com.fasterxml.jackson.core.JsonParseException: Unexpected character ('x' (code 120))\n"
        " at [Source: UNKNOWN; line: 1, column: 2]\n\t... 15 more\n",
    ),
)


def test_connects_headers_are_decimal_text_and_the_trace_names_the_cause() -> None:
    u = decode(kafka(*CONNECT, timestamp_ms=SENT_MS))
    assert u.format == "kafka-connect"
    assert failure(u) == (
        "org.apache.kafka.connect.errors.DataException",
        "com.fasterxml.jackson.core.JsonParseException",
        "Converting byte[] to Kafka Connect data failed due to serialization error: ",
        "warehouse-sink",
        "VALUE_CONVERTER",
        None,
    )
    assert origin(u) == ("orders", None, 3, 42, SENT_MS), "Connect keeps the original's timestamp"
    assert u.failed_at_ms is None, "so it says nothing of the failure's time"
    assert u.origin == "orders/3/42@connect-warehouse-sink"
    assert u.causes == (
        "org.apache.kafka.common.errors.SerializationException",
        "com.fasterxml.jackson.core.JsonParseException",
    )


def test_connects_null_message_and_exception_are_not_known() -> None:
    record = with_header(kafka(*CONNECT), "__connect.errors.exception.message", None)
    assert decode(record).message is None
    assert decode(with_header(record, "__connect.errors.exception.class.name", None)).error_type is None


def test_two_faults_of_one_class_and_message_differ_in_their_causes() -> None:
    def chain(cause: str) -> bytes:
        head = "org.apache.kafka.connect.errors.ConnectException: Exception chain:\n\tat x\n"
        return f"{head}Caused by: {cause}: why".encode()

    found = [
        decode(with_header(kafka(*CONNECT), "__connect.errors.exception.stacktrace", chain(cause)))
        for cause in ("java.sql.SQLTransientConnectionException", "java.sql.SQLSyntaxErrorException")
    ]
    assert found[0].message == found[1].message
    assert [u.cause_type for u in found] == [
        "java.sql.SQLTransientConnectionException",
        "java.sql.SQLSyntaxErrorException",
    ]


def test_of_connects_repeated_headers_the_first_origin_and_the_last_exception_count() -> None:
    second: Pairs = (
        ("__connect.errors.topic", "orders.dlq"),
        ("__connect.errors.offset", "1"),
        ("__connect.errors.connector.name", "repair-sink"),
        ("__connect.errors.stage", "TASK_PUT"),
        ("__connect.errors.exception.class.name", "org.apache.kafka.connect.errors.RetriableException"),
    )
    u = decode(kafka(*CONNECT, *second))
    assert (u.error_type, u.stage, u.component) == (
        "org.apache.kafka.connect.errors.RetriableException",
        "TASK_PUT",
        "repair-sink",
    )
    assert u.origin == "orders/3/42@connect-warehouse-sink"


@pytest.mark.parametrize(
    ("name", "value", "field"),
    [
        ("__connect.errors.partition", b"\x00\x00\x00\x03", "origin_partition"),
        ("__connect.errors.offset", b"-1", "origin_offset"),
        ("__connect.errors.offset", b"null", "origin_offset"),
        ("__connect.errors.stage", b"", "stage"),
    ],
)
def test_a_broken_header_of_connect_costs_its_field(name: str, value: bytes, field: str) -> None:
    record = kafka(*CONNECT)
    assert differences(record, with_header(record, name, value)) == {field}


STREAMS: Pairs = (
    ("correlation-id", "c-1"),
    ("__streams.errors.exception", "org.apache.kafka.streams.errors.StreamsException"),
    ("__streams.errors.message", None),
    (
        "__streams.errors.stacktrace",
        "org.apache.kafka.streams.errors.StreamsException\n\tat x\n"
        "Caused by: java.lang.ArithmeticException: / by zero\n",
    ),
    ("__streams.errors.topic", "app-totals-repartition"),
    ("__streams.errors.partition", "0"),
    ("__streams.errors.offset", "7"),
)


def test_streams_headers_are_text_and_the_message_may_be_null() -> None:
    u = decode(kafka(*STREAMS, timestamp_ms=SENT_MS))
    assert u.format == "kafka-streams"
    assert failure(u) == (
        "org.apache.kafka.streams.errors.StreamsException",
        "java.lang.ArithmeticException",
        None,
        None,
        None,
        None,
    )
    assert origin(u) == ("app-totals-repartition", None, 0, 7, SENT_MS)
    assert (u.correlation_id, u.pointer) == ("c-1", None)


def test_of_a_send_that_failed_streams_keeps_only_where_the_record_was() -> None:
    u = decode(kafka(*STREAMS, key=None, value=None))
    assert u.pointer == "kafka://app-totals-repartition/0/7"


def test_through_streams_twice_the_first_origin_and_the_last_exception_count() -> None:
    second: Pairs = (
        ("__streams.errors.exception", "java.lang.IllegalStateException"),
        ("__streams.errors.topic", "app-dlq"),
        ("__streams.errors.partition", "1"),
        ("__streams.errors.offset", "1"),
    )
    u = decode(kafka(*STREAMS, *second))
    assert (u.error_type, u.origin_topic, u.origin_offset) == (
        "java.lang.IllegalStateException",
        "app-totals-repartition",
        7,
    )


def test_where_streams_had_no_record_there_is_no_origin() -> None:
    record = with_header(kafka(*STREAMS), "__streams.errors.topic", None)
    record = with_header(
        with_header(record, "__streams.errors.partition", b"-1"), "__streams.errors.offset", b"-1"
    )
    assert origin(decode(record))[:4] == (None, None, None, None)


SHARE: Pairs = (
    ("__dlq.errors.topic", "orders"),
    ("__dlq.errors.partition", "2"),
    ("__dlq.errors.offset", "99"),
    ("__dlq.errors.group", "pickers"),
    ("__dlq.errors.delivery.count", "5"),
    ("__dlq.errors.message", "Offset delivery count exceeded the threshold."),
)


def test_a_share_groups_letter_is_a_pointer_unless_it_has_the_payload() -> None:
    u = decode(kafka(*SHARE, key=None, value=None))
    assert u.format == "kafka-share-group"
    assert failure(u) == (None, None, "Offset delivery count exceeded the threshold.", "pickers", None, 5)
    assert (u.origin, u.pointer) == ("orders/2/99@pickers", "kafka://orders/2/99")
    assert u.failed_at_ms == DEAD_MS
    assert decode(kafka(*SHARE, key=None, value=b"v")).pointer is None
    assert decode(kafka(*SHARE, key=b"k", value=None)).pointer is None, "the original is a tombstone"


def test_a_share_groups_letter_may_lack_count_and_message_and_name_its_topic_by_id() -> None:
    u = decode(kafka(("__dlq.errors.topic", "oF3bTr4pQSaJ0X8Wk1VwNA"), *SHARE[1:4], key=None, value=None))
    assert failure(u) == (None, None, None, "pickers", None, None)
    assert u.pointer == "kafka://oF3bTr4pQSaJ0X8Wk1VwNA/2/99"


SMALLRYE: Pairs = (
    ("dead-letter-exception-class-name", "ours.OrderRefused"),
    ("dead-letter-reason", "no such customer"),
    ("dead-letter-cause-class-name", "java.sql.SQLTimeoutException"),
    ("dead-letter-cause", "statement timed out"),
    ("dead-letter-topic", "orders"),
    ("dead-letter-partition", "4"),
    ("dead-letter-offset", "17"),
)


def test_smallryes_headers_are_understood() -> None:
    u = decode(kafka(*SMALLRYE, ("correlation-id", "c-1")))
    assert u.format == "smallrye"
    assert failure(u) == (
        "ours.OrderRefused",
        "java.sql.SQLTimeoutException",
        "no such customer",
        None,
        None,
        None,
    )
    assert origin(u) == ("orders", None, 4, 17, None)
    assert u.causes == ("java.sql.SQLTimeoutException",)


def test_of_smallryes_repeated_headers_the_first_counts() -> None:
    latest: Pairs = (
        ("dead-letter-exception-class-name", "ours.Second"),
        ("dead-letter-reason", "second"),
        ("dead-letter-topic", "dead-letter-topic-orders"),
        ("dead-letter-partition", "0"),
        ("dead-letter-offset", "3"),
    )
    u = decode(kafka(*latest, *SMALLRYE))
    assert (u.error_type, u.message, u.origin_topic, u.origin_offset) == (
        "ours.Second",
        "second",
        "dead-letter-topic-orders",
        3,
    )


def test_of_delayed_retries_the_origin_is_before_all_retry_topics() -> None:
    def hop(topic: str, offset: int, error: str) -> Pairs:
        return (
            ("delayed-retry-exception-class-name", error),
            ("delayed-retry-reason", "r"),
            ("delayed-retry-topic", topic),
            ("delayed-retry-partition", "1"),
            ("delayed-retry-offset", str(offset)),
        )

    u = decode(
        kafka(
            *hop("orders_retry_10000", 5, "ours.Latest"),
            *hop("orders", 42, "ours.First"),
            ("delayed-retry-original-timestamp", str(SENT_MS)),
            ("delayed-retry-count", "1"),
        )
    )
    assert (u.format, u.error_type, u.attempts, u.retries) == ("smallrye-delayed-retry", "ours.Latest", 2, 1)
    assert origin(u) == ("orders", None, 1, 42, SENT_MS)
