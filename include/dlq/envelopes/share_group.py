"""Kafka share groups (KIP-1191): the broker itself writes the dead letter.

Source: ``ShareGroupDLQStateManager`` of Apache Kafka 4.4. All text, numbers in decimal. Where the topic's name is not
known any more its id stands for it. The original's headers are never copied, its key and value only where the group is
configured so: by default the record is a pointer. The timestamp is that of the dead letter.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet

from dlq.entry import Understood
from dlq.envelopes import pointer
from dlq.envelopes.letter import Letter
from dlq.envelopes.untrusted import INT32, INT64, identifier, label, message, number, topic

name = "kafka-share-group"

_PREFIX = "__dlq.errors."


def owns(header: str) -> bool:
    """All under the broker's prefix."""
    return header.startswith(_PREFIX)


def recognises(names: AbstractSet[str]) -> bool:
    """One header under the prefix is enough."""
    return any(map(owns, names))


def read(letter: Letter) -> Understood:
    """The broker knows no exception: that a consumer rejected the record, or that its deliveries ran out."""
    get, record = letter.last.get, letter.record
    found = Understood(
        name,
        None,
        None,
        message(get("__dlq.errors.message")),
        label(get("__dlq.errors.group")),
        None,
        number(get("__dlq.errors.delivery.count"), INT32),
        record.timestamp_ms,
        topic(get("__dlq.errors.topic")),
        number(get("__dlq.errors.partition"), INT32),
        number(get("__dlq.errors.offset"), INT64),
        None,
        identifier(get("__dlq.errors.group")),
    )
    if record.key is None and record.value is None:
        found.pointer = pointer.kafka(found.origin_topic, found.origin_partition, found.origin_offset)
    return found
