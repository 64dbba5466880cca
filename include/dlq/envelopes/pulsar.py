"""Pulsar's dead-letter and retry topics, bridged in with their properties.

Source: ``RetryMessageUtil`` of the Java client. The id of a message there is no Kafka offset: of the origin only the
topic is known. ``RECONSUMETIMES`` is raised before each sending, also the last to the dead-letter topic: it is the
attempts.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet

from dlq.entry import Understood
from dlq.envelopes.letter import Letter
from dlq.envelopes.untrusted import INT32, identifier, label, number

name = "pulsar"

_NAMES = frozenset(
    {
        "REAL_TOPIC",
        "REAL_SUBSCRIPTION",
        "RETRY_TOPIC",
        "ORIGIN_MESSAGE_ID",
        "ORIGIN_MESSAGE_IDY_TIME",  # as older clients have it
        "RECONSUMETIMES",
        "DELAY_TIME",
    }
)


def owns(header: str) -> bool:
    """The properties that the client adds on its way to the retry and dead-letter topics."""
    return header in _NAMES


def recognises(names: AbstractSet[str]) -> bool:
    """The topic or the count."""
    return "REAL_TOPIC" in names or "RECONSUMETIMES" in names


def read(letter: Letter) -> Understood:
    """No error is recorded."""
    get = letter.last.get
    subscription, times = get("REAL_SUBSCRIPTION"), number(get("RECONSUMETIMES"), INT32)
    return Understood(
        name,
        None,
        None,
        None,
        label(subscription),
        attempts=times,
        origin_topic=identifier(get("REAL_TOPIC")),
        consumer_group=identifier(subscription),
        retries=times,
    )
