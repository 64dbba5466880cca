"""Dead letters of other brokers and frameworks, bridged in with their headers."""

from __future__ import annotations

import json
from base64 import b64encode

import pytest
from tests.letters import SENT_MS, TRACE, Pairs, differences, failure, kafka, origin, sqs, with_header

from dlq.envelopes import decode

MASSTRANSIT: Pairs = (
    ("MT-Activity-Id", f"00-{TRACE}-00f067aa0ba902b7-01"),
    ("MT-Reason", "fault"),
    ("MT-Fault-ExceptionType", "System.TimeoutException"),
    ("MT-Fault-InputAddress", "rabbitmq://broker/billing/submit-order"),
    ("MT-Fault-Message", "The operation has timed out."),
    ("MT-Fault-MessageType", "Ours.SubmitOrder"),
    ("MT-Fault-ConsumerType", "Ours.SubmitOrderConsumer"),
    ("MT-Fault-Timestamp", "2025-11-24T16:01:40.1234567Z"),
    ("MT-Fault-StackTrace", "   at Ours.SubmitOrderConsumer.Consume(ConsumeContext`1 context)"),
    ("MT-Fault-RetryCount", "3"),
)
ENVELOPE = {
    "messageId": "181c0000-6393-3630-36a4-08daf4e7c6da",
    "conversationId": "181c0000-6393-3630-36a4-08daf4e7c6db",
    "messageType": ["urn:message:Ours:SubmitOrder"],
    "message": {"order": 1},
    "sentTime": "2025-11-24T16:00:00Z",
}


def test_masstransits_headers_and_its_envelope_are_understood() -> None:
    u = decode(kafka(*MASSTRANSIT, value=json.dumps(ENVELOPE).encode()))
    assert u.format == "masstransit"
    assert failure(u) == (
        "System.TimeoutException",
        None,
        "The operation has timed out.",
        "Ours.SubmitOrderConsumer",
        None,
        4,
    )
    assert origin(u) == (None, "rabbitmq://broker/billing/submit-order", None, None, 1_764_000_000_000)
    assert (u.failed_at_ms, u.retries, u.retry_count) == (1_764_000_100_123, 3, 0)
    assert (u.correlation_id, u.trace_id) == (ENVELOPE["conversationId"], TRACE)


def test_masstransit_on_sqs_carries_a_part_and_a_header_beats_the_envelope() -> None:
    attributes = {
        "MT-Reason": "fault",
        "MT-Fault-InputAddress": "amazonsqs://eu-west-1/submit-order",
        "MT-Fault-Message": "refused",
        "correlation-id": "c-1",
    }
    u = decode(sqs(ENVELOPE, attributes))
    assert (u.format, u.message, u.error_type) == ("masstransit", "refused", None)
    assert (u.origin_queue, u.correlation_id) == ("amazonsqs://eu-west-1/submit-order", "c-1")


def test_what_masstransit_skipped_says_so() -> None:
    u = decode(kafka(("MT-Reason", "dead-letter"), value=b"not json"))
    assert failure(u) == (None, None, "dead-letter", None, None, None)
    assert u.correlation_id is None


NSERVICEBUS: Pairs = (
    ("NServiceBus.MessageId", "m-1"),
    ("NServiceBus.CorrelationId", "c-1"),
    ("NServiceBus.ConversationId", "v-1"),
    ("NServiceBus.EnclosedMessageTypes", "Ours.SubmitOrder, Ours"),
    ("NServiceBus.TimeSent", "2025-11-24 16:00:00:000000 Z"),
    ("NServiceBus.ProcessingEndpoint", "Sales"),
    ("NServiceBus.Retries", "2"),
    ("NServiceBus.FailedQ", "Sales@host-1"),
    ("NServiceBus.TimeOfFailure", "2025-11-24 16:01:40:123456 Z"),
    ("NServiceBus.ExceptionInfo.ExceptionType", "System.InvalidOperationException"),
    ("NServiceBus.ExceptionInfo.InnerExceptionType", "System.AggregateException"),
    ("NServiceBus.ExceptionInfo.Message", "could not charge"),
    ("NServiceBus.ExceptionInfo.Source", "Ours.Sales"),
    (
        "NServiceBus.ExceptionInfo.StackTrace",
        "System.InvalidOperationException: could not charge\n"
        " ---> System.AggregateException: One or more errors occurred.\n"
        " ---> System.Net.Http.HttpRequestException: no route to host\n"
        "   at Ours.Client.Call()\n   --- End of inner exception stack trace ---\n   at Ours.Sales.Handle()",
    ),
    ("NServiceBus.ExceptionInfo.Data.Message type", "Ours.SubmitOrder"),
)


