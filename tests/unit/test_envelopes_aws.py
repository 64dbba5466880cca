"""Dead letters on SQS: what the queue, Lambda, SNS and EventBridge leave, as recorded against the services."""

from __future__ import annotations

import json
from base64 import b64encode
from hashlib import sha256
from typing import Any

import pytest
from tests.letters import SENT_MS, failure, origin, sqs

from dlq.envelopes import decode

QUEUE = "arn:aws:sqs:eu-west-1:111122223333:billing"
FUNCTION = "arn:aws:lambda:eu-west-1:111122223333:function:charge:$LATEST"
TOPIC = "arn:aws:sns:eu-west-1:111122223333:orders"
XRAY = "Root=1-5759e988-bd862e3fe1be46a994272793;Parent=53995c3f42cd8ad8;Sampled=1"
REQUEST = "b7a5d1e2-6f4a-4f6e-9d0a-1c2b3d4e5f60"


def test_a_redrive_records_no_error_but_where_it_came_from() -> None:
    u = decode(
        sqs(
            '{"order": 1}',
            {"correlation-id": "c-1", "dedupe-key": "order-1"},
            {"DeadLetterQueueSourceArn": QUEUE, "AWSTraceHeader": XRAY},
        )
    )
    assert u.format == "sqs-redrive"
    assert failure(u) == (None, None, None, None, None, 4)
    assert origin(u) == (None, QUEUE, None, None, SENT_MS)
    assert (u.correlation_id, u.dedupe_key) == ("c-1", "order-1")
    assert u.trace_id == "5759e988bd862e3fe1be46a994272793"


def test_a_fifo_redrive_sets_the_time_anew_and_has_no_key_of_its_senders() -> None:
    system = {
        "DeadLetterQueueSourceArn": f"{QUEUE}.fifo",
        "MessageGroupId": "g-1",
        "MessageDeduplicationId": "m-1",
        "SequenceNumber": "18849496460467696128",
    }
    u = decode(sqs("{}", system=system))
    assert (u.origin_queue, u.origin_timestamp_ms, u.failed_at_ms) == (f"{QUEUE}.fifo", None, SENT_MS)
    assert u.dedupe_key is None


@pytest.mark.parametrize(
    ("chosen", "key"),
    [("order-1", "order-1"), ("m-1", None), (sha256(b"{}").hexdigest(), None), ("", None)],
)
def test_a_deduplication_id_is_a_key_only_where_a_sender_chose_it(chosen: str, key: str | None) -> None:
    assert decode(sqs("{}", system={"MessageDeduplicationId": chosen})).dedupe_key == key


def test_a_message_nobody_moved_is_unknown_and_has_its_time() -> None:
    u = decode(sqs("hello", {"x": b"\x00\xff"}))
    assert (u.format, u.origin_queue, u.origin_timestamp_ms, u.attempts) == ("unknown", None, SENT_MS, None)


def test_lambdas_dead_letter_queue_tells_the_error_in_attributes() -> None:
    u = decode(
        sqs(
            {"raise_error": 1},
            {
                "RequestID": REQUEST,
                "ErrorCode": "200",
                "ErrorMessage": "Test exception (this is intentional)",
            },
        )
    )
    assert u.format == "lambda-dlq"
    assert failure(u) == (None, None, "Test exception (this is intentional)", None, None, None)
    assert (u.correlation_id, u.http_status) == (REQUEST, None)
    assert decode(sqs("{}", {"ErrorCode": "429", "ErrorMessage": "Rate Exceeded."})).http_status == 429


def test_one_attribute_of_that_name_is_anybodys() -> None:
    assert decode(sqs("{}", {"ErrorMessage": "no"})).format == "unknown"


def envelope(message: Any, **attributes: dict[str, str]) -> dict[str, Any]:
    return {
        "Type": "Notification",
        "MessageId": "0c9d2b9e-5b0c-5d0a-9d4d-7d1c5f6e7a80",
        "TopicArn": TOPIC,
        "Message": message if isinstance(message, str) else json.dumps(message),
        "Timestamp": "2025-11-24T16:00:00.000Z",
        "SignatureVersion": "1",
        "Signature": "c2ln",
        "MessageAttributes": attributes,
    }


