"""EventBridge: events that a rule's target refused, invocations that a schedule could not make, and batches of a custom
bus.

Sources: the documentation of dead-letter queues of rules, of the Scheduler and of custom buses. A rule's attributes
are all text and the body is the event; ``EXHAUSTED_RETRY_CONDITION`` (``MaximumRetryAttempts`` or
``MaximumEventAgeInSeconds``) is absent where nothing was retried. A custom bus writes one JSON body for many events,
none of them inside.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet

from dlq.entry import Understood
from dlq.envelopes import body
from dlq.envelopes.letter import Letter
from dlq.envelopes.untrusted import INT32, identifier, iso, label, message, number

_SHARED = frozenset(
    {"TARGET_ARN", "ERROR_CODE", "ERROR_MESSAGE", "RETRY_ATTEMPTS", "EXHAUSTED_RETRY_CONDITION"}
)


class Rule:
    """An event that a rule could not deliver to one of its targets."""

    name = "eventbridge"
    _own = frozenset({"RULE_ARN"})

    def owns(self, name: str) -> bool:
        """All the attributes it adds."""
        return name in self._own or name in _SHARED

    def recognises(self, names: AbstractSet[str]) -> bool:
        """Its own attribute, or two of those that rules and schedules share."""
        return not self._own.isdisjoint(names) or len(_SHARED & names) > 1

    def read(self, letter: Letter) -> Understood:
        """The target is the failing component, the rule who sent it there, the stage which limit ended the retries."""
        get = letter.last.get
        found = _failed(
            self.name,
            get("ERROR_CODE"),
            get("ERROR_MESSAGE"),
            get("TARGET_ARN"),
            get("EXHAUSTED_RETRY_CONDITION"),
            get("RETRY_ATTEMPTS"),
        )
        self._event(letter, found)
        return found

    def _event(self, letter: Letter, into: Understood) -> None:
        into.consumer_group = identifier(letter.last.get("RULE_ARN"))
        into.origin_timestamp_ms = iso(body.text(body.fields(letter.record.value).get("time")))


class Schedule(Rule):
    """An invocation of EventBridge Scheduler; the body is the target's input, cut where it was too large."""

    name = "eventbridge-scheduler"
    _own = frozenset({"SCHEDULE_ARN", "SCHEDULED_TIME", "EXECUTION_ID", "IS_PAYLOAD_TRUNCATED"})

    def recognises(self, names: AbstractSet[str]) -> bool:
        """One of its own attributes."""
        return not self._own.isdisjoint(names)

    def _event(self, letter: Letter, into: Understood) -> None:
        get = letter.last.get
        schedule = identifier(get("SCHEDULE_ARN"))
        into.consumer_group = schedule
        into.origin_timestamp_ms = iso(get("SCHEDULED_TIME"))
        into.correlation_id = identifier(get("EXECUTION_ID"))
        if (get("IS_PAYLOAD_TRUNCATED") or b"").lower() == b"true":
            into.pointer = f"truncated:{schedule or ''}"


BUS = "eventbridge-bus"


def batch(raw: bytes) -> Understood | None:
    """What a custom bus could not deliver to a subscriber; None where the body is no such record."""
    if b'"failedMessages"' not in raw or b'"subscriberArn"' not in raw:
        return None
    record = body.fields(raw)
    bus = body.text(record.get("busArn"))
    failed = body.value(record.get("failedMessages"))
    if bus is None or not isinstance(failed, list):
        return None
    text = {key: body.text(record.get(key)) for key in record if key != "failedMessages"}
    found = _failed(
        BUS,
        text.get("errorCode"),
        text.get("errorMessage"),
        text.get("targetArn"),
        text.get("exhaustedRetryCondition"),
        text.get("retryAttempts"),
    )
    found.consumer_group = identifier(text.get("subscriberArn"))
    found.pointer = f"eventbridge://{label(bus) or ''}?events={len(failed)}"
    return found


def _failed(
    name: str,
    code: bytes | None,
    said: bytes | None,
    target: bytes | None,
    condition: bytes | None,
    retries: bytes | None,
) -> Understood:
    retried = number(retries, INT32 - 1)
    return Understood(
        name,
        label(code),
        None,
        message(said),
        label(target),
        label(condition),
        None if retried is None else retried + 1,
        retries=retried,
    )
