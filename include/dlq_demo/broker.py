"""A real Kafka broker (KRaft, one node) on loopback, from nothing but Python packages and Maven Central.

``python -m dlq_demo.broker`` runs one in the foreground and prints its bootstrap address.
"""

from __future__ import annotations

import argparse
import base64
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient, NewTopic

from dlq_demo import jars, loopback
from dlq_demo.java import java
from dlq_demo.process import Process, ServiceError

_START_SECONDS = 60.0

# One node: internal topics can have but one replica, and a few partitions start faster than the default 50.
_PROPERTIES = {
    "node.id": "1",
    "process.roles": "broker,controller",
    "controller.listener.names": "CONTROLLER",
    "inter.broker.listener.name": "PLAINTEXT",
    "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
    "auto.create.topics.enable": "false",
    "num.partitions": "3",
    "offsets.topic.num.partitions": "4",
    "offsets.topic.replication.factor": "1",
    "transaction.state.log.num.partitions": "4",
    "transaction.state.log.replication.factor": "1",
    "transaction.state.log.min.isr": "1",
    "share.coordinator.state.topic.num.partitions": "1",
    "share.coordinator.state.topic.replication.factor": "1",
    "share.coordinator.state.topic.min.isr": "1",
    "group.initial.rebalance.delay.ms": "0",
    # An abandoned transaction holds read_committed readers back until this sweep; the default is 10 s.
    "transaction.abort.timed.out.transaction.cleanup.interval.ms": "500",
    # How long a killed broker's registration keeps its next start out; the default is 9 s.
    "broker.session.timeout.ms": "3000",
    "broker.heartbeat.interval.ms": "500",
    # Out of a heap of 512 MB, the cleaner would take 128 by default.
    "log.cleaner.dedupe.buffer.size": "8388608",
}

_LOGGING = """\
status = warn
shutdownHook = disable
appender.console.type = Console
appender.console.name = console
appender.console.layout.type = PatternLayout
appender.console.layout.pattern = %d{ISO8601} %-5p %c{1} %m%n
rootLogger.level = info
rootLogger.appenderRef.console.ref = console
"""


