"""Explain of a file: each line has its answer in the shape of docs/formats.md, and no line ends it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.letters import kafka

from dlq.archive import Archive, Rows, Stored, segment_table
from dlq.config import Owners
from dlq.entry import Record
from dlq.explain import BadLine, explained
from dlq.export import exported
from dlq.grouping.classify import Classifier
from dlq.grouping.taxonomy import load_taxonomy
from dlq.sources.sqs import recorded

FORMATS = (Path(__file__).parents[2] / "docs" / "formats.md").read_text()
CLASSIFIER = Classifier(load_taxonomy(), Owners())

SHAPE = {
    "format": None,
    "origin": dict.fromkeys(("topic", "queue", "partition", "offset", "timestamp_ms")),
    "failure": dict.fromkeys(("error_type", "cause_type", "message", "component", "stage", "attempts")),
    **dict.fromkeys(
        (
            "correlation_id",
            "trace_id",
            "dedupe_key",
            "retry_count",
            "pointer",
            "category",
            "remedy",
            "rule",
            "why",
            "fingerprint",
        )
    ),
}
"""The keys of an answer, and of its objects."""


def answers(*lines: bytes) -> list[Any]:
    return list(explained(lines, CLASSIFIER))


def shape(answer: dict[str, Any]) -> dict[str, Any]:
    return {k: dict.fromkeys(v) if isinstance(v, dict) else None for k, v in answer.items()}


LETTER = b'{"transport": "kafka", "headers": [["wf-error-type", "VGltZW91dA=="]]}'


def test_an_answer_has_the_keys_it_is_to_have_whether_known_or_not() -> None:
    for answer in answers(LETTER, b'{"transport": "kafka"}', b'{"transport": "sqs"}'):
        assert shape(answer) == SHAPE


def test_every_key_is_in_the_page() -> None:
    table = FORMATS[FORMATS.index("## What is understood") : FORMATS.index("## A format of your own")]
    named = {name.rpartition(".")[2] for name in re.findall(r"`([a-z_.]+)`", table)}
    assert {*SHAPE, *SHAPE["origin"], *SHAPE["failure"]} <= named | {"origin", "failure"}


@pytest.mark.parametrize(
    "line",
    [
        pytest.param(LETTER + b"\r\n", id="CRLF"),
        pytest.param(b"\xef\xbb\xbf" + LETTER + b"\n", id="byte order mark"),
        pytest.param(b"  " + LETTER + b"\t \n", id="blanks"),
        pytest.param(LETTER, id="no newline at the end"),
    ],
)
def test_how_a_line_ends_or_begins_is_all_one(line: bytes) -> None:
    (answer,) = answers(line)
    assert answer["failure"]["error_type"] == "Timeout"


def test_lines_are_counted_with_the_empty_ones() -> None:
    found = answers(b"\n", LETTER, b"\r\n", b"{]\n", b"   \n", b'{"transport": "sqs"}')
    assert [type(each) for each in found] == [dict, BadLine, dict]
    assert found[1].number == 4


def test_a_file_of_nothing_but_a_byte_order_mark_has_no_answer() -> None:
    assert answers(b"\xef\xbb\xbf\r\n") == []


@pytest.mark.parametrize(
    "line",
    [
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"\xff\xfe{\x00",
        b"null",
        b'"text"',
        b"1e999",
        b'{"transport": ["kafka"]}',
    ],
    ids=lambda line: repr(line[:12]),
)
def test_a_line_that_is_none_is_named_and_the_next_is_explained(line: bytes) -> None:
    bad, good = answers(line, LETTER)
    assert isinstance(bad, BadLine)
    assert bad.number == 1
    assert good["failure"]["error_type"] == "Timeout"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
keys = st.sampled_from(
    [
        *("topic", "partition", "offset", "timestamp_ms", "key_b64", "value_b64", "headers", "message_id"),
        *("body", "Body", "attributes", "Attributes", "message_attributes", "MessageAttributes"),
    ]
)


@given(st.sampled_from(["kafka", "sqs"]), st.dictionaries(keys, json_values, max_size=6))
def test_whatever_a_line_holds_it_has_an_answer_or_a_reason(transport: str, rest: dict[str, Any]) -> None:
    (found,) = answers(json.dumps({**rest, "transport": transport}).encode())
    if not isinstance(found, BadLine):
        assert shape(found) == SHAPE
        json.dumps(found)


def of_sqs(message: dict[str, Any]) -> Record:
    return recorded({"MessageId": "m-1", "ReceiptHandle": "r", **message})


RECORDS: Sequence[Record] = (
    kafka(
        ("wf-error-type", b"RateLimit"),
        ("wf-origin-topic", b"orders"),
        ("dedupe-key", b"d-1"),
        ("blob", b"\xff"),
    ),
    kafka(),
    of_sqs({"Body": "plain é", "Attributes": {"SentTimestamp": "1764000000000"}}),
    of_sqs(
        {
            "Body": "{}",
            "Attributes": {
                "DeadLetterQueueSourceArn": "arn:aws:sqs:eu-west-1:111122223333:billing.fifo",
                "SequenceNumber": "18",
                "SentTimestamp": "1764000000000",
                "MessageDeduplicationId": "m-1",  # as SQS sets it when it moves: no key of the sender's
                "MessageGroupId": "g",
            },
            "MessageAttributes": {
                "correlation-id": {"DataType": "String", "StringValue": "c-1"},
                "n": {"DataType": "Number.int", "StringValue": "7"},
                "blob": {"DataType": "Binary.gif", "BinaryValue": b"\x00\xff"},
            },
        }
    ),
)


@pytest.mark.parametrize("record", RECORDS)
def test_an_archived_entry_is_explained_from_its_export_as_the_drain_read_it(
    record: Record, tmp_path: Path
) -> None:
    what, group = CLASSIFIER.classify(record)
    archive = Archive(str(tmp_path), "q")
    about = {"queue": "q", "source": "s", "drain": "d", "epoch": 1, "ledger": "l", "ranges": []}
    written = archive.write("segments/d", segment_table([record], [what], [group]), about)
    stored: Stored = Rows(archive.read(written.uri))[0]
    (answer,) = answers(exported(stored, "orders.dlq", record.place))
    assert answer["fingerprint"] == group.fingerprint
    assert answer["dedupe_key"] == what.dedupe_key
    assert answer["correlation_id"] == what.correlation_id
    assert answer["format"] == what.format
    assert answer["origin"] == {
        name: getattr(what, f"origin_{name}")
        for name in ("topic", "queue", "partition", "offset", "timestamp_ms")
    }
    assert answer["failure"] == {name: getattr(what, name) for name in SHAPE["failure"]}
