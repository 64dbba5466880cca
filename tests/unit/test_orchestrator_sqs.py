"""A message of SQS as the orchestrator's record: whatever it carries, no byte is lost and nothing raises."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from dlq_orchestrator.sqs_queue import SqsRecord, record_of


def message(body: str = "{}", **attributes: Any) -> dict[str, Any]:
    return {
        "MessageId": "m1",
        "ReceiptHandle": "r1",
        "Body": body,
        "Attributes": {"ApproximateReceiveCount": "2"},
        "MessageAttributes": attributes,
    }


def text(value: str) -> dict[str, Any]:
    return {"DataType": "String", "StringValue": value}


def replay(**ours: Any) -> SqsRecord:
    return record_of(message(dlq=text(json.dumps(ours))))


def test_attributes_of_every_type_are_headers():
    record = record_of(
        message(
            "body",
            text=text("é"),
            number={"DataType": "Number.int", "StringValue": "7"},
            bytes={"DataType": "Binary.gzip", "BinaryValue": b"\x00\xff"},
            empty={"DataType": "Binary", "BinaryValue": b""},
        )
    )
    assert record.headers == [
        ("text", "é".encode()),
        ("number", b"7"),
        ("bytes", b"\x00\xff"),
        ("empty", b""),
    ]
    assert (record.place, record.value, record.receipt, record.receives) == ("m1", b"body", "r1", 2)


def test_a_message_without_attributes_is_no_replay():
    plain = message()
    del plain["MessageAttributes"]
    record = record_of(plain)
    assert (record.replay_key, record.retry_count, record.headers) == (None, 0, [])


def test_a_replays_attribute_overrides_what_the_message_says_of_itself():
    record = record_of(
        message(
            **{
                "dlq": text('{"drain":"d","job":"j","ordinal":1,"entry":"e","key":"k","retry":2,"ts":1}'),
                "retry-count": text("9"),
                "dlq-key": text("another's"),
            }
        )
    )
    assert record.retry_count == 2
    # Kafka's own headers are not SQS's: where both are there, the later one holds as it does on Kafka
    assert record.replay_key == "another's"


def test_half_a_replay_is_read_as_far_as_it_goes():
    assert (replay(key="k").replay_key, replay(key="k").retry_count) == ("k", 0)
    assert (replay(retry=3).replay_key, replay(retry=3).retry_count) == (None, 3)
    for broken in ({"key": 7, "retry": 1}, {"key": None}, {"retry": "1"}, {"retry": -1}, {}):
        assert replay(**broken).retry_count == 0
        assert replay(**broken).replay_key is None


@given(
    body=st.text(),
    attributes=st.dictionaries(
        st.sampled_from(["dlq", "correlation-id", "retry-count", "x"]),
        st.one_of(
            st.text().map(text),
            st.binary().map(lambda raw: {"DataType": "Binary", "BinaryValue": raw}),
            st.builds(
                lambda key, retry: text(json.dumps({"key": key, "retry": retry})), st.text(), st.integers()
            ),
        ),
    ),
)
def test_any_message_is_a_record_with_its_bytes(body, attributes):
    record = record_of(message(body, **attributes))
    assert record.value == body.encode()
    named = dict(record.headers)
    for name, attribute in attributes.items():
        raw = attribute.get("BinaryValue")
        assert named[name] == (attribute["StringValue"].encode() if raw is None else raw)
    assert record.retry_count >= 0
    assert record.replay_key is None or record.replay_key.isprintable()


def test_half_a_surrogate_pair_is_no_utf8_and_raises_nothing():
    assert record_of(message("\ud800", x=text("\udfff"))).value == b"\xed\xa0\x80"
