"""Running ``dlq`` as a user does: a process of its own, configured by files and environment variables."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from tests.integration.rig import Rig, wait_until

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
        done = subprocess.run(
            [sys.executable, "-m", "dlq", *arguments],
            env=self.environment,
            input=stdin,
            capture_output=True,
            timeout=seconds,
        )
        text = subprocess.CompletedProcess(
            done.args, done.returncode, done.stdout.decode(), done.stderr.decode()
        )
        said = f"{text.stdout}\n{text.stderr}"
        assert "Traceback" not in said, said
        assert text.returncode == exits, f"dlq {' '.join(arguments)} ended with {text.returncode}: {said}"
        return text

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


def write_ambiguous(rig: Rig, count: int) -> None:
    """As if the outcome of the oldest ``count`` open entries had been lost."""
    rig.write(
        "UPDATE entry SET state = 'ambiguous', reason = 'the cursor is gone' WHERE id IN "
        "(SELECT id FROM entry WHERE state = 'open' ORDER BY id LIMIT :n)",
        n=count,
    )
