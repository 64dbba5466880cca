"""No header, attribute or body can make a decoder raise, or make it keep what a database or a terminal can't."""

from __future__ import annotations

import json
import random
from base64 import b64encode
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.letters import be32, be64

from dlq.entry import Record
from dlq.envelopes import Envelopes, JsonPath, decode
from dlq.envelopes.registry import SHIPPED
from dlq.envelopes.untrusted import LAST_MS

PREFIXES = (
    "wf-",
    "kafka_dlt-",
    "kafka_",
    "x-",
    "__connect.errors.",
    "__streams.errors.",
    "__dlq.errors.",
    "dead-letter-",
    "delayed-retry-",
    "MT-Fault-",
    "NServiceBus.",
    "NServiceBus.ExceptionInfo.",
    "ce_",
    "ce-",
    "CloudPubSubDeadLetterSource",
    "retry_topic-",
    "",
)
ENDS = (
    *("original-topic", "original-partition", "original-offset", "original-timestamp"),
    *("original-consumer-group", "exception-fqcn", "exception-cause-fqcn", "exception-message"),
    *("exception-stacktrace", "key-exception-fqcn", "key-exception-message", "attempts", "deliveryAttempt"),
    *("topic", "partition", "offset", "connector.name", "stage", "exception.class.name"),
    *("exception.stacktrace", "exception.message", "exception", "message", "stacktrace", "group"),
    *("delivery.count", "exception-class-name", "cause-class-name", "reason", "cause", "count"),
    *("ExceptionType", "InputAddress", "Message", "Timestamp", "RetryCount", "StackTrace"),
    *("FailedQ", "TimeOfFailure", "TimeSent", "Retries", "InnerExceptionType", "CorrelationId"),
    *("id", "source", "time", "knativeerrordest", "knativeerrorcode", "knativeerrordata"),
    *("death", "first-death-queue", "last-death-reason", "original-exchange"),
    *("DeliveryCount", "Subscription", "TopicPublishTime", "error-type", "error-message", "failed-at"),
)
WHOLE = (
    *("DeadLetterReason", "DeadLetterErrorDescription", "DeliveryCount", "REAL_TOPIC", "RECONSUMETIMES"),
    *("RequestID", "ErrorCode", "ErrorMessage", "RULE_ARN", "TARGET_ARN", "ERROR_CODE", "ERROR_MESSAGE"),
    *("RETRY_ATTEMPTS", "EXHAUSTED_RETRY_CONDITION", "SCHEDULE_ARN", "SCHEDULED_TIME"),
    *("EXECUTION_ID", "IS_PAYLOAD_TRUNCATED", "content-type", "MT-Reason"),
    *("correlation-id", "traceparent", "b3", "X-Amzn-Trace-Id", "x-datadog-trace-id", "x-datadog-tags"),
    *("dedupe-key", "retry-count", "x-retry-count", "MessageDeduplicationId", "dlq-retry-count"),
)
names = st.one_of(
    st.builds(str.__add__, st.sampled_from(PREFIXES), st.sampled_from(ENDS)),
    st.sampled_from(WHOLE),
    st.text(max_size=12),
)
LIKELY = (
    be32(3),
    be64(42),
    b"\x04",
    b"42",
    b"true",
    b"200",
    b"application/cloudevents+json",
    b"2025-11-24T16:00:00Z",
    b"0001-01-01T00:00:00-23:59",
    b"9999-12-31T23:59:59+23:59",
    b"2025-11-24 16:01:40:123456 Z",
    b'[{"queue": "q", "reason": {}, "count": 1.5}]',
    b"{reason=a, queue=b",
    b"orders",
    b"X: y\nCaused by: \nCaused by: a.B\xff: c\nCaused by: ",
    b" ---> ",
    b"1" * 5000,
    b"A" * 1024,
    "µ\u202e\u200b\ud7ff".encode(),
    b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    b"80f198ee56343ba864fe8b2a57d3eff7-e457b5a2e4d86bd1-1",
    b"Root=1-5759e988-bd862e3fe1be46a994272793;Sampled=1",
    b"_dd.p.tid=640cfd8d00000000",
    b64encode(b'{"error": "no backend"}'),
    b64encode(b"\xff\xfe\xfd"),
    b"System.Exception: x ---> A.B: y",
)
likely = st.sampled_from(LIKELY)


def spoiled(value: bytes, at: int, byte: int) -> bytes:
    """A value that is right but for one byte: what comes nearest to be read, and must not raise."""
    at %= len(value)
    return value[:at] + bytes([byte]) + value[at + 1 :]


nearly = st.builds(
    spoiled, likely.filter(lambda value: len(value) < 100), st.integers(0, 99), st.integers(0, 255)
)
values = st.one_of(st.none(), likely, nearly, st.binary(max_size=300))
headers = st.lists(st.tuples(names, values), max_size=25).map(tuple)

