"""What a queue's file asks for, on this machine: broker or SQS server, orchestrator, and Connections to them."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

from dlq.config import KafkaSource, KafkaTarget, QueueConfig, SqsSource, SqsTarget
from dlq_demo import loopback
from dlq_demo.broker import Broker, by_a_link, create_topic
from dlq_demo.elasticmq import ElasticMq
from dlq_demo.home import Home
from dlq_demo.link import Link
from dlq_demo.orchestrator import OrchestratorProcess, ReferenceOrchestrator, SqsOrchestrator
from dlq_demo.process import ServiceError

PARTITIONS = 3
# Short, so that a failure is a dead letter within seconds: it takes one time-out more than there are receptions.
_VISIBILITY_S = 5
_RECEIVES = 2
_NEITHER = "queue {}: only a source and a target that are both kafka, or both sqs, can be set up here; choose another"


class Surroundings(ABC):
    """One queue's server and orchestrator; a context manager that starts and stops them.

    Ports are chosen when it is made, so that what connects to them can be started meanwhile.
    """

    transport: ClassVar[str]
    """What the server is, for the terminal."""
    orchestrator: OrchestratorProcess

    def __init__(self, config: QueueConfig) -> None:
        self._config = config
        self._open = ExitStack()

    @property
    def connections(self) -> dict[str, str]:
        """Environment variables that hold the Connections the queue's file names."""
        server = self._connection()
        http = {
            "conn_type": "http",
            "host": f"http://{loopback.HOST}",
            "port": self._http_port(),
            "password": self.orchestrator.token,
        }
        named = {self._config.source.connection: server, self._config.target.connection: server}
        if self._config.orchestrator is not None:
            named[self._config.orchestrator.connection] = http
        return {f"AIRFLOW_CONN_{name.upper()}": json.dumps(value) for name, value in named.items()}

    def __enter__(self) -> Self:
        with ExitStack() as opening:
            self._start(opening)
            opening.enter_context(self.orchestrator)
            self._open = opening.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    @abstractmethod
    def __str__(self) -> str:
        """Where the server is and what it holds."""

    def _http_port(self) -> int:
        """Where the Connections find the orchestrator."""
        return self.orchestrator.port

    @abstractmethod
    def _connection(self) -> Mapping[str, Any]:
        """An Airflow Connection to the server."""

    @abstractmethod
    def _start(self, services: ExitStack) -> None:
        """Start the server, unless it runs, and make what the orchestrator needs there."""


class KafkaSurroundings(Surroundings):
    """Broker, topics and orchestrator.

    :param config: the queue's file: its topics, group and Connection ids.
    :param orchestrator: the orchestrator's folder.
    :param kafka: the broker's folder; a temporary one if there is none.
    :param broker: one that runs already, and is left running.
    :param properties: more of an own broker's.
    :param options: more of the orchestrator's command line.
    :raises ServiceError: when the queue is not one of Kafka's.
    """

    transport = "Kafka"
    orchestrator: ReferenceOrchestrator

    def __init__(
        self,
        config: QueueConfig,
        *,
        orchestrator: Path,
        kafka: Path | None = None,
        broker: Broker | None = None,
        properties: Mapping[str, str] | None = None,
        options: Sequence[str] = (),
    ) -> None:
        if not (isinstance(config.source, KafkaSource) and isinstance(config.target, KafkaTarget)):
            raise ServiceError(_NEITHER.format(config.name))
        super().__init__(config)
        self.dlq = config.source.topic
        self.origin = config.target.topic or config.target.allow[0]
        self.group = config.target.group or f"{config.name}-workers"
        self._own_broker = broker is None
        self.broker = broker or Broker(kafka, properties=properties)
        self.orchestrator = ReferenceOrchestrator(
            self.broker.bootstrap,
            origin=self.origin,
            dlq=self.dlq,
            folder=orchestrator,
            group=self.group,
            options=options,
        )

    def __str__(self) -> str:
        return f"a real broker on {self.broker.bootstrap}, topics {self.origin} and {self.dlq}"

    def _connection(self) -> Mapping[str, Any]:
        return {"conn_type": "kafka", "extra": {"bootstrap.servers": self.broker.bootstrap}}

    def _start(self, services: ExitStack) -> None:
        if self._own_broker:
            services.enter_context(self.broker)
        for topic in (self.origin, self.dlq):
            create_topic(self.broker.bootstrap, topic, PARTITIONS)


class BreakableSurroundings(KafkaSurroundings):
    """Broker and orchestrator, each behind a :class:`Link` for whoever uses the Connections, and open to faults."""

    def __init__(self, config: QueueConfig, *, orchestrator: Path, kafka: Path | None = None) -> None:
        [inside] = loopback.free_ports(1)
        kafka_link = Link(inside)
        super().__init__(
            config,
            orchestrator=orchestrator,
            kafka=kafka,
            properties=by_a_link(inside, kafka_link.port),
            options=("--fault-injection",),
        )
        self.links = (kafka_link, Link(self.orchestrator.port))

    def _http_port(self) -> int:
        return self.links[1].port

    def _connection(self) -> Mapping[str, Any]:
        return {
            "conn_type": "kafka",
            "extra": {"bootstrap.servers": f"{loopback.HOST}:{self.links[0].port}"},
        }

    def _start(self, services: ExitStack) -> None:
        for link in self.links:
            services.enter_context(link)
        super()._start(services)


class SqsSurroundings(Surroundings):
    """Server, queues and orchestrator.

    :param config: the queue's file: its queues' names and Connection ids.
    :param orchestrator: the orchestrator's folder.
    :param sqs: the server's folder.
    :raises ServiceError: when the queue is not one of SQS's.
    """

    transport = "SQS"

    def __init__(self, config: QueueConfig, *, orchestrator: Path, sqs: Path) -> None:
        if not (isinstance(config.source, SqsSource) and isinstance(config.target, SqsTarget)):
            raise ServiceError(_NEITHER.format(config.name))
        super().__init__(config)
        self.dlq = _name(config.source.queue)
        self.origin = _name(config.target.queue or config.target.allow[0])
        self.server = ElasticMq(sqs)
        self.orchestrator = SqsOrchestrator(self.server, origin=self.origin, folder=orchestrator)

    def __str__(self) -> str:
        return f"a real SQS server on {self.server.endpoint}, queues {self.origin} and {self.dlq}"

    def _connection(self) -> Mapping[str, Any]:
        return self.server.connection

    def _start(self, services: ExitStack) -> None:
        services.enter_context(self.server)
        self.server.create_queue(self.dlq)
        self.server.create_queue(
            self.origin, dead_letters=self.dlq, receives=_RECEIVES, visibility=_VISIBILITY_S
        )


def _name(queue: str) -> str:
    """A queue's name, of its URL or ARN too."""
    return queue.rsplit("/", 1)[-1].rsplit(":", 1)[-1]


def surroundings(config: QueueConfig, home: Home) -> Surroundings:
    """The surroundings of the kind that the queue's source is, in the demo's folder.

    :raises ServiceError: when the queue is of no kind that can be set up here.
    """
    if isinstance(config.source, SqsSource):
        return SqsSurroundings(config, orchestrator=home.orchestrator, sqs=home.sqs)
    return KafkaSurroundings(config, orchestrator=home.orchestrator, kafka=home.kafka)
