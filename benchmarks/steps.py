"""Which step of understanding a dead letter costs what, by producer: the envelope, the ids, the group.

No broker: the records are made beforehand, their header names fresh objects as a client hands them over, and the stack
traces, 4 KiB each, are of three kinds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from struct import pack

from benchmarks.classify import GOAL
from benchmarks.cost import measured, table
from benchmarks.letters import letter
from dlq.config import Owners
from dlq.entry import Record, Understood
from dlq.envelopes import Envelopes, ids
from dlq.grouping.classify import Classifier
from dlq.grouping.taxonomy import load_taxonomy

_AT_MS = 1_764_000_000_000
_TRACE = (
    "{0}: Listener failed\n"
    + "\tat org.springframework.kafka.listener.KafkaMessageListenerContainer.run(Container.java:2998)\n" * 30
    + "Caused by: {1}: no answer from upstream\n"
    + "\tat ours.Client.call(Client.java:12)\n" * 20
    + "Caused by: java.net.SocketTimeoutException: Read timed out\n\t... 31 more\n"
)
_CAUSES = ("ours.TimedOut", "ours.Refused", "java.lang.IllegalStateException")

Pairs = list[tuple[str, bytes]]


def orchestrator(number: int) -> Pairs:
    return letter(number, "orders")[2]


def spring(number: int) -> Pairs:
    error = "org.springframework.kafka.listener.ListenerExecutionFailedException"
    cause = _CAUSES[number % len(_CAUSES)]
    return [
        ("correlation-id", b"wf-%09d" % number),
        ("traceparent", b"00-%032x-00f067aa0ba902b7-01" % (number + 1)),
        ("dedupe-key", b"order-%09d" % number),
        ("kafka_deliveryAttempt", pack(">i", 3)),
        ("kafka_dlt-exception-fqcn", error.encode()),
        ("kafka_dlt-exception-cause-fqcn", cause.encode()),
        ("kafka_dlt-exception-message", b"Listener failed; no answer from upstream"),
        ("kafka_dlt-exception-stacktrace", _TRACE.format(error, cause).encode()),
        ("kafka_dlt-original-topic", b"orders"),
        ("kafka_dlt-original-partition", pack(">i", number % 6)),
        ("kafka_dlt-original-offset", pack(">q", number)),
        ("kafka_dlt-original-timestamp", pack(">q", _AT_MS + number)),
        ("kafka_dlt-original-timestamp-type", b"CreateTime"),
        ("kafka_dlt-original-consumer-group", b"orders-workers"),
    ]


def connect(number: int) -> Pairs:
    error = "org.apache.kafka.connect.errors.DataException"
    return [
        ("correlation-id", b"wf-%09d" % number),
        ("traceparent", b"00-%032x-00f067aa0ba902b7-01" % (number + 1)),
        ("__connect.errors.topic", b"orders"),
        ("__connect.errors.partition", b"%d" % (number % 6)),
        ("__connect.errors.offset", b"%d" % number),
        ("__connect.errors.connector.name", b"warehouse-sink"),
        ("__connect.errors.task.id", b"0"),
        ("__connect.errors.stage", b"VALUE_CONVERTER"),
        ("__connect.errors.class.name", b"org.apache.kafka.connect.json.JsonConverter"),
        ("__connect.errors.exception.class.name", error.encode()),
        ("__connect.errors.exception.message", b"Converting byte[] to Kafka Connect data failed"),
        ("__connect.errors.exception.stacktrace", _TRACE.format(error, _CAUSES[number % 3]).encode()),
    ]


def smallrye(number: int) -> Pairs:
    return [
        ("dead-letter-exception-class-name", _CAUSES[number % 3].encode()),
        ("dead-letter-reason", b"no answer from upstream"),
        ("dead-letter-cause-class-name", b"java.net.SocketTimeoutException"),
        ("dead-letter-cause", b"Read timed out"),
        ("dead-letter-topic", b"orders"),
        ("dead-letter-partition", b"%d" % (number % 6)),
        ("dead-letter-offset", b"%d" % number),
        ("correlation-id", b"wf-%09d" % number),
    ]


def kafka(number: int, headers: Pairs) -> Record:
    fresh = tuple((name.encode().decode(), value) for name, value in headers)
    return Record(number % 6, str(number), number, b"key", b"value", fresh, _AT_MS)


def message(number: int, body: object, **system: str) -> Record:
    return Record(
        0,
        f"m-{number}",
        None,
        None,
        json.dumps(body).encode(),
        ((b"correlation-id".decode(), b"wf-%09d" % number),),
        _AT_MS,
        types=("String",),
        system=(
            ("SentTimestamp", str(_AT_MS)),
            ("ApproximateReceiveCount", "4"),
            ("AWSTraceHeader", f"Root=1-5759e988-{number:024x};Parent=53995c3f42cd8ad8;Sampled=1"),
            *system.items(),
        ),
        transport="sqs",
    )


def redrive(number: int) -> Record:
    queue = "arn:aws:sqs:eu-west-1:111122223333:billing"
    return message(number, {"order": number, "note": "x" * 900}, DeadLetterQueueSourceArn=queue)


def destination(number: int) -> Record:
    context = {
        "requestId": f"{number:032x}",
        "functionArn": "arn:aws:lambda:eu-west-1:111122223333:function:charge:$LATEST",
        "condition": "RetriesExhausted",
        "approximateInvokeCount": 3,
    }
    answer = {
        "errorMessage": "Read timed out",
        "errorType": "TimeoutError",
        "stackTrace": ["  File x\n"] * 10,
    }
    body = {
        "version": "1.0",
        "timestamp": "2025-11-24T16:00:00.000Z",
        "requestContext": context,
        "requestPayload": {"order": number, "note": "x" * 500},
        "responseContext": {"statusCode": 200, "functionError": "Unhandled"},
        "responsePayload": answer,
    }
    return message(number, body)


_HEADERS_ONLY: dict[str, Callable[[int], Pairs]] = {
    "orchestrator": orchestrator,
    "spring-kafka": spring,
    "kafka-connect": connect,
    "smallrye": smallrye,
}
_BODIES: dict[str, Callable[[int], Record]] = {"sqs-redrive": redrive, "lambda-destination": destination}


def run(records: int, rounds: int) -> str:
    """A table, of each figure the best of ``rounds``: the machine's other work can only make it slower."""
    rows = [
        *(
            _row(name, [kafka(n, made(n)) for n in range(records)], rounds)
            for name, made in _HEADERS_ONLY.items()
        ),
        *(_row(name, [made(n) for n in range(records)], rounds) for name, made in _BODIES.items()),
    ]
    return table(["format", "k/s", "goal", "µs an entry", "envelope", "ids", "group"], rows)