def test_the_same_through_sns_lies_in_its_envelope() -> None:
    body = envelope(
        {"Records": []},
        RequestID={"Type": "String", "Value": REQUEST},
        ErrorCode={"Type": "Number", "Value": "200"},
        ErrorMessage={"Type": "String", "Value": "Test exception"},
    )
    u = decode(sqs(body))
    assert (u.format, u.message, u.correlation_id, u.origin_topic) == (
        "lambda-dlq",
        "Test exception",
        REQUEST,
        None,
    )


def test_an_sns_envelope_gives_its_topic_its_time_and_the_ids_inside() -> None:
    body = envelope(
        "hello",
        **{
            "correlation-id": {"Type": "String", "Value": "c-1"},
            "dedupe-key": {"Type": "Binary", "Value": b64encode(b"key-1").decode()},
            "n": {"Type": "Number", "Value": "1"},
        },
    )
    u = decode(sqs(body, system={"SentTimestamp": str(SENT_MS + 5)}))
    assert u.format == "sns"
    assert origin(u) == (TOPIC, None, None, None, SENT_MS)
    assert (u.correlation_id, u.dedupe_key) == ("c-1", "key-1")


def test_what_sns_delivered_and_a_queue_moved_failed_in_the_queue() -> None:
    body = envelope("hello", **{"correlation-id": {"Type": "String", "Value": "c-1"}})
    u = decode(sqs(body, system={"DeadLetterQueueSourceArn": QUEUE}))
    assert u.format == "sqs-redrive"
    assert (u.origin_queue, u.origin_topic, u.attempts, u.correlation_id) == (QUEUE, None, 4, "c-1")


@pytest.mark.parametrize(
    "body",
    [
        {**envelope("x"), "Type": "SubscriptionConfirmation"},
        {**envelope("x"), "Message": None},
        {"event": envelope("x")},
        '{"TopicArn": broken',
    ],
)
def test_what_is_no_envelope_is_not_opened(body: Any) -> None:
    assert decode(sqs(body)).format == "unknown"


def destination(**changes: Any) -> dict[str, Any]:
    record: dict[str, Any] = {
        "version": "1.0",
        "timestamp": "2025-11-24T16:01:40.000Z",
        "requestContext": {
            "requestId": REQUEST,
            "functionArn": FUNCTION,
            "condition": "RetriesExhausted",
            "approximateInvokeCount": 3,
        },
        "requestPayload": {"order": 1},
        "responseContext": {"statusCode": 200, "executedVersion": "$LATEST", "functionError": "Unhandled"},
        "responsePayload": {
            "errorMessage": "intentional failure",
            "errorType": "Exception",
            "requestId": REQUEST,
            "stackTrace": ['  File "/var/task/handler.py", line 7, in handler\n'],
        },
    }
    return {key: value for key, value in {**record, **changes}.items() if value is not None}


@pytest.mark.parametrize("through_sns", [False, True])
def test_lambdas_destination_is_a_body(through_sns: bool) -> None:
    u = decode(sqs(envelope(destination()) if through_sns else destination()))
    assert u.format == "lambda-destination"
    assert failure(u) == ("Exception", None, "intentional failure", FUNCTION, "RetriesExhausted", 3)
    assert (u.correlation_id, u.failed_at_ms, u.http_status, u.pointer) == (
        REQUEST,
        1_764_000_100_000,
        None,
        None,
    )


def test_javas_runtime_nests_the_causes() -> None:
    answer = {
        "errorMessage": "java.io.IOException: no",
        "errorType": "java.lang.RuntimeException",
        "cause": {
            "errorType": "java.io.IOException",
            "cause": {"errorType": "java.net.SocketTimeoutException"},
        },
    }
    u = decode(sqs(destination(responsePayload=answer)))
    assert u.cause_type == "java.net.SocketTimeoutException"
    assert u.causes == ("java.io.IOException", "java.net.SocketTimeoutException")


@pytest.mark.parametrize(
    ("changes", "lost"),
    [
        ({"responsePayload": None}, ("error_type", "message")),
        ({"responsePayload": "text"}, ("error_type", "message")),
        ({"responsePayload": {"errorMessage": 5, "errorType": []}}, ("error_type",)),
        ({"timestamp": "yesterday"}, ("failed_at_ms",)),
    ],
)
def test_a_broken_field_of_a_body_costs_itself(changes: dict[str, Any], lost: tuple[str, ...]) -> None:
    u = decode(sqs(destination(**changes)))
    assert (u.format, u.stage, u.attempts) == ("lambda-destination", "RetriesExhausted", 3)
    assert all(getattr(u, field) is None for field in lost)


