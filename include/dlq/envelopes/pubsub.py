"""Google Pub/Sub's dead letters, bridged in with their attributes.

Source: the documentation of Pub/Sub dead-letter topics. All text; the count is of deliveries, the time is that of the
original's publication.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet

from dlq.entry import Understood
from dlq.envelopes.letter import Letter
from dlq.envelopes.untrusted import INT32, identifier, iso, label, message, number

name = "pubsub"

_PREFIX = "CloudPubSubDeadLetterSource"


def owns(header: str) -> bool:
    """All under the service's prefix."""
    return header.startswith(_PREFIX)


def recognises(names: AbstractSet[str]) -> bool:
    """One attribute under the prefix is enough."""
    return any(map(owns, names))


def read(letter: Letter) -> Understood:
    """The subscription is who failed; only a push or an export says why."""
    get = letter.last.get
    subscription = get(f"{_PREFIX}Subscription")
    return Understood(
        name,
        None,
        None,
        message(get(f"{_PREFIX}DeliveryErrorMessage")),
        label(subscription),
        None,
        number(get(f"{_PREFIX}DeliveryCount"), INT32),
        origin_timestamp_ms=iso(get(f"{_PREFIX}TopicPublishTime")),
        consumer_group=identifier(subscription),
    )