def test_nservicebus_headers_are_understood() -> None:
    u = decode(kafka(*NSERVICEBUS))
    assert u.format == "nservicebus"
    assert failure(u) == (
        "System.InvalidOperationException",
        "System.AggregateException",
        "could not charge",
        "Sales",
        None,
        None,
    )
    assert origin(u) == (None, "Sales@host-1", None, None, SENT_MS)
    assert (u.failed_at_ms, u.retries, u.correlation_id) == (1_764_000_100_123, 2, "c-1")
    assert u.causes == ("System.AggregateException", "System.Net.Http.HttpRequestException")


@pytest.mark.parametrize(
    "time", ["2025-11-24 16:01:40.123456 Z", "2025-13-24 16:01:40:123456 Z", "", "2025-11-24T16:01:40Z"]
)
def test_a_time_that_is_not_nservicebus_costs_the_time(time: str) -> None:
    record = kafka(*NSERVICEBUS)
    broken = with_header(record, "NServiceBus.TimeOfFailure", time.encode())
    assert differences(record, broken) == {"failed_at_ms"}


def test_a_message_of_nservicebus_that_did_not_fail_is_not_taken_for_one_that_did() -> None:
    assert decode(kafka(*NSERVICEBUS[:6])).format == "unknown"


ANSWER = '{"error":"no such sku"}'


@pytest.mark.parametrize("prefix", ["ce_", "ce-", "Ce-", ""])
def test_knatives_extensions_are_understood_wherever_they_came_from(prefix: str) -> None:
    u = decode(
        kafka(
            ("ce_id", "e-1"),
            ("ce_source", "/orders"),
            ("ce_specversion", "1.0"),
            ("ce_type", "ours.order.created"),
            ("ce_time", "2025-11-24T16:00:00Z"),
            (f"{prefix}knativeerrordest", "http://billing.shop.svc.cluster.local"),
            (f"{prefix}knativeerrorcode", "422"),
            (f"{prefix}knativeerrordata", b64encode(ANSWER.encode())),
        )
    )
    assert u.format == "knative"
    assert failure(u) == ("422", None, ANSWER, "http://billing.shop.svc.cluster.local", None, None)
    assert (u.http_status, u.correlation_id, u.origin_timestamp_ms) == (422, "e-1", SENT_MS)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"plain words", "plain words"),
        (b"test", "test"),
        (b64encode(b"\x00\x01\x02\x03\x04\x05"), "AAECAwQF"),
        (b64encode("zu groß".encode() * 200)[:1024], "zu groß" * 96),
        (b"", ""),
    ],
)
def test_knatives_data_is_read_out_of_base64_where_text_is_in_it(data: bytes, said: str) -> None:
    assert decode(kafka(("ce_knativeerrordata", data))).message == said


def test_an_event_of_which_no_failure_is_told_is_an_event() -> None:
    u = decode(kafka(("ce_id", "e-1"), ("ce_source", "/orders"), ("ce_time", "2025-11-24T16:00:00Z")))
    assert (u.format, u.correlation_id, u.origin_timestamp_ms) == ("cloudevents", "e-1", SENT_MS)
    assert failure(u) == (None,) * 6


def test_an_event_in_structured_mode_is_read_from_its_body() -> None:
    kind = ("content-type", "application/cloudevents+json; charset=utf-8")
    event = {"specversion": "1.0", "id": "e-1", "source": "/orders", "type": "t", "data": {"a": 1}}
    assert decode(kafka(kind, value=json.dumps(event).encode())).correlation_id == "e-1"
    failed = {**event, "knativeerrordest": "http://billing", "knativeerrorcode": 503}
    u = decode(kafka(kind, value=json.dumps(failed).encode()))
    assert (u.format, u.error_type, u.http_status, u.component) == ("knative", "503", 503, "http://billing")
    assert decode(kafka(kind, value=b"{broken")).format == "unknown"


