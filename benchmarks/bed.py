"""Where it is measured: a real broker, and queues to drain, each with a ledger and an archive of its own."""

from __future__ import annotations

import shutil
import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from confluent_kafka.admin import AdminClient

from benchmarks.letters import fill
from dlq.config import QueueConfig
from dlq.drain import Drain, drain_id
from dlq.intake import take_custody
from dlq.ledger import Ledger, lease
from dlq.opening import open_drain
from dlq.ports import Connection, Connections
from dlq_demo.broker import Broker, create_topic

PARTS = 6


@dataclass(frozen=True)
class Queue:
    """A queue of this run; it can go to another process."""

    bootstrap: str
    config: QueueConfig
    dlq: str
    origin: str

    def __reduce__(self) -> Any:  # what a configuration works out at its first use can't travel
        return _arrived, (self.bootstrap, self.config.model_dump_json(), self.dlq, self.origin)

    @property
    def connection(self) -> Connection:
        return Connection("kafka", "kafka", extra={"bootstrap.servers": self.bootstrap})

    @property
    def connections(self) -> Connections:
        return lambda _: self.connection

    @property
    def group(self) -> str:
        """Who consumes the origin."""
        return f"{self.origin}.workers"

    def open(self, run: str = "drain") -> Drain:
        return open_drain(self.config, run_id=run, connections=self.connections, lease_s=7200)

    def attach(self, run: str = "drain") -> Drain:
        return Drain.attach(drain_id(self.config.name, run), config=self.config, connections=self.connections)


def _arrived(bootstrap: str, config: str, dlq: str, origin: str) -> Queue:
    return Queue(bootstrap, QueueConfig.model_validate_json(config), dlq, origin)


def release(drain: Drain) -> None:
    lease.release(drain.ledger, drain.queue, drain.id, drain.epoch, "green")
    drain.close()


class Bed:
    """A broker and a folder, gone when this ends."""

    def __enter__(self) -> Self:
        self.folder = Path(tempfile.mkdtemp(prefix="dlq-bench-"))
        self._broker = Broker(properties={"log.retention.hours": "-1"}, long_lived=True)
        try:
            self._broker.start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        self.bootstrap = self._broker.bootstrap
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._broker.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def topic(self, name: str) -> str:
        unique = f"{name}-{uuid.uuid4().hex[:8]}"
        create_topic(self.bootstrap, unique, PARTS)
        return unique

    def drop(self, *topics: str) -> None:
        """Delete topics: a million records are more than a gigabyte."""
        client = AdminClient({"bootstrap.servers": self.bootstrap})
        for done in client.delete_topics(list(topics)).values():
            done.result(30)

    def queue(self, dlq: str, *, ledger: str | None = None, **more: Any) -> Queue:
        """A queue on the empty topic ``dlq``, whose first intake is done: what comes later needs nobody's decision."""
        name = f"q{uuid.uuid4().hex[:8]}"
        origin = self.topic("orders")
        here = self.folder / name
        here.mkdir()
        config = QueueConfig.model_validate(
            {
                "name": name,
                "source": {"kind": "kafka", "connection": "kafka", "topic": dlq, "start": "earliest"},
                "target": {
                    "kind": "kafka",
                    "connection": "kafka",
                    "allow": [origin],
                    "topic": origin,
                    "group": f"{origin}.workers",
                },
                "limits": {"dr": 10**9},
                "outcome": {"grace": "100ms"},
                "ledger": ledger or f"sqlite:///{here}/ledger.db",
                "archive": str(here / "archive"),
                "report": str(here / "report"),
                **more,
            }
        )
        Ledger.create(config.ledger).close()
        queue = Queue(self.bootstrap, config, dlq, origin)
        drain = queue.open("set-up")
        take_custody(drain, 30)
        release(drain)
        return queue

    def fill(self, dlq: str, count: int) -> None:
        fill(self.bootstrap, dlq, count, origin="orders", parts=PARTS)