class Broker:
    """One broker and its data; a context manager that starts and stops it.

    :param folder: where data, settings and the log lie; kept. By default a temporary folder that
        ``stop()`` removes.
    :param port: of the client listener; by default a free one, the same one over restarts.
    :param properties: server properties beside or instead of ours, such as
        ``{"offsets.retention.minutes": "1"}``. ``{port}`` and ``{controller_port}`` in a value become
        the ports.
    :param long_lived: see :func:`dlq_demo.java.java`; for benchmarks.
    :raises Unavailable: when Java or the jars can't be had.
    :raises ServiceError: when the port is taken or the broker doesn't start.
    """

    def __init__(
        self,
        folder: Path | None = None,
        *,
        port: int | None = None,
        properties: Mapping[str, str] | None = None,
        long_lived: bool = False,
    ) -> None:
        self._temporary = folder is None
        self.folder = Path(tempfile.mkdtemp(prefix="dlq-kafka-")) if folder is None else folder.resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        chosen, self._controller_port = loopback.free_ports(2)
        self.port = port or chosen
        self._extra = dict(properties or {})
        self._long_lived = long_lived
        self._process: Process | None = None

    @property
    def bootstrap(self) -> str:
        """For ``bootstrap.servers``."""
        return f"{loopback.HOST}:{self.port}"

    @property
    def log(self) -> Path:
        """What the broker wrote."""
        return self.folder / "broker.log"

    @property
    def alive(self) -> bool:
        """Whether the broker's process runs."""
        return self._process is not None and self._process.alive

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start it and wait until it answers a client. Data from an earlier start in this folder is kept."""
        loopback.require_free(self.port, "the embedded Kafka broker")
        program: list[str | Path] = [
            *java("the embedded Kafka broker", long_lived=self._long_lived),
            "--sun-misc-unsafe-memory-access=allow",  # Kafka uses it; Java 24 and later warn at every start
            f"-Dlog4j2.configurationFile={self._write_logging()}",
            "-cp",
            jars.classpath("kafka"),
        ]
        settings = self._write_settings()
        if not (self.folder / "data" / "meta.properties").exists():
            self._format(program, settings)
        self._process = Process(
            "the embedded Kafka broker",
            [*program, "-Xmx512m", "kafka.Kafka", settings],
            log=self.log,
            cwd=self.folder,
        )
        self._process.wait_until(self._answers, seconds=_START_SECONDS)

    def stop(self) -> None:
        """End it; a temporary folder goes with it. Stopping twice is fine."""
        if self._process is not None:
            self._process.stop()
        if self._temporary:
            shutil.rmtree(self.folder, ignore_errors=True)

    def kill(self) -> None:
        """SIGKILL: what was not flushed by the broker itself is in the operating system's hands."""
        assert self._process is not None, "start it first"
        self._process.kill()

    def restart(self) -> None:
        """End it if it runs, and start it again on the same data and port."""
        if self._process is not None:
            self._process.stop()
        self.start()

    def _answers(self) -> bool:
        # a new client each time: one whose connection was refused waits longer and longer before the next try
        client = AdminClient({"bootstrap.servers": self.bootstrap, "log_level": 0})
        try:
            return bool(client.list_topics(timeout=1).brokers)
        except KafkaException:
            return False

    def _write_settings(self) -> Path:
        listeners = {
            "listeners": "PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller_port}",
            "advertised.listeners": "PLAINTEXT://127.0.0.1:{port}",
            "controller.quorum.voters": "1@127.0.0.1:{controller_port}",
            "log.dirs": str(self.folder / "data"),
        }
        ports = {"{port}": str(self.port), "{controller_port}": str(self._controller_port)}
        path = self.folder / "server.properties"
        with path.open("w") as file:
            for name, value in {**_PROPERTIES, **listeners, **self._extra}.items():
                for placeholder, number in ports.items():
                    value = value.replace(placeholder, number)
                file.write(f"{name}={value}\n")
        return path

    def _write_logging(self) -> Path:
        path = self.folder / "log4j2.properties"
        path.write_text(_LOGGING)
        return path

    def _format(self, program: list[str | Path], settings: Path) -> None:
        while (cluster := base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")).startswith("-"):
            continue  # the tool would take it for an option
        command = [*program, "kafka.tools.StorageTool", "format", "-t", cluster, "-c", settings]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ServiceError(
                f"the embedded Kafka broker's storage in {self.folder} could not be formatted. Delete the "
                f"folder if an older version wrote it. It said:\n{done.stdout}{done.stderr}"
            )


def by_a_link(inside: int, link: int) -> dict[str, str]:
    """Properties of a broker with a second listener on port ``inside``, whose clients are told to come by ``link``."""
    own = "PLAINTEXT://127.0.0.1:{port}"
    return {
        "listeners": f"{own},LINK://127.0.0.1:{inside},CONTROLLER://127.0.0.1:{{controller_port}}",
        "advertised.listeners": f"{own},LINK://127.0.0.1:{link}",
        "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,LINK:PLAINTEXT,CONTROLLER:PLAINTEXT",
    }


def create_topic(
    bootstrap: str,
    name: str,
    partitions: int = 1,
    config: Mapping[str, str] | None = None,
    *,
    seconds: float = 10.0,
) -> None:
    """Create a topic and wait until clients see every partition led."""
    client = AdminClient({"bootstrap.servers": bootstrap})
    topic = NewTopic(name, num_partitions=partitions, replication_factor=1, config=dict(config or {}))
    client.create_topics([topic])[name].result(seconds)
    deadline = time.monotonic() + seconds
    while True:  # the answer comes from the controller; the broker hears of it a moment later
        seen = client.list_topics(name, timeout=seconds).topics[name].partitions.values()
        if len(seen) == partitions and all(partition.leader >= 0 for partition in seen):
            return
        if time.monotonic() > deadline:
            raise ServiceError(
                f"topic {name} was created at {bootstrap} but is not led after {seconds:.0f} s"
            )
        time.sleep(0.02)


def main() -> None:
    """Run a broker until Ctrl-C or SIGTERM."""
    parser = argparse.ArgumentParser(
        prog="python -m dlq_demo.broker", description="A real Kafka broker on loopback."
    )
    parser.add_argument("--folder", type=Path, help="keep data here (default: a temporary folder)")
    parser.add_argument("--port", type=int, help="of the client listener (default: a free one)")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        with Broker(arguments.folder, port=arguments.port) as broker:
            print(broker.bootstrap, flush=True)
            while broker.alive:
                time.sleep(0.5)
            raise ServiceError(f"the broker ended by itself; see {broker.log}")
    except KeyboardInterrupt:
        return
    except ServiceError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
