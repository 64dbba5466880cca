"""The export format: nothing of a dead letter is lost, and what is no export is named."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlq.archive import Stored
from dlq.export import BadExport, exported, imported

maybe_bytes = st.none() | st.binary(max_size=40)
records = st.builds(
    Stored,
    part=st.integers(0, 1000),
    pos=st.integers(0, 2**62),
    key=maybe_bytes,
    value=maybe_bytes,
    headers=st.lists(st.tuples(st.text(max_size=10), maybe_bytes), max_size=5).map(tuple),
    timestamp_ms=st.none() | st.integers(0, 2**52),
)


@given(records)
def test_a_record_comes_back_byte_for_byte(stored: Stored) -> None:
    line = exported(stored, "orders.dlq")
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    record = imported(line)
    assert (record.part, record.pos, record.key, record.value, record.headers, record.timestamp_ms) == (
        stored.part,
        stored.pos,
        stored.key,
        stored.value,
        stored.headers,
        stored.timestamp_ms,
    )
    assert json.loads(line)["topic"] == "orders.dlq"


def test_a_queue_message_is_read_with_its_attributes_as_headers() -> None:
    line = {
        "transport": "sqs",
        "body": '{"order": 1}',
        "attributes": {"SentTimestamp": "1764000000000"},
        "message_attributes": {
            "correlation-id": {"DataType": "String", "StringValue": "c-1"},
            "blob": {"DataType": "Binary", "BinaryValue": "AP8="},
        },
    }
    record = imported(json.dumps(line).encode())
    assert record.transport == "sqs"
    assert record.value == b'{"order": 1}'
    assert record.headers == (("correlation-id", b"c-1"), ("blob", b"\x00\xff"))
    assert record.types == ("String", "Binary")
    assert record.system == (("SentTimestamp", "1764000000000"),)
    assert (record.timestamp_ms, record.place, record.pos) == (1764000000000, "", None)


def test_a_queue_message_is_read_as_boto3_spells_it_too() -> None:
    line = {
        "transport": "sqs",
        "MessageId": "m-1",
        "Body": "µ",
        "Attributes": {"ApproximateReceiveCount": 3},
        "MessageAttributes": {
            "n": {"DataType": "Number.int", "StringValue": "7"},
            "nothing": {"DataType": "String"},
            "untyped": {"BinaryValue": "AA=="},
        },
    }
    record = imported(json.dumps(line).encode())
    assert (record.place, record.value, record.timestamp_ms) == ("m-1", "µ".encode(), None)
    assert record.headers == (("n", b"7"), ("nothing", None), ("untyped", b"\x00"))
    assert record.types == ("Number.int", "String", "Binary")
    assert record.system == (("ApproximateReceiveCount", "3"),)


def test_a_message_of_which_next_to_nothing_was_exported_is_read() -> None:
    record = imported(b'{"transport": "sqs"}')
    assert (record.value, record.headers, record.system, record.timestamp_ms) == (None, (), (), None)
    assert imported(b'{"transport": "sqs", "attributes": {"SentTimestamp": "soon"}}').timestamp_ms is None


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (b"{", "not JSON"),
        (b"[]", "not a JSON object"),
        (b"{}", "transport"),
        ({"transport": "kafka", "key_b64": "?"}, "key_b64 is no base64"),
        ({"transport": "kafka", "value_b64": 1}, "value_b64 is no base64 text"),
        ({"transport": "kafka", "partition": "0"}, "partition is no whole number"),
        ({"transport": "kafka", "offset": True}, "offset is no whole number"),
        ({"transport": "kafka", "headers": [["a"]]}, "headers"),
        ({"transport": "kafka", "headers": {"a": "b"}}, "headers"),
        ({"transport": "sqs", "body": 1}, "body is no text"),
        ({"transport": "sqs", "message_attributes": []}, None),
        ({"transport": "sqs", "message_attributes": {"a": "b"}}, "message_attributes"),
        ({"transport": "sqs", "attributes": ["a"]}, "attributes is no object"),
        ({"transport": "sqs", "message_attributes": {"a": {"BinaryValue": "?"}}}, "BinaryValue of 'a'"),
        (rb'{"transport": "sqs", "body": "\ud800"}', "not JSON"),
        (b'{"transport": "sqs", "body": "\xff"}', "not UTF-8"),
        (b'{"transport": ' + b"[" * 100_000, "not JSON"),
    ],
)
def test_what_is_no_export_is_said_to_be_none(line: Any, what: str | None) -> None:
    raw = line if isinstance(line, bytes) else json.dumps(line).encode()
    if what is None:
        assert imported(raw).headers == ()
        return
    with pytest.raises(BadExport, match=what):
        imported(raw)


def test_a_time_of_minus_one_is_none() -> None:
    assert imported(b'{"transport": "kafka", "timestamp_ms": -1}').timestamp_ms is None


@given(st.binary(max_size=60))
def test_hostile_bytes_are_refused_in_words(line: bytes) -> None:
    with pytest.raises(BadExport):
        imported(line)
