"""The export format: one dead letter a line, JSON, its bytes in base64, so that nothing of it is lost or interpreted.

Kafka::

    {"transport": "kafka", "topic", "partition", "offset", "timestamp_ms", "key_b64", "value_b64",
     "headers": [[name, value_b64 | null], …]}

SQS, as boto3 returns it but with ``BinaryValue`` in base64::

    {"transport": "sqs", "body", "attributes": {…},
     "message_attributes": {name: {"DataType", "StringValue" | "BinaryValue"}, …}}

boto3's own spelling (``MessageId``, which may stand there as ``message_id``, ``Body``, ``Attributes``,
``MessageAttributes``) is read too; what is missing is not known.
"""

from __future__ import annotations

import binascii
from base64 import b64decode, b64encode
from typing import Any

import msgspec

from dlq.archive import Stored
from dlq.entry import Headers, Record


class BadExport(ValueError):
    """A line is no export of a dead letter; the message says what is wrong with it, without quoting it."""


def exported(stored: Stored, topic: str | None, message_id: str | None = None) -> bytes:
    """An archived record as a line; ``topic`` is the Kafka topic's name, ``message_id`` the SQS message's."""
    if stored.pos is None:
        return msgspec.json.encode(_message(stored, message_id)) + b"\n"
    line = {
        "transport": "kafka",
        "topic": topic,
        "partition": stored.part,
        "offset": stored.pos,
        "timestamp_ms": stored.timestamp_ms,
        "key_b64": _text(stored.key),
        "value_b64": _text(stored.value),
        "headers": [[name, _text(value)] for name, value in stored.headers],
    }
    return msgspec.json.encode(line) + b"\n"


def _message(stored: Stored, message_id: str | None) -> dict[str, Any]:
    attributes: dict[str, Any] = {}
    for (name, value), kind in zip(stored.headers, stored.types, strict=True):
        content = value or b""
        attributes[name] = {
            "DataType": kind,
            **(
                {"BinaryValue": _text(content)}
                if kind.startswith("Binary")
                else {"StringValue": content.decode("utf-8", "replace")}
            ),
        }
    return {
        "transport": "sqs",
        **({"message_id": message_id} if message_id else {}),
        "body": None if stored.value is None else stored.value.decode("utf-8", "surrogatepass"),
        "attributes": dict(stored.system),
        "message_attributes": attributes,
    }


def imported(line: bytes) -> Record:
    """The record of a line; the topic is not part of it, as a record does not know its queue.

    :raises BadExport: when it is none.
    """
    try:
        found = msgspec.json.decode(line)
    except msgspec.DecodeError as error:
        raise BadExport(f"not JSON: {error}") from None
    except RecursionError:
        raise BadExport("not JSON: nested too deep") from None
    except UnicodeDecodeError:
        raise BadExport("not UTF-8") from None
    if not isinstance(found, dict):
        raise BadExport("not a JSON object")
    transport = found.get("transport")
    if transport == "kafka":
        return _from_kafka(found)
    if transport == "sqs":
        return _from_sqs(found)
    raise BadExport('its transport is neither "kafka" nor "sqs"')


def _from_kafka(found: dict[str, Any]) -> Record:
    part, pos, when = (_number(found, key) for key in ("partition", "offset", "timestamp_ms"))
    return Record(
        part or 0,
        "" if pos is None else str(pos),
        pos,
        _bytes(found.get("key_b64"), "key_b64"),
        _bytes(found.get("value_b64"), "value_b64"),
        _headers(found.get("headers") or []),
        None if when is None or when < 0 else when,  # a broker's -1 is none
    )


def _headers(given: Any) -> Headers:
    if not isinstance(given, list) or not all(
        isinstance(each, list) and len(each) == 2 and isinstance(each[0], str) for each in given
    ):
        raise BadExport("headers is no list of [name, value_b64 or null]")
    return tuple((name, _bytes(value, "a header's value")) for name, value in given)


def _from_sqs(found: dict[str, Any]) -> Record:
    """A message's attributes are to a decoder what headers are; its body is the value."""
    body = _either(found, "body", "Body")
    if not isinstance(body, (str, type(None))):
        raise BadExport("body is no text")
    system = tuple(
        (name, value if isinstance(value, str) else str(value))
        for name, value in _objects(found, "attributes", "Attributes").items()
        if isinstance(value, (str, int))
    )
    headers: list[tuple[str, bytes | None]] = []
    types: list[str] = []
    for name, each in _objects(found, "message_attributes", "MessageAttributes").items():
        if not isinstance(each, dict):
            raise BadExport("message_attributes is no object of objects")
        text, binary = each.get("StringValue"), each.get("BinaryValue")
        value = text.encode() if isinstance(text, str) else _bytes(binary, f"BinaryValue of {name!r}")
        headers.append((name, value))
        types.append(str(each.get("DataType") or ("String" if isinstance(text, str) else "Binary")))
    sent = dict(system).get("SentTimestamp", "")
    return Record(
        0,
        str(_either(found, "message_id", "MessageId") or ""),
        None,
        None,
        None if body is None else body.encode(),
        tuple(headers),
        int(sent) if sent.isascii() and sent.isdigit() and len(sent) < 16 else None,
        types=tuple(types),
        system=system,
        transport="sqs",
    )


def _either(found: dict[str, Any], ours: str, theirs: str) -> Any:
    return found[ours] if ours in found else found.get(theirs)


def _objects(found: dict[str, Any], ours: str, theirs: str) -> dict[str, Any]:
    value = _either(found, ours, theirs) or {}
    if not isinstance(value, dict):
        raise BadExport(f"{ours} is no object")
    return value


def _number(found: dict[str, Any], key: str) -> int | None:
    value = found.get(key)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
        raise BadExport(f"{key} is no whole number")
    return value


def _text(value: bytes | None) -> str | None:
    return None if value is None else b64encode(value).decode()


def _bytes(value: Any, key: str) -> bytes | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise BadExport(f"{key} is no base64 text")
    try:
        return b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        raise BadExport(f"{key} is no base64") from None