STREAM = "arn:aws:kinesis:eu-west-1:111122223333:stream/orders"


@pytest.mark.parametrize(
    ("key", "scheme"), [("KinesisBatchInfo", "kinesis"), ("DDBStreamBatchInfo", "dynamodb")]
)
def test_of_a_stream_only_the_place_of_its_batch_is_told(key: str, scheme: str) -> None:
    batch = {
        "shardId": "shardId-000000000000",
        "startSequenceNumber": "495",
        "endSequenceNumber": "497",
        "approximateArrivalOfFirstRecord": "2025-11-24T16:00:00.000Z",
        "approximateArrivalOfLastRecord": "2025-11-24T16:00:01.000Z",
        "batchSize": 3,
        "streamArn": STREAM,
    }
    context = {**destination()["requestContext"], "condition": "RetryAttemptsExhausted"}
    body = destination(requestPayload=None, responsePayload=None, requestContext=context, **{key: batch})
    u = decode(sqs(body))
    assert u.format == "lambda-stream"
    assert failure(u) == (None, None, None, FUNCTION, "RetryAttemptsExhausted", 3)
    assert u.pointer == f"{scheme}://{STREAM}/shardId-000000000000?from=495&to=497"
    assert u.origin_timestamp_ms == SENT_MS
    assert decode(sqs({**body, key: {"shardId": 5}})).pointer == f"{scheme}:"


def test_too_old_for_a_stream_has_no_answer_at_all() -> None:
    context = {**destination()["requestContext"], "condition": "RecordAgeExceeded"}
    body = destination(
        requestPayload=None,
        responsePayload=None,
        responseContext=None,
        requestContext=context,
        KinesisBatchInfo={},
    )
    u = decode(sqs(body))
    assert (u.format, u.stage) == ("lambda-stream", "RecordAgeExceeded")


def test_an_http_event_is_no_destination() -> None:
    """API Gateway's events have a requestContext too."""
    assert decode(sqs({"requestContext": {"http": {}, "condition": "x"}, "body": "b"})).format == "unknown"


RULE = {
    "RULE_ARN": "arn:aws:events:eu-west-1:111122223333:rule/orders",
    "TARGET_ARN": "arn:aws:lambda:eu-west-1:111122223333:function:charge",
    "ERROR_CODE": "SDK_CLIENT_ERROR",
    "ERROR_MESSAGE": "Lambda function is throttled",
    "RETRY_ATTEMPTS": "185",
    "EXHAUSTED_RETRY_CONDITION": "MaximumRetryAttempts",
}
EVENT = {"id": "e-1", "source": "ours.orders", "time": "2025-11-24T16:00:00Z", "detail": {}}


def test_a_rules_attributes_are_understood_and_its_body_is_the_event() -> None:
    u = decode(sqs(EVENT, RULE))
    assert u.format == "eventbridge"
    assert failure(u) == (
        "SDK_CLIENT_ERROR",
        None,
        "Lambda function is throttled",
        RULE["TARGET_ARN"],
        "MaximumRetryAttempts",
        186,
    )
    assert (u.retries, u.origin_timestamp_ms, u.consumer_group, u.pointer) == (
        185,
        SENT_MS,
        RULE["RULE_ARN"],
        None,
    )


def test_what_a_rule_did_not_retry_has_no_condition() -> None:
    attributes = {**RULE, "ERROR_CODE": "NO_PERMISSIONS", "RETRY_ATTEMPTS": "0"}
    del attributes["EXHAUSTED_RETRY_CONDITION"]
    u = decode(sqs(EVENT, attributes))
    assert (u.error_type, u.stage, u.attempts, u.retries) == ("NO_PERMISSIONS", None, 1, 0)


