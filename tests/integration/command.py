"""Running ``dlq`` as a user does: a process of its own, configured by files and environment variables.

It is forked from a server that has imported all of it: hundreds of starts would cost minutes of imports. How the
program starts as a user starts it is a matter of tests/unit/test_cli.py, and of :meth:`Commands.start`.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from tests.forks import FORKS, Here
from tests.integration.rig import Rig, wait_until

from dlq import conservation
from dlq.cli.main import main

_SHIPPED = Path(__file__).resolve().parents[2] / "include" / "config"
_COMPILED = str(Path(tempfile.gettempdir()) / f"dlq-tests-pyc-{os.getuid()}")


class Commands:
    """``dlq`` for one rig's queue. ``run("take", rig.queue)`` expects exit status 0, or what ``exits`` says."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.folder = rig.folder / "config"
        (self.folder / "queues").mkdir(parents=True)
        shutil.copy(_SHIPPED / "taxonomy.yaml", self.folder)
        self.configure()

    def configure(self, **changes: Any) -> None:
        """Write the queue's file; ``changes`` replace whole sections."""
        data = {key: value for key, value in {**self.rig.data, **changes}.items() if key != "name"}
        (self.folder / "queues" / f"{self.rig.queue}.yaml").write_text(yaml.safe_dump(data))

    @property
    def environment(self) -> dict[str, str]:
        kafka = {"conn_type": "kafka", "extra": {"bootstrap.servers": self.rig.bootstrap}}
        ours = {
            "DLQ_CONFIG": str(self.folder),
            "AIRFLOW_CONN_KAFKA": json.dumps(kafka),
            # Dozens of processes import the same: compiled once, outside the checkout.
            "PYTHONPYCACHEPREFIX": _COMPILED,
        }
        kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONDONTWRITEBYTECODE", "COLUMNS")}
        return {**kept, **ours}

    def start(self, *arguments: str, **how: Any) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "dlq", *arguments]
        return subprocess.Popen(
            command, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **how
        )

    def run(
        self, *arguments: str, exits: int = 0, stdin: bytes = b"", seconds: float = 120
    ) -> subprocess.CompletedProcess[str]:
        with tempfile.TemporaryDirectory() as folder:
            files = [Path(folder) / name for name in ("in", "out", "err")]
            files[0].write_bytes(stdin)
            process = FORKS.Process(target=_dlq, args=(arguments, self.environment, files))
            process.start()
            process.join(seconds)
            if (code := process.exitcode) is None:
                process.kill()
            said = [file.read_text() for file in files[1:]]
        done = subprocess.CompletedProcess(["dlq", *arguments], -1 if code is None else code, *said)
        told = f"{done.stdout}\n{done.stderr}"
        assert "Traceback" not in told, told
        assert code == exits, f"dlq {' '.join(arguments)} ended with {code} (None: not at all): {told}"
        return done

    def json(self, *arguments: str, **how: Any) -> Any:
        """The one document the command prints with ``--json``."""
        (document,) = self.lines(*arguments, "--json", **how)
        return document

    def lines(self, *arguments: str, **how: Any) -> list[Any]:
        return [json.loads(line) for line in self.run(*arguments, **how).stdout.splitlines()]

    def refusal(self, *arguments: str, exits: int, **how: Any) -> str:
        """The error of a command that must fail: its one line."""
        said = self.run(*arguments, exits=exits, **how).stderr.splitlines()
        errors = [line for line in said if line.startswith("dlq: ")]
        assert len(errors) == 1, said
        assert said[-1] == errors[0]
        return errors[0].removeprefix("dlq: ")

    def kill_when(self, condition: Callable[[], Any], *arguments: str, what: str) -> None:
        """Start a command and SIGKILL it as soon as ``condition`` holds."""
        process = self.start(*arguments)
        try:
            wait_until(lambda: condition() or process.poll() is not None, what, seconds=60)
            assert process.poll() is None, f"it ended before {what}: {process.communicate()}"
            process.send_signal(signal.SIGKILL)
        finally:
            process.kill()
            process.communicate()


def _dlq(arguments: Sequence[str], environment: dict[str, str], files: Sequence[Path]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for stream, file in enumerate(files):
        os.dup2(os.open(file, os.O_RDWR | os.O_CREAT), stream)
    # as a start makes them: over the descriptors, whatever was put in their place before
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w", 1)
    conservation.Expectations = Here  # type: ignore[misc]
    main(arguments)


def write_ambiguous(rig: Rig, count: int) -> None:
    """As if the outcome of the oldest ``count`` open entries had been lost."""
    rig.write(
        "UPDATE entry SET state = 'ambiguous', reason = 'the cursor is gone' WHERE id IN "
        "(SELECT id FROM entry WHERE state = 'open' ORDER BY id LIMIT :n)",
        n=count,
    )
