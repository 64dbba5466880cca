"""Where the demo keeps what it makes: one folder in the checkout, of which a run leaves only what a reader wants."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dlq_demo.process import ServiceError

CHECKOUT = Path(__file__).resolve().parents[2]


class Home:
    """The demo's folder. Reports and Airflow's login outlive a run; queue, ledger and archive begin anew."""

    def __init__(self, folder: Path = CHECKOUT / ".run" / "demo") -> None:
        self.folder = folder
        self.kafka = folder / "kafka"
        self.sqs = folder / "sqs"
        self.orchestrator = folder / "orchestrator"
        self.airflow = folder / "airflow"
        self.bundle = folder / "dlq"
        self.ledger = f"sqlite:///{self.bundle / 'ledger.db'}"

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Keep the folder for this process, emptied of what an earlier run left in whatever state it was.

        :raises ServiceError: while another demo runs in it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("a+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                lock.seek(0)
                raise ServiceError(
                    f"another demo runs in {self.folder} (process {lock.read().strip() or 'unknown'}): "
                    "end it with Ctrl-C where it runs, then start this one again."
                ) from None
            lock.truncate(0)
            lock.write(str(os.getpid()))
            lock.flush()
            self._forget()
            yield

    def _forget(self) -> None:
        for folder in (self.kafka, self.sqs, self.orchestrator, self.bundle / "archive"):
            shutil.rmtree(folder, ignore_errors=True)
        for left in self.bundle.glob("ledger.db*"):  # with what SQLite keeps beside it
            left.unlink()
        self.bundle.mkdir(parents=True, exist_ok=True)
