"""Dead letters as their producers write them, for the tests of whoever reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from struct import pack
from typing import Any

from dlq.entry import Record, Understood
from dlq.envelopes import decode

DEAD_MS = 1_764_000_100_000
"""When the letters here were dead-lettered, epoch ms."""
SENT_MS = 1_764_000_000_000
"""When their originals were sent, epoch ms."""
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"

Pairs = tuple[tuple[str, bytes | str | None], ...]


def be32(number: int) -> bytes:
    """As ``ByteBuffer.putInt`` writes it."""
    return pack(">i", number)


def be64(number: int) -> bytes:
    """As ``ByteBuffer.putLong`` writes it."""
    return pack(">q", number)


def kafka(
    *headers: tuple[str, bytes | str | None],
    key: bytes | None = b"key",
    value: bytes | None = b"value",
    timestamp_ms: int | None = DEAD_MS,
) -> Record:
    """A record of a dead-letter topic; a header given as text is UTF-8."""
    pairs = tuple((name, v.encode() if isinstance(v, str) else v) for name, v in headers)
    return Record(1, "7", 7, key, value, pairs, timestamp_ms)


def sqs(
    body: str | Mapping[str, Any] | list[Any] = "{}",
    attributes: Mapping[str, str | bytes] | None = None,
    system: Mapping[str, str] | None = None,
    message_id: str = "m-1",
) -> Record:
    """A message of a dead-letter queue; a body that is no text is written as JSON."""
    system = {"SentTimestamp": str(SENT_MS), "ApproximateReceiveCount": "4", **(system or {})}
    attributes = attributes or {}
    return Record(
        0,
        message_id,
        None,
        None,
        (body if isinstance(body, str) else json.dumps(body)).encode(),
        tuple((name, v.encode() if isinstance(v, str) else v) for name, v in attributes.items()),
        int(system["SentTimestamp"]),
        types=tuple("Binary" if isinstance(v, bytes) else "String" for v in attributes.values()),
        system=tuple(system.items()),
        transport="sqs",
    )


def failure(u: Understood) -> tuple[Any, ...]:
    return u.error_type, u.cause_type, u.message, u.component, u.stage, u.attempts


def origin(u: Understood) -> tuple[Any, ...]:
    return u.origin_topic, u.origin_queue, u.origin_partition, u.origin_offset, u.origin_timestamp_ms


def differences(whole: Record, broken: Record) -> set[str]:
    """The fields of what is understood in which two records differ."""
    a, b = decode(whole), decode(broken)
    return {name for name in a.__struct_fields__ if getattr(a, name) != getattr(b, name)}


def with_header(record: Record, name: str, value: bytes | None) -> Record:
    """The record with one header's value replaced, wherever it stands."""
    headers = tuple((n, value if n == name else v) for n, v in record.headers)
    return Record(
        record.part,
        record.place,
        record.pos,
        record.key,
        record.value,
        headers,
        record.timestamp_ms,
        types=record.types,
        system=record.system,
        transport=record.transport,
    )
