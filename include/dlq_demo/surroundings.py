"""What a Kafka queue's file asks for, on this machine: broker, topics, orchestrator, and Connections to them."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from dlq.config import KafkaSource, KafkaTarget, QueueConfig
from dlq_demo import loopback
from dlq_demo.broker import Broker, create_topic
from dlq_demo.orchestrator import ReferenceOrchestrator
from dlq_demo.process import ServiceError

PARTITIONS = 3


class Surroundings:
    """One queue's broker and orchestrator; a context manager that starts and stops them.

    Ports are chosen when it is made, so that what connects to them can be started meanwhile.

    :param config: the queue's file: its topics, group and Connection ids.
    :param kafka: the broker's folder; a temporary one if there is none.
    :param orchestrator: the orchestrator's folder.
    :param broker: one that runs already, and is left running.
    :raises ServiceError: when the queue is not one of Kafka's.
    """

    def __init__(
        self,
        config: QueueConfig,
        *,
        orchestrator: Path,
        kafka: Path | None = None,
        broker: Broker | None = None,
    ) -> None:
        if not (isinstance(config.source, KafkaSource) and isinstance(config.target, KafkaTarget)):
            raise ServiceError(
                f"queue {config.name}: only source.kind and target.kind kafka can be set up here; choose another queue"
            )
        self.dlq = config.source.topic
        self.origin = config.target.topic or config.target.allow[0]
        self.group = config.target.group or f"{config.name}-workers"
        self._config = config
        self._own_broker = broker is None
        self.broker = broker or Broker(kafka)
        self.orchestrator = ReferenceOrchestrator(
            self.broker.bootstrap, origin=self.origin, dlq=self.dlq, folder=orchestrator, group=self.group
        )
        self._open = ExitStack()

    @property
    def connections(self) -> dict[str, str]:
        """Environment variables that hold the Connections the queue's file names."""
        kafka = {"conn_type": "kafka", "extra": {"bootstrap.servers": self.broker.bootstrap}}
        http = {
            "conn_type": "http",
            "host": f"http://{loopback.HOST}",
            "port": self.orchestrator.port,
            "password": self.orchestrator.token,
        }
        named: dict[str, Any] = {self._config.source.connection: kafka, self._config.target.connection: kafka}
        if self._config.orchestrator is not None:
            named[self._config.orchestrator.connection] = http
        return {f"AIRFLOW_CONN_{name.upper()}": json.dumps(value) for name, value in named.items()}

    def __enter__(self) -> Self:
        with ExitStack() as opening:
            if self._own_broker:
                opening.enter_context(self.broker)
            for topic in (self.origin, self.dlq):
                create_topic(self.broker.bootstrap, topic, PARTITIONS)
            opening.enter_context(self.orchestrator)
            self._open = opening.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()
