"""A stream of workflows, most healthy, some broken in every way a drain must know.

`python -m dlq_orchestrator.traffic --bootstrap-servers … --topic orders --count 10000 --seed 7`
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from random import Random
from typing import Any

import msgspec
from confluent_kafka import KafkaError, Message, Producer

from dlq_orchestrator.workflow import Headers

# what the kinds are, and how many of each in the default mix
DEFAULT_MIX: dict[str, float] = {
    "healthy": 0.92,  # runs through
    "flaky": 0.02,  # fails once or twice, heals within its tries: never dead-lettered
    "transient": 0.018,  # the network; heals at the first replay, or within its tries
    "rate_limit": 0.012,
    "timeout": 0.008,
    "memory": 0.01,  # until the quota of `embedding` is raised
    "scope": 0.004,  # until the plugin is given the scope: of these only `notify` may be
    "plugin_error": 0.004,  # a permanent fault whose replay works
    "corrupt": 0.004,  # bytes that are no workflow
}

RUN_THROUGH = ("healthy", "flaky")
"""The kinds that are never dead-lettered."""

_SKUS = ("sku-anvil", "sku-kettle", "sku-lamp", "sku-rope", "sku-teapot")
_TEXTS = ("cast iron for tea", "green brass lamp", "copper kettle", "twenty metres of hemp", "a present")


@dataclass(frozen=True, slots=True)
class TrafficRecord:
    """A record for the origin topic, and which kind of workflow it holds."""

    kind: str
    key: bytes
    value: bytes
    headers: Headers


def workflows(count: int, seed: int, mix: dict[str, float] | None = None) -> Iterator[TrafficRecord]:
    """The same records for the same arguments: another run of a seed is a run of the same workflows.

    :param mix: how many of each kind, in any unit.
    """
    random = Random(seed)  # noqa: S311 - traffic
    mix = mix or DEFAULT_MIX
    for kind in random.choices(list(mix), list(mix.values()), k=count):
        correlation_id = f"{random.getrandbits(128):032x}"
        document = _document(correlation_id, random)
        _break(document, kind, random)
        value = msgspec.json.encode(document)
        if kind == "corrupt":
            value = _corrupted(value, random)
        headers: Headers = [
            ("correlation-id", correlation_id.encode()),
            ("traceparent", f"00-{random.getrandbits(128):032x}-{random.getrandbits(64):016x}-01".encode()),
            ("dedupe-key", f"{document['workflow']}:{correlation_id}".encode()),
        ]
        # keys repeat as customers do
        yield TrafficRecord(kind, f"customer-{random.randrange(500)}".encode(), value, headers)


def send(producer: Producer, topic: str, records: Iterable[TrafficRecord]) -> Counter[str]:
    """Produce them all; returns how many of each kind were acknowledged.

    :raises RuntimeError: some were not.
    """
    sent: Counter[str] = Counter()
    refused: list[str] = []

    def report(error: KafkaError | None, _: Message) -> None:
        if error is not None:
            refused.append(error.str())

    for record in records:
        while True:
            try:
                producer.produce(
                    topic,
                    key=record.key,
                    value=record.value,
                    headers=list(record.headers),
                    on_delivery=report,
                )
                break
            except BufferError:
                producer.poll(0.1)
        sent[record.kind] += 1
        producer.poll(0)
    if producer.flush(60) or refused:
        raise RuntimeError(f"{topic} did not take all records: {refused[0] if refused else 'no answer'}")
    return sent


def send_to_queue(sqs: Any, queue_url: str, records: Iterable[TrafficRecord]) -> Counter[str]:
    """Send them all to an SQS queue, headers as attributes; returns how many of each kind were acknowledged.

    A body is text, and never empty: corrupt bytes are put into it as well as that allows.

    :param sqs: a boto3 client.
    :raises RuntimeError: some were refused.
    """
    sent: Counter[str] = Counter()

    def send(records: list[TrafficRecord]) -> None:
        entries = [
            {
                "Id": str(n),
                "MessageBody": record.value.decode(errors="replace") or "{",
                "MessageAttributes": {
                    name: {"DataType": "String", "StringValue": (value or b"").decode()}
                    for name, value in record.headers
                },
            }
            for n, record in enumerate(records)
        ]
        answer = sqs.send_message_batch(QueueUrl=queue_url, Entries=entries)
        if refused := answer.get("Failed"):
            raise RuntimeError(f"{queue_url} did not take all messages: {refused[0]['Code']}")
        sent.update(record.kind for record in records)

    rest = iter(records)
    batches = iter(lambda: list(islice(rest, 10)), [])
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(send, batches))
    return sent


def _document(correlation_id: str, random: Random) -> dict[str, Any]:
    if random.random() < 0.5:
        name = "order"
        steps = [
            (
                "reserve",
                "inventory",
                "reserve",
                {"sku": random.choice(_SKUS), "quantity": random.randint(1, 9)},
            ),
            (
                "charge",
                "payments",
                "charge",
                {
                    "amount_cents": random.randint(500, 90_000),
                    "currency": random.choice(("EUR", "USD", "NOK")),
                },
            ),
            (
                "confirm",
                "notify",
                "send",
                {
                    "channel": random.choice(("email", "sms")),
                    "to": f"customer-{random.randrange(500)}@example.org",
                    "subject": "Your order",
                },
            ),
        ]
    else:
        name = "recommend"
        text = random.choice(_TEXTS)
        steps = [
            ("search", "search", "query", {"text": text}),
            ("embed", "embedding", "embed", {"text": text, "memory_mb": random.randint(64, 384)}),
            (
                "offer",
                "notify",
                "send",
                {"channel": "email", "to": "someone@example.org", "subject": "You may like"},
            ),
        ]
    return {
        "workflow": name,
        "correlation_id": correlation_id,
        "steps": [{"name": n, "plugin": p, "tool": t, "args": args} for n, p, t, args in steps],
    }


def _break(document: dict[str, Any], kind: str, random: Random) -> None:
    """Put the fault of a kind into one of a workflow's steps; 3 tries a run (see `faults`)."""
    if kind == "memory":
        # always an embedding, between its quota and its ceiling
        document["workflow"] = "index"
        document["steps"] = [
            {
                "name": "embed",
                "plugin": "embedding",
                "tool": "embed",
                "args": {"text": random.choice(_TEXTS), "memory_mb": random.randint(600, 1500)},
            }
        ]
        return
    error, attempts = {
        "flaky": ("TransientNetwork", random.randint(1, 2)),
        "transient": ("TransientNetwork", random.randint(3, 5)),
        "rate_limit": ("RateLimit", random.randint(3, 5)),
        "timeout": ("PluginTimeout", 3),
        "scope": ("ScopeViolation", 1_000_000),
        "plugin_error": ("PluginError", 1),
    }.get(kind, (None, 0))
    if error:
        step = random.choice(document["steps"])
        step["args"]["fault"] = {"error": error, "attempts": attempts}


