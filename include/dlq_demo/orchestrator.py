"""The reference orchestrator as a service of its own, beside an embedded broker or SQS server."""

from __future__ import annotations

import os
import re
import secrets
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from dlq_demo import loopback
from dlq_demo.elasticmq import ACCESS_KEY, REGION, SECRET_KEY, ElasticMq
from dlq_demo.process import Process

_START_SECONDS = 60.0


class OrchestratorProcess:
    """One ``python -m dlq_orchestrator``; a context manager that starts and stops it.

    :param origin: the part of its command line that says where workflows come from.
    :param folder: its memory (kept) and its log; the same folder again goes on from there.
    :param token: the bearer token; by default a new one, the same one over restarts.
    :param port: of its HTTP side; by default a free one, the same one over restarts.
    :param env: more of its environment.
    :raises ServiceError: when it doesn't start; the message ends with its log.
    """

    def __init__(
        self,
        origin: Sequence[str],
        *,
        folder: Path,
        token: str | None = None,
        port: int | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.token = token or secrets.token_urlsafe(24)
        self.port = port or loopback.free_ports(1)[0]
        self.log = folder / "orchestrator.log"
        self.state = folder / "state"
        self._command: list[str | Path] = [
            *(sys.executable, "-m", "dlq_orchestrator", *origin),
            *("--host", loopback.HOST, "--port", str(self.port), "--state", self.state),
        ]
        self._env = {**(env or {}), "DLQ_ORCHESTRATOR_TOKEN": self.token}
        self._process: Process | None = None

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://{loopback.HOST}:{self.port}"

    @property
    def alive(self) -> bool:
        """Whether its process runs."""
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
        """Start it and wait until it consumes and answers."""
        loopback.require_free(self.port, "the reference orchestrator")
        already = self._times_ready()
        self._process = Process(
            "the reference orchestrator",
            self._command,
            log=self.log,
            env={**os.environ, **self._env},
        )
        self._process.wait_until(lambda: self._times_ready() > already, seconds=_START_SECONDS)

    def stop(self) -> None:
        """End it in order: the batch at hand is finished. Stopping twice is fine."""
        if self._process is not None:
            self._process.stop()

    def kill(self) -> None:
        """SIGKILL it, wherever it is."""
        assert self._process is not None, "start it first"
        self._process.kill()

    def _times_ready(self) -> int:
        return len(re.findall(r"^ready http", self.log.read_text(), re.M)) if self.log.exists() else 0


class ReferenceOrchestrator(OrchestratorProcess):
    """One that consumes a Kafka topic.

    :param bootstrap: the broker; both topics must exist.
    """

    def __init__(
        self,
        bootstrap: str,
        *,
        origin: str,
        dlq: str,
        folder: Path,
        group: str = "orders-workers",
        token: str | None = None,
        port: int | None = None,
        options: Sequence[str] = (),
    ) -> None:
        self.origin = origin
        self.dlq = dlq
        self.group = group
        reads = ("--bootstrap-servers", bootstrap, "--origin-topic", origin, "--dlq-topic", dlq)
        super().__init__([*reads, "--group", group, *options], folder=folder, token=token, port=port)


class SqsOrchestrator(OrchestratorProcess):
    """One that consumes an SQS queue.

    :param sqs: the server; the queue must exist there, with a redrive policy.
    """

    def __init__(self, sqs: ElasticMq, *, origin: str, folder: Path, options: Sequence[str] = ()) -> None:
        self.origin = origin
        reads = ("--origin-queue", origin, "--endpoint-url", sqs.endpoint, "--region", REGION, "--wait", "1")
        credentials = {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}
        super().__init__([*reads, *options], folder=folder, env=credentials)