KEYS = (
    *("requestContext", "condition", "functionArn", "responsePayload", "errorType", "cause", "timestamp"),
    *("responseContext", "statusCode", "KinesisBatchInfo", "DDBStreamBatchInfo", "streamArn", "shardId"),
    *("startSequenceNumber", "endSequenceNumber", "Type", "TopicArn", "Message", "MessageAttributes"),
    *("Value", "busArn", "subscriberArn", "failedMessages", "retryAttempts", "s3BucketName", "s3Key"),
    *("id", "source", "time", "conversationId", "sentTime", "knativeerrorcode"),
)
leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.text(max_size=20),
    st.sampled_from(["Notification", "RetriesExhausted", "2025-11-24T16:00:00Z", "\u0000", "Binary"]),
)
json_values: st.SearchStrategy[Any] = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=5), inner, max_size=6),
    ),
    max_leaves=25,
)
pointers = st.builds(
    lambda rest: json.dumps(["software.amazon.payloadoffloading.PayloadS3Pointer", *rest]),
    st.lists(json_values, max_size=2),
)
bodies = st.one_of(
    st.none(),
    json_values.map(json.dumps).map(str.encode),
    st.dictionaries(st.sampled_from(KEYS), json_values, max_size=10).map(json.dumps).map(str.encode),
    pointers.map(str.encode),
    st.binary(max_size=100),
    st.sampled_from(
        [b"{" * 100_000, b"[" * 100_000, b'{"requestContext":{"condition":' * 5_000, b'{"TopicArn":"a"']
    ),
)
system = st.dictionaries(
    st.sampled_from(
        [
            "DeadLetterQueueSourceArn",
            "ApproximateReceiveCount",
            "SentTimestamp",
            "AWSTraceHeader",
            "MessageDeduplicationId",
            "SequenceNumber",
            "MessageGroupId",
        ]
    ),
    st.text(max_size=30),
).map(lambda found: tuple(found.items()))
records = st.one_of(
    st.builds(Record, st.just(0), st.just("1"), st.just(1), values, bodies, headers, st.none() | st.just(5)),
    st.builds(
        Record,
        st.just(0),
        st.just("m"),
        st.none(),
        st.none(),
        bodies,
        headers,
        st.none() | st.just(5),
        system=system,
        transport=st.just("sqs"),
    ),
)
LENGTHS = {"message": 2000, "pointer": 1100}


def see_that_it_can_be_kept(record: Record) -> None:
    u = decode(record)
    for field in u.__struct_fields__:
        value = getattr(u, field)
        for text in value if isinstance(value, tuple) else (value,):
            if isinstance(text, str):
                text.encode()
                assert text.isprintable(), field
                assert len(text) <= LENGTHS.get(field, 249), field
        if isinstance(value, int):
            assert 0 <= value <= (LAST_MS if field.endswith("_ms") else 2**63 - 1), field
    for number in (u.attempts, u.retries, u.retry_count, u.origin_partition):
        assert number is None or number < 2**31, "as the ledger's columns hold them"


@settings(max_examples=600, suppress_health_check=[HealthCheck.too_slow])
@given(records)
def test_nothing_makes_it_raise_or_keep_what_cannot_be_kept(record: Record) -> None:
    see_that_it_can_be_kept(record)


def test_no_value_of_any_known_header_makes_it_raise_or_keep_what_cannot_be_kept() -> None:
    """Every name that some convention or id goes by, with every likely value whole, cut, and spoiled byte by byte."""
    known = [name for p in PREFIXES for e in ENDS if any(f.owns(name := p + e) for f in SHIPPED)]
    short = [value for value in LIKELY if len(value) < 100]
    for name in (*known, *(f"NServiceBus.{e}" for e in ("TimeSent", "CorrelationId")), *WHOLE):
        for value in short:
            spoils = [spoiled(value, at, b" 9\xff"[at % 3]) for at in range(len(value))]
            for each in (value, value[:-1], value + value, *spoils):
                see_that_it_can_be_kept(Record(0, "1", 1, None, None, ((name, each),), 5))


@given(bodies, st.sampled_from(["$.id", "$[0].id", "$.requestContext.condition"]))
def test_no_value_makes_a_path_raise(value: bytes | None, path: str) -> None:
    key = JsonPath(path).find(value)
    assert key is None or (len(key) <= 200 and key.isprintable())


@settings(max_examples=200)
@given(records)
def test_what_is_remembered_of_a_shape_never_changes_the_answer(record: Record) -> None:
    warm = Envelopes()
    warm.decode(record)
    assert warm.decode(record) == Envelopes().decode(record)


def test_the_work_is_linear_in_what_is_sent() -> None:
    """A megabyte of what each pattern would look at, once."""
    import time

    noise = bytes(random.Random(7).randbytes(1_000_000))
    hostile = [
        b"\nCaused by: a" * 80_000,
        b" ---> " * 160_000,
        b"queue=" * 160_000,
        b"Root=1-" * 140_000,
        b"_dd.p.tid=" * 100_000,
        b'{"TopicArn":' * 80_000,
        noise,
    ]
    everything = [f"{p}{e}" for p in PREFIXES for e in ENDS] + list(WHOLE)
    began = time.process_time()
    for value in hostile:
        letter = tuple((name, value) for name in everything)
        decode(Record(0, "1", 1, None, value, letter, 0))
        decode(Record(0, "m", None, None, value, letter, 0, transport="sqs"))
    assert time.process_time() - began < 20
