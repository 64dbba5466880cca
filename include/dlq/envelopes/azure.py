"""Azure Service Bus' dead letters, bridged in with their properties.

Source: the documentation of Service Bus dead-letter queues: ``DeadLetterReason`` is the broker's
(``MaxDeliveryCountExceeded``, ``TTLExpiredException`` …) or the application's own.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet

from dlq.entry import Understood
from dlq.envelopes.letter import Letter
from dlq.envelopes.untrusted import INT32, identifier, label, message, number

name = "azure-service-bus"

_NAMES = frozenset({"DeadLetterReason", "DeadLetterErrorDescription", "DeadLetterSource"})


def owns(header: str) -> bool:
    """The three the broker adds."""
    return header in _NAMES


def recognises(names: AbstractSet[str]) -> bool:
    """A reason or a description."""
    return "DeadLetterReason" in names or "DeadLetterErrorDescription" in names


def read(letter: Letter) -> Understood:
    """The reason is the error, the description what it says."""
    get = letter.last.get
    return Understood(
        name,
        label(get("DeadLetterReason")),
        None,
        message(get("DeadLetterErrorDescription")),
        attempts=number(get("DeliveryCount"), INT32),
        origin_queue=identifier(get("DeadLetterSource")),
    )
