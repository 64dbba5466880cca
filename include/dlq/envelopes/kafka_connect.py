"""Kafka Connect sinks with ``errors.deadletterqueue.context.headers.enable``; Debezium's come through them too.

Source: ``DeadLetterQueueReporter`` of Apache Kafka 4. All text, numbers in decimal; exception and message may be null.
Early versions kept the first of a repeated header, later ones append: the first origin is the true one, the last
exception the latest. Key, value, headers and timestamp are the original's.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet

from dlq.entry import Understood
from dlq.envelopes import trace
from dlq.envelopes.letter import Letter
from dlq.envelopes.untrusted import INT32, INT64, identifier, label, message, number, topic

name = "kafka-connect"

_PREFIX = "__connect.errors."


def owns(header: str) -> bool:
    """All under Connect's prefix."""
    return header.startswith(_PREFIX)


def recognises(names: AbstractSet[str]) -> bool:
    """One header under the prefix is enough."""
    return any(map(owns, names))


def read(letter: Letter) -> Understood:
    """The connector is the failing component; the class that executed is in the stack trace. The group is the one that
    a connector has unless configured otherwise.
    """
    first, last = letter.first.get, letter.last.get
    connector = label(last("__connect.errors.connector.name"))
    group = identifier(first("__connect.errors.connector.name"))
    chain = trace.causes(last("__connect.errors.exception.stacktrace"))
    return Understood(
        name,
        label(last("__connect.errors.exception.class.name")),
        trace.telling(chain),
        message(last("__connect.errors.exception.message")),
        connector,
        label(last("__connect.errors.stage")),
        None,
        None,
        topic(first("__connect.errors.topic")),
        number(first("__connect.errors.partition"), INT32),
        number(first("__connect.errors.offset"), INT64),
        letter.record.timestamp_ms,
        None if group is None else f"connect-{group}",
        causes=chain,
    )
