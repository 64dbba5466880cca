"""The dead letter: the failed record as it was, and beside it why it failed."""

from __future__ import annotations

from dataclasses import dataclass

from confluent_kafka import Message, Producer

from dlq_orchestrator.failures import Failure
from dlq_orchestrator.producing import is_too_large, produce
from dlq_orchestrator.workflow import Headers, Record, Run

_OURS = "wf-"
_MESSAGE_MAX = 1000


class NotAcknowledged(Exception):
    """The DLQ's broker did not acknowledge; nothing was committed, so the batch comes again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KafkaRecord(Record):
    """A record of the origin topic. `timestamp` in epoch ms."""

    topic: str
    partition: int
    offset: int
    timestamp: int


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A record for the DLQ. `name` is for the log: where it came from."""

    name: str
    key: bytes | None
    value: bytes | None
    headers: Headers


def dead_letter(record: KafkaRecord, run: Run, failure: Failure, group: str) -> DeadLetter:
    """The dead letter of a failed run: the record's key, value and headers byte for byte, ours after them.

    What an earlier failure left under our prefix is replaced. `correlation-id`, `traceparent` and `retry-count` are
    added where the record has none; a replayed record's `dlq-retry-count` stays beside the `retry-count` it
    overrides.
    """
    headers: Headers = [(name, value) for name, value in record.headers if not name.startswith(_OURS)]
    names = {name for name, _ in headers}
    if "correlation-id" not in names and run.workflow is not None:
        headers.append(("correlation-id", run.correlation_id.encode()))
    if "traceparent" not in names and run.traceparent is not None:
        headers.append(("traceparent", run.traceparent.encode()))
    if "retry-count" not in names:
        headers.append(("retry-count", str(record.retry_count).encode()))
    ours = {
        "error-type": failure.error_type,
        "error-message": failure.message[:_MESSAGE_MAX],
        "component": failure.component,
        "stage": failure.stage,
        "attempts": failure.attempts,
        "failed-at": failure.failed_at,
        "origin-topic": record.topic,
        "origin-partition": record.partition,
        "origin-offset": record.offset,
        "origin-timestamp": record.timestamp,
        "consumer-group": group,
        "stack-trace": failure.stack_trace,
    }
    headers += [(_OURS + name, str(value).encode()) for name, value in ours.items()]
    return DeadLetter(record.place, record.key, record.value, headers)


class DeadLetterWriter:
    """Writes dead letters to the DLQ. Used by one thread.

    :param producer: idempotent, `acks=all`.
    """

    def __init__(self, producer: Producer, topic: str) -> None:
        self._producer = producer
        self._topic = topic

    def write(self, letters: list[DeadLetter]) -> set[int]:
        """Write and wait until each is acknowledged.

        :returns: the places in `letters` of those no broker will ever take, because they are too large.
        :raises NotAcknowledged: any other fault; some may have been written, and will be again.
        """
        found = produce(self._producer, self._topic, letters)
        too_large = {place for place, each in enumerate(found) if is_too_large(each)}
        missing = [each for each in found if not isinstance(each, Message)]
        if len(missing) > len(too_large):
            why = next(
                (e.str() for e in missing if e is not None and not is_too_large(e)), "no answer in time"
            )
            raise NotAcknowledged(
                f"{len(missing) - len(too_large)} dead letters were not acknowledged: {why}"
            )
        return too_large
