"""SmallRye Reactive Messaging, as Quarkus has it: the dead-letter queue, and the dead letters of delayed retries.

Sources: ``KafkaDeadLetterQueue`` and ``KafkaDelayedRetryTopic`` of smallrye-reactive-messaging 4. All text, numbers in
decimal. New headers come before the copied ones, so of a repeated header the first is the latest.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet

from dlq.entry import Understood
from dlq.envelopes.letter import Letter
from dlq.envelopes.untrusted import INT32, INT64, label, message, moment, number, topic

_NAMES = ("exception-class-name", "cause-class-name", "reason", "cause", "topic", "partition", "offset")


class DeadLetter:
    """The strategy ``dead-letter-queue``."""

    name = "smallrye"
    prefix = "dead-letter-"
    prepends = True

    def __init__(self) -> None:
        self._names = frozenset(self.prefix + n for n in _NAMES)

    def owns(self, name: str) -> bool:
        """The seven it writes."""
        return name in self._names

    def recognises(self, names: AbstractSet[str]) -> bool:
        """One of them is enough."""
        return not self._names.isdisjoint(names)

    def read(self, letter: Letter) -> Understood:
        """The failure as it was at the latest hop, and the origin as that hop saw it."""
        first, p = letter.first.get, self.prefix
        cause = label(first(f"{p}cause-class-name"))
        return Understood(
            self.name,
            label(first(f"{p}exception-class-name")),
            cause,
            message(first(f"{p}reason")),
            None,
            None,
            None,
            letter.record.timestamp_ms,  # the strategy sends without one, so it is when it did
            topic(first(f"{p}topic")),
            number(first(f"{p}partition"), INT32),
            number(first(f"{p}offset"), INT64),
            causes=() if cause is None else (cause,),
        )


class DelayedRetry(DeadLetter):
    """The strategy ``delayed-retry-topic``: each retry topic is a hop, so the origin is the last of the topics."""

    name = "smallrye-delayed-retry"
    prefix = "delayed-retry-"

    def owns(self, name: str) -> bool:
        """All under the prefix."""
        return name.startswith(self.prefix)

    def recognises(self, names: AbstractSet[str]) -> bool:
        """One header under the prefix is enough."""
        return any(map(self.owns, names))

    def read(self, letter: Letter) -> Understood:
        """The count is of retries; the first attempt is not one."""
        found, last = super().read(letter), letter.last.get
        found.origin_topic = topic(last("delayed-retry-topic"))
        found.origin_partition = number(last("delayed-retry-partition"), INT32)
        found.origin_offset = number(last("delayed-retry-offset"), INT64)
        found.origin_timestamp_ms = moment(last("delayed-retry-original-timestamp"))
        found.retries = number(last("delayed-retry-count"), INT32)
        found.attempts = None if found.retries is None else found.retries + 1
        return found
