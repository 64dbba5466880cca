"""Lambda's dead-letter queue for asynchronous invocations: the body is the event, the error lies in attributes.

Source: messages recorded against the service. ``ErrorCode`` is the invocation's HTTP status: 200 where the function
itself failed. Through SNS the same attributes are inside its envelope.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet

from dlq.entry import Understood
from dlq.envelopes.letter import Letter
from dlq.envelopes.untrusted import identifier, message, number

name = "lambda-dlq"

_NAMES = frozenset({"RequestID", "ErrorCode", "ErrorMessage"})


def owns(attribute: str) -> bool:
    """The error; the request's id may be the message's own."""
    return attribute in ("ErrorCode", "ErrorMessage")


def recognises(names: AbstractSet[str]) -> bool:
    """Two of the three: each alone is anybody's."""
    return len(_NAMES & names) > 1


def read(letter: Letter) -> Understood:
    """Only the message is told, neither the error's class nor the function."""
    get = letter.last.get
    status = number(get("ErrorCode"), 599)
    return Understood(
        name,
        None,
        None,
        message(get("ErrorMessage")),
        correlation_id=identifier(get("RequestID")),
        http_status=status if status is not None and status >= 400 else None,
    )
