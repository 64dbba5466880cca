"""Producing records and waiting for what becomes of each."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from functools import partial
from typing import Protocol

from confluent_kafka import KafkaError, KafkaException, Message, Producer

from dlq_orchestrator.workflow import Headers


class Producible(Protocol):
    """A record that is to be produced."""

    @property
    def key(self) -> bytes | None: ...
    @property
    def value(self) -> bytes | None: ...
    @property
    def headers(self) -> Headers: ...


def produce(
    producer: Producer, topic: str, records: Sequence[Producible], timeout_s: float | None = None
) -> list[Message | KafkaError | None]:
    """Produce records; for each its message, once that is acknowledged, what it was refused with, or None: no answer.

    The broker refuses a whole batch for one record in it that is too large: those refused so are produced again, each
    alone, where only its own size counts.

    :param timeout_s: how long to wait for answers, in seconds; None: as long as the producer keeps trying.
    """
    found = _produce(producer, topic, records, timeout_s)
    if len(records) > 1:
        for place, each in enumerate(found):
            if is_too_large(each):
                [found[place]] = _produce(producer, topic, [records[place]], timeout_s)
    return found


def is_too_large(found: Message | KafkaError | None) -> bool:
    """Whether no broker will ever take it, because of its size."""
    return isinstance(found, KafkaError) and found.code() == KafkaError.MSG_SIZE_TOO_LARGE


def _produce(
    producer: Producer, topic: str, records: Sequence[Producible], timeout_s: float | None
) -> list[Message | KafkaError | None]:
    began = time.monotonic()
    found: dict[int, Message | KafkaError] = {}
    reported = threading.Event()

    def report(place: int, error: KafkaError | None, message: Message) -> None:
        found[place] = message if error is None else error
        if len(found) == len(records):
            reported.set()

    for place, record in enumerate(records):
        try:
            producer.produce(
                topic,
                key=record.key,
                value=record.value,
                headers=list(record.headers),
                on_delivery=partial(report, place),
            )
        except KafkaException as error:
            found[place] = error.args[0]
        except BufferError:
            found[place] = KafkaError(KafkaError._QUEUE_FULL)
    if timeout_s is None:
        producer.flush()
    else:
        producer.flush(timeout_s)
        if len(found) < len(records):  # another thread's flush may run our reports
            reported.wait(max(0.1, began + timeout_s - time.monotonic()))
    return [found.get(place) for place in range(len(records))]
