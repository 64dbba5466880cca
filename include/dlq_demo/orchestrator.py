"""The reference orchestrator as a service of its own, beside an embedded broker."""

from __future__ import annotations

import os
import re
import secrets
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

from dlq_demo import loopback
from dlq_demo.process import Process

_START_SECONDS = 60.0


class ReferenceOrchestrator:
    """One ``python -m dlq_orchestrator``; a context manager that starts and stops it.

    :param bootstrap: the broker; both topics must exist.
    :param folder: its memory (kept) and its log; the same folder again goes on from there.
    :param token: the bearer token; by default a new one, the same one over restarts.
    :param port: of its HTTP side; by default a free one, the same one over restarts.
    :param options: more of its command line.
    :raises ServiceError: when it doesn't start; the message ends with its log.
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
        options: tuple[str, ...] = (),
    ) -> None:
        self.origin = origin
        self.dlq = dlq
        self.group = group
        self.token = token or secrets.token_urlsafe(24)
        self.port = port or loopback.free_ports(1)[0]
        self.log = folder / "orchestrator.log"
        self.state = folder / "state"
        self._command: list[str | Path] = [
            *(sys.executable, "-m", "dlq_orchestrator", "--bootstrap-servers", bootstrap),
            *("--origin-topic", origin, "--dlq-topic", dlq, "--group", group),
            *("--host", loopback.HOST, "--port", str(self.port), "--state", self.state),
            *options,
        ]
        self._process: Process | None = None

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://{loopback.HOST}:{self.port}"

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
            env={**os.environ, "DLQ_ORCHESTRATOR_TOKEN": self.token},
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