DEATHS = [
    {"count": 3, "reason": "rejected", "queue": "billing.retry", "exchange": "x", "routing-keys": ["a", "b"]},
    {"count": 1, "reason": "expired", "queue": "billing", "exchange": "", "routing-keys": ["billing"]},
]
PRINTED = (
    "[{reason=rejected, count=3, exchange=x, time=Mon Nov 24 16:00:00 UTC 2025, routing-keys=[a, b], "
    "queue=billing.retry}, {reason=expired, count=1, exchange=, routing-keys=[billing], queue=billing}]"
)


@pytest.mark.parametrize("deaths", [json.dumps(DEATHS), PRINTED])
def test_rabbitmqs_deaths_are_read_as_json_and_as_java_prints_them(deaths: str) -> None:
    u = decode(kafka(("x-death", deaths)))
    assert u.format == "rabbitmq"
    assert failure(u) == ("rejected", None, None, None, None, 3)
    assert origin(u)[:4] == (None, "billing", None, None)


def test_rabbitmqs_first_and_last_death_have_headers_of_their_own() -> None:
    u = decode(
        kafka(
            ("x-first-death-queue", "billing"),
            ("x-first-death-reason", "expired"),
            ("x-first-death-exchange", ""),
            ("x-last-death-reason", "delivery_limit"),
        )
    )
    assert (u.error_type, u.origin_queue) == ("delivery_limit", "billing")


@pytest.mark.parametrize("deaths", ["", "[]", "[1]", "{", "null", "[{]"])
def test_a_broken_list_of_deaths_costs_what_it_held(deaths: str) -> None:
    u = decode(kafka(("x-death", deaths), ("x-first-death-queue", "billing")))
    assert (u.format, u.error_type, u.attempts, u.origin_queue) == ("rabbitmq", None, None, "billing")


def test_what_spring_amqp_republished_is_not_taken_for_cloud_streams() -> None:
    u = decode(
        kafka(
            ("x-exception-message", "no such customer"),
            ("x-exception-stacktrace", "a.B: c\n\tat x\nCaused by: ours.NoCustomer: d\n"),
            ("x-original-exchange", "orders"),
            ("x-original-routingKey", "new"),
        )
    )
    assert (u.format, u.message, u.cause_type) == ("rabbitmq", "no such customer", "ours.NoCustomer")


def test_azures_reason_is_the_error() -> None:
    u = decode(
        kafka(
            ("DeadLetterReason", "MaxDeliveryCountExceeded"),
            ("DeadLetterErrorDescription", "Message could not be consumed after 10 delivery attempts."),
            ("DeadLetterSource", "billing"),
        )
    )
    assert u.format == "azure-service-bus"
    assert failure(u)[:3] == (
        "MaxDeliveryCountExceeded",
        None,
        "Message could not be consumed after 10 delivery attempts.",
    )
    assert u.origin_queue == "billing"


def test_pubsubs_subscription_is_who_failed() -> None:
    u = decode(
        kafka(
            ("CloudPubSubDeadLetterSourceDeliveryCount", "5"),
            ("CloudPubSubDeadLetterSourceSubscription", "billing-sub"),
            ("CloudPubSubDeadLetterSourceSubscriptionProject", "shop"),
            ("CloudPubSubDeadLetterSourceTopicPublishTime", "2025-11-24T16:00:00.000+00:00"),
            ("CloudPubSubDeadLetterSourceDeliveryErrorMessage", "schema mismatch"),
        )
    )
    assert u.format == "pubsub"
    assert failure(u) == (None, None, "schema mismatch", "billing-sub", None, 5)
    assert origin(u) == (None, None, None, None, SENT_MS)


def test_pulsars_properties_tell_the_topic_and_the_attempts() -> None:
    u = decode(
        kafka(
            ("REAL_TOPIC", "persistent://shop/sales/orders"),
            ("REAL_SUBSCRIPTION", "billing"),
            ("ORIGIN_MESSAGE_ID", "12:34:0"),
            ("RECONSUMETIMES", "3"),
        )
    )
    assert (u.format, u.origin_topic, u.component, u.attempts) == (
        "pulsar",
        "persistent://shop/sales/orders",
        "billing",
        3,
    )
    assert u.origin is None
