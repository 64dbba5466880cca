"""MassTransit's error and skipped queues (.NET).

Source: ``MessageHeaders``, ``SendContextExtensions.SetExceptionHeaders`` and the JSON message envelope of MassTransit.
All text; the exception is the innermost one; a transport may carry only a part of the headers (SQS: reason, message
and address). The body is an envelope that carries the ids.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet

from dlq.entry import Understood
from dlq.envelopes import body
from dlq.envelopes.letter import Letter
from dlq.envelopes.untrusted import INT32, identifier, iso, label, message, number

name = "masstransit"


def owns(header: str) -> bool:
    """The reason and all of the fault."""
    return header == "MT-Reason" or header.startswith("MT-Fault-")


def recognises(names: AbstractSet[str]) -> bool:
    """One of them is enough."""
    return any(map(owns, names))


def read(letter: Letter) -> Understood:
    """What was skipped rather than failed has no exception: its reason is all there is to say."""
    get = letter.last.get
    said = get("MT-Fault-Message")
    if said is None and (reason := get("MT-Reason")) != b"fault":
        said = reason
    retries = number(get("MT-Fault-RetryCount"), INT32 - 1)
    consumer = get("MT-Fault-ConsumerType")
    envelope = body.fields(letter.record.value)
    correlation = body.text(envelope.get("correlationId")) or body.text(envelope.get("conversationId"))
    return Understood(
        name,
        label(get("MT-Fault-ExceptionType")),
        None,
        message(said),
        label(consumer),
        None,
        None if retries is None else retries + 1,
        iso(get("MT-Fault-Timestamp")),
        None,
        None,
        None,
        iso(body.text(envelope.get("sentTime"))),
        identifier(consumer),
        identifier(correlation),
        origin_queue=identifier(get("MT-Fault-InputAddress")),
        retries=retries,
    )