def _row(name: str, letters: list[Record], rounds: int) -> list[str]:
    envelopes = Envelopes()
    classifier = Classifier(load_taxonomy(), Owners(), envelopes)
    found, _ = classifier.classify(letters[0])
    assert found.format == name, f"{name} was read as {found.format}"
    at = ids.where(n for n, _ in letters[0].headers)
    opened = [(dict(one.headers), at) for one in letters]

    def best(work: Callable[[], object], entries: int) -> float:
        return min(_cpu_us(work, entries) for _ in range(rounds))

    whole = best(lambda: [classifier.classify(one) for one in letters], len(letters))
    decoded = best(lambda: [envelopes.decode(one) for one in letters], len(letters))
    named = best(lambda: list(_ids(opened)), len(opened))
    rate = 1e6 / whole
    goal = f"{GOAL / 1000:.0f} {'met' if rate >= GOAL else 'MISSED'}" if name in _HEADERS_ONLY else ""
    shares = (f"{max(part, 0.0) / whole:.0%}" for part in (decoded - named, named, whole - decoded))
    return [name, f"{rate / 1000:.0f}", goal, f"{whole:.1f}", *shares]


def _ids(opened: list[tuple[dict[str, bytes | None], ids.Where]]) -> Iterator[Understood]:
    for headers, at in opened:
        into = Understood()
        ids.read(headers, at, into)
        yield into


def _cpu_us(work: Callable[[], object], entries: int) -> float:
    with measured(entries) as cost:
        work()
    return cost.cpu_us
