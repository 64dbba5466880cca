"""Dead letters as the reference orchestrator writes them: a JSON value of 1 KiB, a key, 15 headers."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping

from confluent_kafka import KafkaError, Producer

KINDS = ("TransientNetwork", "RateLimit", "PluginTimeout")
"""Failures the taxonomy retries: a drain of them replays every one."""

VALUE_BYTES = 1024
_FAILED_AT_MS = 1_764_000_000_000


def letter(number: int, origin: str) -> tuple[bytes, bytes, list[tuple[str, bytes]]]:
    """The ``number``-th dead letter's key, value and headers; about half of the value doesn't compress, as ids
    don't.
    """
    order = {
        "order": number,
        "customer": {"id": os.urandom(16).hex(), "name": "A. Customer", "country": "DE", "segment": "retail"},
        "lines": [
            {"sku": f"SKU-{(number * 7 + line) % 5000:05d}", "quantity": line + 1, "price": "19.90"}
            for line in range(4)
        ],
    }
    value = json.dumps(order)[:-1] + ', "signature": "'
    value += os.urandom(VALUE_BYTES).hex()[: VALUE_BYTES - len(value) - 2] + '"}'
    trace = os.urandom(16).hex()
    headers = {
        "correlation-id": f"wf-{number:09d}",
        "dedupe-key": f"order-{number:09d}",
        "traceparent": f"00-{trace}-00f067aa0ba902b7-01",
        "retry-count": "0",
        "wf-error-type": KINDS[number % len(KINDS)],
        "wf-error-message": "HTTP 503 from upstream",
        "wf-component": "payments.charge",
        "wf-stage": "charge",
        "wf-attempts": "3",
        "wf-failed-at": str(_FAILED_AT_MS + number),
        "wf-origin-topic": origin,
        "wf-origin-partition": str(number % 6),
        "wf-origin-offset": str(number // 6),
        "wf-origin-timestamp": str(_FAILED_AT_MS + number),
        "wf-consumer-group": "orders-workers",
    }
    return (
        f"customer-{number:09d}".encode(),
        value.encode(),
        [(name, text.encode()) for name, text in headers.items()],
    )


def letters(first: int, count: int, origin: str) -> Iterator[tuple[bytes, bytes, list[tuple[str, bytes]]]]:
    return (letter(number, origin) for number in range(first, first + count))


def fill(bootstrap: str, topic: str, count: int, *, origin: str, parts: int) -> None:
    """Dead-letter ``count`` records, evenly over the partitions, as fast as the client can."""
    settings: Mapping[str, object] = {
        "bootstrap.servers": bootstrap,
        "linger.ms": 20,
        "queue.buffering.max.messages": 200_000,
        "acks": "all",
    }
    producer = Producer(settings)
    refused: list[KafkaError] = []

    def report(error: KafkaError | None, _message: object) -> None:
        if error is not None:
            refused.append(error)

    for number, (key, value, headers) in enumerate(letters(0, count, origin)):
        while True:
            try:
                producer.produce(
                    topic,
                    value=value,
                    key=key,
                    headers=headers,
                    partition=number % parts,
                    on_delivery=report,
                )
                break
            except BufferError:
                producer.poll(0.1)
        if number % 1000 == 0:
            producer.poll(0)
    producer.flush(60)
    if refused:
        raise RuntimeError(
            f"{topic}: {len(refused)} of {count} dead letters were refused: {refused[0].str()}"
        )