def _corrupted(value: bytes, random: Random) -> bytes:
    return random.choice(
        (
            value[: random.randint(1, len(value) - 1)],  # cut short
            value.replace(b'"steps"', b'"stepz"'),  # a field is gone
            value.replace(b'"', b"\xff", 3),  # no UTF-8
            b"",
        )
    )


def _mix(text: str) -> dict[str, float]:
    mix: dict[str, float] = {}
    for part in text.split(","):
        kind, _, weight = part.partition("=")
        if kind not in DEFAULT_MIX:
            raise argparse.ArgumentTypeError(f"no kind {kind!r}; there are: {', '.join(DEFAULT_MIX)}")
        try:
            mix[kind] = float(weight)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{kind} needs a number: {kind}=0.1") from None
    return mix


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m dlq_orchestrator.traffic",
        description="Produces workflows to a topic, and prints how many of each kind as one line of JSON.",
    )
    add = parser.add_argument
    add("--bootstrap-servers", required=True, help="Kafka, host:port[,host:port]")
    add("--topic", required=True, help="the orchestrator's origin topic")
    add("--count", required=True, type=int, help="how many workflows")
    add("--seed", required=True, type=int, help="the same seed makes the same workflows, ids included")
    add("--mix", type=_mix, metavar="KIND=WEIGHT,…", help=f"kinds: {', '.join(DEFAULT_MIX)}")
    arguments = parser.parse_args()
    producer = Producer(
        {
            "bootstrap.servers": arguments.bootstrap_servers,
            "enable.idempotence": True,
            "compression.type": "lz4",
            "linger.ms": 5,
            "partitioner": "murmur2_random",
        }
    )
    sent = send(producer, arguments.topic, workflows(arguments.count, arguments.seed, arguments.mix))
    sys.stdout.write(json.dumps(dict(sent.most_common())) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
