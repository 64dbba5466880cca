"""SNS' envelope around a message that was not delivered raw.

Source: messages recorded against the service: ``Type, MessageId, TopicArn, Message, Timestamp, MessageAttributes {name:
{Type, Value}}``, binary values in base64. SNS adds no error of its own.
"""

from __future__ import annotations

import binascii
from base64 import b64decode

import msgspec

from dlq.entry import Record
from dlq.envelopes import body
from dlq.envelopes.untrusted import identifier, iso

NAME = "sns"


class Envelope(msgspec.Struct, frozen=True):
    """What was published: the message as a record of its own, its topic's ARN and when (epoch ms)."""

    inside: Record
    topic: str | None
    published_ms: int | None


def opened(record: Record) -> Envelope | None:
    """The envelope in an SQS message's body; None where it holds none."""
    raw = record.value
    if raw is None or b'"TopicArn"' not in raw:
        return None
    found = body.fields(raw)
    text = body.text(found.get("Message"))
    if text is None or "TopicArn" not in found or body.text(found.get("Type")) != b"Notification":
        return None
    headers: list[tuple[str, bytes | None]] = []
    types: list[str] = []
    for name, attribute in body.fields(found.get("MessageAttributes")).items():
        each = body.fields(attribute)
        kind = body.text(each.get("Type")) or b"String"
        headers.append((name, _value(body.text(each.get("Value")), kind)))
        types.append(kind.decode())
    inside = Record(
        record.part,
        record.place,
        None,
        None,
        text,
        tuple(headers),
        record.timestamp_ms,
        types=tuple(types),
        system=record.system,
        transport="sqs",
    )
    return Envelope(inside, identifier(body.text(found["TopicArn"])), iso(body.text(found.get("Timestamp"))))


def _value(text: bytes | None, kind: bytes) -> bytes | None:
    if text is None or not kind.startswith(b"Binary"):
        return text
    try:
        return b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return text
