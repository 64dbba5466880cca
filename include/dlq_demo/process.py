"""A service as a process: started on a leash with a log file, and stopped with everything it started."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from dlq.errors import DlqError

_LEASH = Path(__file__).with_name("leash.py")
_KILL = signal.SIGUSR1  # leash.py: kill all, no last word


class ServiceError(DlqError):
    """An embedded service could not be started or stopped; the message says which and what to do."""


class Unavailable(ServiceError):
    """A part a service is made of can't be had on this machine; the message says which and what to do."""


class Process:
    """One running command; output goes to ``log`` (appended).

    However this Python process ends, SIGKILL included, the command and its descendants end too (leash.py).
    ``stop_with`` is the signal that asks for it, ``grace`` the seconds they have to do so by themselves.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str | Path],
        *,
        log: Path,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        grace: float = 10.0,
        stop_with: signal.Signals = signal.SIGTERM,
    ) -> None:
        self.name = name
        self.log = log
        self._grace = grace
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            self._leash = subprocess.Popen(
                [sys.executable, str(_LEASH), str(grace), stop_with.name, *(str(part) for part in command)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=env,
                cwd=cwd,
                start_new_session=True,  # Ctrl-C is for the owner, who then stops its services in order
            )

    @property
    def alive(self) -> bool:
        """Whether the command still runs."""
        return self._leash.poll() is None

    def require_alive(self) -> None:
        """Raise ServiceError with the log's end if the command has ended."""
        if not self.alive:
            raise ServiceError(
                f"{self.name} ended by itself, exit status {self._leash.returncode}. {self._last_words()}"
            )

    def wait_until(self, ready: Callable[[], bool], *, seconds: float) -> None:
        """Poll ``ready`` until it holds; ServiceError with the log's end if it dies or time is up."""
        deadline = time.monotonic() + seconds
        while not ready():
            self.require_alive()
            if time.monotonic() > deadline:
                raise ServiceError(f"{self.name} was not ready within {seconds:.0f} s. {self._last_words()}")
            time.sleep(0.05)

    def let_go(self) -> None:
        """Ask the command to end, without waiting: to stop several at once."""
        assert self._leash.stdin is not None
        self._leash.stdin.close()

    def stop(self) -> None:
        """Ask the command to end, wait, and kill what is left after the grace. Stopping twice is fine."""
        self.let_go()
        try:
            self._leash.wait(self._grace + 15)
        except subprocess.TimeoutExpired:
            raise ServiceError(
                f"{self.name} could not be stopped: look at the processes below {self._leash.pid}."
            ) from None

    def _last_words(self, lines: int = 12) -> str:
        text = self.log.read_text(errors="replace").splitlines()[-lines:]
        return "\n".join([f"The end of {self.log}:", *(f"    {line}" for line in text or ["(nothing)"])])

    def kill(self) -> None:
        """SIGKILL the command and all its descendants at once, as a machine that loses power would."""
        if self.alive:
            self._leash.send_signal(_KILL)
        self.stop()
