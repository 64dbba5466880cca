"""The parts put together: one process that consumes, routes and answers."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import structlog
import uvicorn
from confluent_kafka import Consumer, KafkaError, KafkaException, Producer

from dlq_orchestrator.consumer import WorkflowConsumer
from dlq_orchestrator.core.backoff import Backoff
from dlq_orchestrator.core.plugin_sandbox import PluginSandbox
from dlq_orchestrator.core.rate_limiter import RateLimiter
from dlq_orchestrator.core.workflow_safety import WorkflowSafety
from dlq_orchestrator.dead_letter import DeadLetterWriter
from dlq_orchestrator.http.app import create_app
from dlq_orchestrator.http.idempotency import Idempotency
from dlq_orchestrator.http.parts import Parts
from dlq_orchestrator.plugins import MEMORY_MB, TOOLS
from dlq_orchestrator.routing import Routing
from dlq_orchestrator.runner import Runner
from dlq_orchestrator.store import Store
from dlq_orchestrator.submission import Submission

_log = structlog.get_logger()

# librdkafka counts uncompressed; the broker decides what is too large for its topic
_MESSAGE_MAX = 16 * 1024 * 1024
_TELL_EVERY_S = 10.0


class CannotStart(Exception):
    """Something the orchestrator needs is not there; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What the command line sets. Times in seconds; `port` 0 takes a free one."""

    bootstrap_servers: str
    origin_topic: str
    dlq_topic: str
    group: str
    state: Path
    token: str
    host: str = "127.0.0.1"
    port: int = 0
    time_limit_s: float = 0.2
    backoff_base_s: float = 0.05


def serve(settings: Settings, stop: threading.Event, ready: Callable[[str], None]) -> None:
    """Run until `stop` is set; `ready` is called with the URL once it consumes and answers.

    :raises CannotStart: a topic, the broker or the port is not there.
    :raises StateInUse: another orchestrator works on the state folder.
    :raises ConsumerFailed, NotAcknowledged: Kafka failed for good; a restart loses and doubles nothing.
    """
    store = Store(settings.state)
    try:
        _Service(settings, store).run(stop, ready)
    finally:
        store.close()


class _Service:
    def __init__(self, settings: Settings, store: Store) -> None:
        self._settings = settings
        self._store = store
        self._told: dict[int, float] = {}

    def run(self, stop: threading.Event, ready: Callable[[str], None]) -> None:
        settings, store = self._settings, self._store
        producer = self._producer()
        self._require_topics(producer)
        limiter = RateLimiter(store, MEMORY_MB)
        safety = WorkflowSafety(store)
        routing = Routing(store)
        runner = Runner(
            PluginSandbox(limiter, TOOLS, settings.time_limit_s),
            safety,
            Backoff(base_s=settings.backoff_base_s),
            Random(),  # noqa: S311 - jitter
        )
        consumer = WorkflowConsumer(
            lambda: Consumer(self._client() | self._membership()),
            settings.origin_topic,
            settings.group,
            runner,
            safety,
            limiter,
            routing,
            DeadLetterWriter(producer, settings.dlq_topic),
            store,
        )
        submission = Submission(self._producer(), settings.origin_topic, safety)
        parts = Parts(settings.token, safety, limiter, routing, submission, Idempotency(store), consumer)
        with consumer, self._listen() as listener:
            url = f"http://{settings.host}:{listener.getsockname()[1]}"
            server = uvicorn.Server(
                uvicorn.Config(
                    create_app(parts),
                    log_config=None,
                    access_log=False,
                    timeout_graceful_shutdown=2,
                    lifespan="off",
                )
            )
            thread = threading.Thread(target=server.run, args=([listener],), name="http", daemon=True)
            thread.start()
            try:
                consumer.run(stop, lambda: ready(url))
            finally:
                server.should_exit = True
                thread.join(5)

    def _client(self) -> dict[str, Any]:
        return {
            "bootstrap.servers": self._settings.bootstrap_servers,
            "client.id": f"orchestrator-{self._store.instance_id[:8]}",
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

    def _producer(self) -> Producer:
        return Producer(
            self._client()
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

    def _membership(self) -> dict[str, Any]:
        return {
            "group.id": self._settings.group,
            # the same member after a crash: it gets its partitions at once, and fences what it left behind
            "group.instance.id": f"orchestrator-{self._store.instance_id}",
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

    def _require_topics(self, producer: Producer) -> None:
        try:
            topics = producer.list_topics(timeout=5).topics
        except KafkaException as error:
            if error.args[0].code() not in (KafkaError._TRANSPORT, KafkaError._TIMED_OUT):
                raise
            raise CannotStart(
                f"no Kafka broker answers at {self._settings.bootstrap_servers} (--bootstrap-servers);"
                " is it running?"
            ) from None
        for option, topic in (("origin", self._settings.origin_topic), ("dlq", self._settings.dlq_topic)):
            if topic not in topics:
                raise CannotStart(f"there is no topic {topic}: create it, or correct --{option}-topic")

    def _listen(self) -> socket.socket:
        try:
            return socket.create_server((self._settings.host, self._settings.port))
        except OSError as error:
            raise CannotStart(
                f"cannot listen on {self._settings.host}:{self._settings.port} ({error.strerror});"
                " choose another --port"
            ) from None
