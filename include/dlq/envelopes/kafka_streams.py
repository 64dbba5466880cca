"""Kafka Streams' dead-letter topic (KIP-1034).

Source: ``ExceptionHandlerUtils`` of kafka-streams 4.3. The record's own headers come first, then Streams', all text,
numbers in decimal (``-1`` and null where there is no record); the message may be null. Headers are appended at each
hop: the first origin is the true one, the last exception the latest. The timestamp is the original's.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet

from dlq.entry import Understood
from dlq.envelopes import pointer, trace
from dlq.envelopes.letter import Letter
from dlq.envelopes.untrusted import INT32, INT64, label, message, number, topic

name = "kafka-streams"

_PREFIX = "__streams.errors."


def owns(header: str) -> bool:
    """All under Streams' prefix."""
    return header.startswith(_PREFIX)


def recognises(names: AbstractSet[str]) -> bool:
    """One header under the prefix is enough."""
    return any(map(owns, names))


def read(letter: Letter) -> Understood:
    """Of a failed send Streams writes neither key nor value: the record that was processed lies at the origin."""
    first, last = letter.first.get, letter.last.get
    record = letter.record
    chain = trace.causes(last("__streams.errors.stacktrace"))
    found = Understood(
        name,
        label(last("__streams.errors.exception")),
        trace.telling(chain),
        message(last("__streams.errors.message")),
        None,
        None,
        None,
        None,
        topic(first("__streams.errors.topic")),
        number(first("__streams.errors.partition"), INT32),
        number(first("__streams.errors.offset"), INT64),
        record.timestamp_ms,
        causes=chain,
    )
    if record.key is None and record.value is None:
        found.pointer = pointer.kafka(found.origin_topic, found.origin_partition, found.origin_offset)
    return found
