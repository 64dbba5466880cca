"""Spring for Apache Kafka: dead-letter topics, retry topics, and the Spring Cloud Stream binder.

Sources: ``DeadLetterRecordManager``, ``KafkaHeaders``, ``RetryTopicHeaders`` and
``DeadLetterPublishingRecovererFactory`` of spring-kafka 4.1, ``KafkaMessageChannelBinder`` of spring-cloud-stream. Text
is UTF-8; partitions are 4 bytes, offsets and times 8, big-endian.

Original headers are appended at each hop, so the first is where the record came from; exception headers are replaced,
or appended when so configured: the last is the latest. ``springDeserializerException*`` is Java-serialized: never read.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet

from dlq.entry import Understood
from dlq.envelopes import trace
from dlq.envelopes.letter import Letter
from dlq.envelopes.untrusted import LAST_MS, identifier, int32, int64, label, message, topic, variable

_ORIGINAL = ("topic", "partition", "offset", "timestamp", "timestamp-type")
_EXCEPTION = ("fqcn", "cause-fqcn", "message", "stacktrace")
_GROUP = "kafka_dlt-original-consumer-group"
_ATTEMPT = "kafka_deliveryAttempt"
_ATTEMPTS = "retry_topic-attempts"
_ORIGINAL_TIME = "retry_topic-original-timestamp"
_RETRY_TOPIC = (_ATTEMPTS, _ORIGINAL_TIME, "retry_topic-backoff-timestamp")


class Spring:
    """The convention under one prefix; where yours are renamed, subclass it with your own ``name`` and ``prefix``."""

    name = "spring-kafka"
    prefix = "kafka_dlt-"
    also: tuple[str, ...] = (_GROUP, _ATTEMPT)

    def __init__(self) -> None:
        p = self.prefix
        self._topic, self._partition, self._offset, self._timestamp, _ = (
            f"{p}original-{n}" for n in _ORIGINAL
        )
        self._error, self._cause, self._message, self._trace = (f"{p}exception-{n}" for n in _EXCEPTION)
        self._key_error, _, self._key_message, self._key_trace = (f"{p}key-exception-{n}" for n in _EXCEPTION)
        self._names = frozenset(
            (
                *(f"{p}original-{n}" for n in _ORIGINAL),
                *(f"{p}{kind}-{n}" for kind in ("exception", "key-exception") for n in _EXCEPTION),
            )
        )

    def recognises(self, names: AbstractSet[str]) -> bool:
        """Whether an original or exception header is there."""
        return not self._names.isdisjoint(names)

    def owns(self, name: str) -> bool:
        """Its own headers, and those of Spring that only a failure adds."""
        return name in self._names or name in self.also or name.startswith("springDeserializerException")

    def read(self, letter: Letter) -> Understood:
        """The failure; of one of the key alone, the key's. The cause that the header names is the listener's exception:
        where that is a mere wrapper, the stack trace has the one that tells.
        """
        first, last = letter.first.get, letter.last.get
        error, said, stack = last(self._error), last(self._message), last(self._trace)
        if error is None and said is None:
            error, said, stack = last(self._key_error), last(self._key_message), last(self._key_trace)
        cause = label(last(self._cause))
        chain = trace.causes(stack) or ((cause,) if cause is not None else ())
        if cause is None or not trace.says(cause):
            cause = trace.telling(chain)
        return Understood(
            self.name,
            label(error),
            cause,
            message(said),
            label(last(_GROUP)),
            None,
            self._attempts(letter),
            letter.record.timestamp_ms,  # the recoverer sends without one, so it is when it did
            topic(first(self._topic)),
            int32(first(self._partition)),
            int64(first(self._offset)),
            self._original_time(letter),
            identifier(first(_GROUP)),
            causes=chain,
        )

    def _attempts(self, letter: Letter) -> int | None:
        return int32(letter.last.get(_ATTEMPT))

    def _original_time(self, letter: Letter) -> int | None:
        return int64(letter.first.get(self._timestamp), LAST_MS)


class RetryTopic(Spring):
    """``@RetryableTopic``: other names, but the group's. Its attempts are counted on before each sending, also before
    the last to the dead-letter topic, and its times are of variable length.
    """

    name = "spring-retry-topic"
    prefix = "kafka_"
    also = (*Spring.also, *_RETRY_TOPIC)

    def recognises(self, names: AbstractSet[str]) -> bool:
        """Whether an original or exception header is there, or one of the retry topics'."""
        return super().recognises(names) or not names.isdisjoint(_RETRY_TOPIC)

    def _attempts(self, letter: Letter) -> int | None:
        raw = letter.last.get(_ATTEMPTS)
        if raw is not None and len(raw) == 1:  # as earlier versions wrote it
            sent = raw[0]
        else:
            sent = int32(raw) or 0
        return sent - 1 if sent > 0 else super()._attempts(letter)

    def _original_time(self, letter: Letter) -> int | None:
        found = super()._original_time(letter)
        return variable(letter.last.get(_ORIGINAL_TIME), LAST_MS) if found is None else found


class CloudStream(Spring):
    """The Kafka binder of Spring Cloud Stream: it names no cause and no group."""

    name = "spring-cloud-stream"
    prefix = "x-"

    def recognises(self, names: AbstractSet[str]) -> bool:
        """As above, but not Spring AMQP's, which shares the exception's names."""
        return super().recognises(names) and "x-original-exchange" not in names
