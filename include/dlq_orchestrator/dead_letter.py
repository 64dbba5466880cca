"""The dead letter: the failed record as it was, and beside it why it failed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from confluent_kafka import KafkaError, KafkaException, Message, Producer

from dlq_orchestrator.failures import Failure
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

    What an earlier failure left under our prefix is replaced. `correlation-id` and `retry-count` are added
    where the record has none; a replayed record's `dlq-retry-count` stays beside the `retry-count` it
    overrides.
    """
    headers: Headers = [(name, value) for name, value in record.headers if not name.startswith(_OURS)]
    names = {name for name, _ in headers}
    if "correlation-id" not in names and run.workflow is not None:
        headers.append(("correlation-id", run.correlation_id.encode()))
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
        refused = self._write(letters, range(len(letters)))
        # the broker refuses a whole batch for one record in it; alone, only that record's size counts
        return {place for place in sorted(refused) if len(letters) == 1 or self._write(letters, [place])}

    def _write(self, letters: list[DeadLetter], places: Sequence[int]) -> set[int]:
        too_large: set[int] = set()
        faults: list[str] = []
        acknowledged: set[int] = set()

        def delivered(place: int, error: KafkaError | None, _: Message | None) -> None:
            if error is None:
                acknowledged.add(place)
            elif error.code() == KafkaError.MSG_SIZE_TOO_LARGE:
                too_large.add(place)
            else:
                faults.append(error.str())

        for place in places:
            letter = letters[place]
            try:
                self._producer.produce(
                    self._topic,
                    key=letter.key,
                    value=letter.value,
                    headers=list(letter.headers),
                    on_delivery=partial(delivered, place),
                )
            except KafkaException as error:
                delivered(place, error.args[0], None)
        self._producer.flush()
        if missing := len(places) - len(acknowledged) - len(too_large):
            why = faults[0] if faults else "no answer in time"
            raise NotAcknowledged(f"{missing} dead letters were not acknowledged: {why}")
        return too_large
