"""A Kafka topic as origin: its clients, and the parts made of them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import structlog
from confluent_kafka import Consumer, KafkaError, KafkaException, Message, Producer

from dlq_orchestrator.core.calls import PluginCalls
from dlq_orchestrator.core.workflow_safety import WorkflowSafety
from dlq_orchestrator.dead_letter import DeadLetterWriter
from dlq_orchestrator.failures import DataCorruption
from dlq_orchestrator.kafka_consumer import KafkaConsumer
from dlq_orchestrator.origin import CannotStart, NotSubmitted, Origin, Outgoing, Place
from dlq_orchestrator.producing import is_too_large, produce
from dlq_orchestrator.routing import Routing
from dlq_orchestrator.runner import Runner
from dlq_orchestrator.store import Store

_log = structlog.get_logger()

# librdkafka counts uncompressed; the broker decides what is too large for its topic
_MESSAGE_MAX = 16 * 1024 * 1024
_TELL_EVERY_S = 10.0
_SUBMIT_S = 10.0


@dataclass(frozen=True, slots=True)
class KafkaSettings:
    """Where workflows come from, and where failed ones go."""

    bootstrap_servers: str
    origin_topic: str
    dlq_topic: str
    group: str


def kafka_origin(
    settings: KafkaSettings, store: Store, runner: Runner, safety: WorkflowSafety, calls: PluginCalls
) -> Origin:
    """
    :raises CannotStart: a topic or the broker is not there.
    """
    clients = _Clients(settings, store.instance_id)
    producer = clients.producer()
    _require_topics(settings, producer)
    routing = Routing(store)
    consumer = KafkaConsumer(
        clients.consumer,
        settings.origin_topic,
        settings.group,
        runner,
        safety,
        calls,
        routing,
        DeadLetterWriter(producer, settings.dlq_topic),
        store,
    )
    return Origin(consumer, KafkaInlet(clients.producer(), settings.origin_topic), routing)


class KafkaInlet:
    """Produces workflows to the origin topic.

    :param producer: one of its own: whoever flushes a producer runs the delivery reports of all its users.
    """

    def __init__(self, producer: Producer, topic: str) -> None:
        self._producer = producer
        self._topic = topic

    def put(self, records: Sequence[Outgoing]) -> list[Place | NotSubmitted | DataCorruption]:
        return [self._place(found) for found in produce(self._producer, self._topic, records, _SUBMIT_S)]

    def _place(self, found: Message | KafkaError | None) -> Place | NotSubmitted | DataCorruption:
        if found is None:
            return NotSubmitted(f"{self._topic} did not acknowledge within {_SUBMIT_S:.0f} s")
        if is_too_large(found):
            return DataCorruption(f"{self._topic} takes no record of that size")
        if isinstance(found, KafkaError):
            return NotSubmitted(f"{self._topic}: {found.str()}")
        return Place(self._topic, cast(int, found.partition()), cast(int, found.offset()))


class _Clients:
    def __init__(self, settings: KafkaSettings, instance_id: str) -> None:
        self._settings = settings
        self._instance_id = instance_id
        self._told: dict[int, float] = {}

    def producer(self) -> Producer:
        return Producer(
            self._common()
            | {
                "acks": "all",
                "enable.idempotence": True,
                "compression.type": "lz4",
                # outlives the restart of a broker
                "delivery.timeout.ms": 120_000,
                "linger.ms": 2,
                "message.max.bytes": _MESSAGE_MAX,
                # where a Java producer would put the same key
                "partitioner": "murmur2_random",
            }
        )

    def consumer(self) -> Consumer:
        return Consumer(
            self._common()
            | {
                "group.id": self._settings.group,
                # the same member after a crash: it gets its partitions at once, and fences what it left behind
                "group.instance.id": f"orchestrator-{self._instance_id}",
                "session.timeout.ms": 10_000,
                # a batch of one dedupe key whose every call runs into its time limit
                "max.poll.interval.ms": 900_000,
                "auto.offset.reset": "earliest",
                "enable.auto.commit": False,
                "enable.auto.offset.store": False,
                "isolation.level": "read_committed",
                "fetch.wait.max.ms": 50,
                # bounded whatever the records' size
                "queued.max.messages.kbytes": 32 * 1024,
                "fetch.message.max.bytes": 1024 * 1024,
            }
        )

    def _common(self) -> dict[str, Any]:
        return {
            "bootstrap.servers": self._settings.bootstrap_servers,
            "client.id": f"orchestrator-{self._instance_id[:8]}",
            "allow.auto.create.topics": False,
            "error_cb": self._tell_once,
            # the error callback tells it, with the log's format
            "log_level": 2,
        }

    def _tell_once(self, error: KafkaError) -> None:
        """A broker that is away is told of by every client, many times a second: say each once in a while."""
        now = time.monotonic()
        if now - self._told.get(error.code(), -_TELL_EVERY_S) >= _TELL_EVERY_S:
            self._told[error.code()] = now
            _log.warning("kafka", why=error.str())


def _require_topics(settings: KafkaSettings, producer: Producer) -> None:
    try:
        topics = producer.list_topics(timeout=5).topics
    except KafkaException as error:
        if error.args[0].code() not in (KafkaError._TRANSPORT, KafkaError._TIMED_OUT):
            raise
        raise CannotStart(
            f"no Kafka broker answers at {settings.bootstrap_servers} (--bootstrap-servers); is it running?"
        ) from None
    for option, topic in (("origin", settings.origin_topic), ("dlq", settings.dlq_topic)):
        if topic not in topics:
            raise CannotStart(f"there is no topic {topic}: create it, or correct --{option}-topic")