def test_a_custom_bus_writes_one_letter_for_many_events() -> None:
    bus = "arn:aws:events:eu-west-1:111122223333:event-bus/orders"
    body = {
        "version": "1.0",
        "busArn": bus,
        "subscriberArn": "arn:aws:events:eu-west-1:111122223333:subscriber/billing",
        "targetArn": QUEUE,
        "errorCode": "ACCESS_DENIED",
        "errorMessage": "not authorized to perform: sqs:sendmessage",
        "exhaustedRetryCondition": "MaximumRetryAttempts",
        "retryAttempts": 5,
        "failedMessages": [{"eventId": "e-1", "deduplicationId": "order-1"}, {"eventId": "e-2"}],
    }
    u = decode(sqs(body))
    assert u.format == "eventbridge-bus"
    assert failure(u) == (
        "ACCESS_DENIED",
        None,
        "not authorized to perform: sqs:sendmessage",
        QUEUE,
        "MaximumRetryAttempts",
        6,
    )
    assert (u.pointer, u.dedupe_key) == (f"eventbridge://{bus}?events=2", None)


def test_a_schedules_invocation_may_be_cut() -> None:
    attributes = {
        "SCHEDULE_ARN": "arn:aws:scheduler:eu-west-1:111122223333:schedule/default/nightly",
        "SCHEDULED_TIME": "2025-11-24T16:00:00Z",
        "EXECUTION_ID": "x-1",
        "IS_PAYLOAD_TRUNCATED": "false",
        "TARGET_ARN": QUEUE,
        "ERROR_CODE": "AWS.SimpleQueueService.NonExistentQueue",
        "ERROR_MESSAGE": "The specified queue does not exist.",
        "RETRY_ATTEMPTS": "2",
        "EXHAUSTED_RETRY_CONDITION": "MaximumRetryAttempts",
    }
    u = decode(sqs("{}", attributes))
    assert u.format == "eventbridge-scheduler"
    assert failure(u) == (
        "AWS.SimpleQueueService.NonExistentQueue",
        None,
        "The specified queue does not exist.",
        QUEUE,
        "MaximumRetryAttempts",
        3,
    )
    assert (u.origin_timestamp_ms, u.correlation_id, u.pointer) == (SENT_MS, "x-1", None)
    cut = decode(sqs("{}", {**attributes, "IS_PAYLOAD_TRUNCATED": "true"}))
    assert cut.pointer == f"truncated:{attributes['SCHEDULE_ARN']}"


@pytest.mark.parametrize(
    "name",
    ["software.amazon.payloadoffloading.PayloadS3Pointer", "com.amazon.sqs.javamessaging.MessageS3Pointer"],
)
def test_the_extended_clients_body_is_in_a_bucket(name: str) -> None:
    body = json.dumps([name, {"s3BucketName": "big", "s3Key": "a/b c"}], separators=(",", ":"))
    u = decode(sqs(body, {"ExtendedPayloadSize": "300000"}, {"DeadLetterQueueSourceArn": QUEUE}))
    assert (u.format, u.origin_queue, u.pointer) == ("sqs-redrive", QUEUE, "s3://big/a/b c")
    assert decode(sqs(body)).format == "sqs-extended-client"


def test_the_pointer_may_be_laid_out_in_any_way() -> None:
    body = '\n[ "software.amazon.payloadoffloading.PayloadS3Pointer" , {"s3Key": "k", "s3BucketName": "b"} ]'
    assert decode(sqs(body)).pointer == "s3://b/k"


@pytest.mark.parametrize(
    "body",
    [
        '["software.amazon.payloadoffloading.PayloadS3Pointer"]',
        '["software.amazon.payloadoffloading.PayloadS3Pointer", {"s3BucketName": 1, "s3Key": "k"}]',
        '["software.amazon.payloadoffloading.PayloadS3Pointer", {"s3BucketName": "big"}]',
        '["software.amazon.payloadoffloading.PayloadS3Pointer", {',
    ],
)
def test_a_pointer_that_does_not_say_where_to_is_one_all_the_same(body: str) -> None:
    assert decode(sqs(body)).pointer == "s3:"


def test_attributes_that_kafkas_producers_write_are_read_from_a_queue_too() -> None:
    u = decode(sqs("{}", {"wf-error-type": "RateLimit"}, {"DeadLetterQueueSourceArn": QUEUE}))
    assert (u.format, u.error_type, u.origin_queue) == ("orchestrator", "RateLimit", QUEUE)
