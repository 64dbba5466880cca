"""What it costs to understand dead letters: decode, fingerprint and taxonomy, without a queue and without storage."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from random import Random

from benchmarks.cost import measured, table
from benchmarks.fingerprints import corpus
from dlq.config import Owners
from dlq.entry import Headers, Record
from dlq.envelopes import decode
from dlq.grouping.classify import Classifier
from dlq.grouping.taxonomy import load_taxonomy

GOAL = 150_000
"""Entries a second on one processor, of formats that say all in headers."""

_REPEATED = tuple(f"upstream crm-{n} answered HTTP {status}" for n in range(20) for status in (500, 503))


def orchestrator(number: int, message: str) -> Headers:
    return (
        ("content-type", b"application/json"),
        ("correlation-id", b"wf-%d" % number),
        ("traceparent", b"00-%032x-%016x-01" % (number + 1, number + 1)),
        ("wf-error-type", b"PluginError"),
        ("wf-error-message", message.encode()),
        ("wf-component", b"crm.sync"),
        ("wf-stage", b"sync"),
        ("wf-attempts", b"3"),
        ("wf-failed-at", b"%d" % (1764015660000 + number)),
        ("wf-origin-topic", b"orders"),
        ("wf-origin-partition", b"%d" % (number % 6)),
        ("wf-origin-offset", b"%d" % number),
        ("wf-origin-timestamp", b"%d" % (1764015650000 + number)),
        ("wf-consumer-group", b"orders-workers"),
    )


def spring(number: int, message: str) -> Headers:
    return (
        ("traceparent", b"00-%032x-%016x-01" % (number + 1, number + 1)),
        ("kafka_dlt-exception-fqcn", b"org.springframework.kafka.listener.ListenerExecutionFailedException"),
        ("kafka_dlt-exception-cause-fqcn", b"com.example.UpstreamException"),
        ("kafka_dlt-exception-message", message.encode()),
        ("kafka_dlt-original-topic", b"orders"),
        ("kafka_dlt-original-partition", struct.pack(">i", number % 6)),
        ("kafka_dlt-original-offset", struct.pack(">q", number)),
        ("kafka_dlt-original-timestamp", struct.pack(">q", 1764015650000 + number)),
        ("kafka_dlt-original-timestamp-type", b"CreateTime"),
        ("kafka_dlt-original-consumer-group", b"orders-workers"),
    )


def connect(number: int, message: str) -> Headers:
    return (
        ("__connect.errors.topic", b"orders"),
        ("__connect.errors.partition", b"%d" % (number % 6)),
        ("__connect.errors.offset", b"%d" % number),
        ("__connect.errors.connector.name", b"jdbc-sink"),
        ("__connect.errors.task.id", b"0"),
        ("__connect.errors.stage", b"VALUE_CONVERTER"),
        ("__connect.errors.class.name", b"io.confluent.connect.avro.AvroConverter"),
        ("__connect.errors.exception.class.name", b"org.apache.kafka.connect.errors.DataException"),
        ("__connect.errors.exception.message", message.encode()),
    )


_FORMATS: dict[str, Callable[[int, str], Headers]] = {
    "orchestrator": orchestrator,
    "spring-kafka": spring,
    "kafka-connect": connect,
}


def run(records: int, rounds: int) -> str:
    """A table of entries a second, the best of ``rounds``: the machine's other work can only make it slower."""
    rng = Random(0)
    distinct = [message for _, message in corpus(0)]
    rows = []
    for form, made in _FORMATS.items():
        for kind, messages in (("few messages", _REPEATED), ("every message another", distinct)):
            batch = [
                Record(n % 6, str(n), n, b"k", b"{}", made(n, f"{rng.choice(messages)}"), 0)
                for n in range(records)
            ]
            rows.append([form, kind, *_rates(batch, rounds)])
    return table(("format", "of", "decode, k/s", "decode and classify, k/s", "goal"), rows)


def _rates(batch: Sequence[Record], rounds: int) -> list[str]:
    decoding, both = 0.0, 0.0
    for _ in range(rounds):
        classify = Classifier(load_taxonomy(), Owners()).classify
        with measured(len(batch)) as cost:
            for record in batch:
                decode(record)
        decoding = max(decoding, len(batch) / cost.cpu)
        with measured(len(batch)) as cost:
            for record in batch:
                classify(record)
        both = max(both, len(batch) / cost.cpu)
    verdict = "met" if both >= GOAL else "MISSED"
    return [f"{decoding / 1000:.0f}", f"{both / 1000:.0f}", f"{GOAL / 1000:.0f} {verdict}"]
