"""A queue that may be broken and everything around it: broker, orchestrator, a real Airflow, load, and the account."""

from __future__ import annotations

import os
import shutil
import time
import uuid
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from confluent_kafka import Consumer, Producer
from rich.console import Console
from sqlalchemy import select

from dlq.chaos import require_target
from dlq.config import load_queue
from dlq.connections import from_environment
from dlq.drain import drain_id, dry
from dlq.ledger.schema import drain as drains
from dlq_demo import account
from dlq_demo.airflow import AirflowStandalone
from dlq_demo.breakage import small_disk
from dlq_demo.home import CHECKOUT, Home
from dlq_demo.process import ServiceError
from dlq_demo.stream import behind, wait_until_none
from dlq_demo.surroundings import BreakableSurroundings
from dlq_demo.terminal import dlq, step, uninterrupted
from dlq_orchestrator.traffic import send, workflows

NAME = "playground"
_SHIPPED = CHECKOUT / "include" / "config"


class Playground:
    """One queue marked as a chaos target; a context manager that starts and stops all of it.

    :param purpose: names its folder below ``.run``.
    :param schedule: a cron expression for the drains.
    :raises dlq.errors.Refused: the queue is not marked.
    """

    def __init__(self, console: Console, purpose: str, queue: str, *, schedule: str = "none") -> None:
        self._console = console
        self.home = Home(CHECKOUT / ".run" / purpose)
        self._open = ExitStack()
        self._variables = {
            "DLQ_HOME": str(self.home.bundle),
            "DLQ_LEDGER": f"sqlite:///{self.ledger}/ledger.db",
            "DLQ_CONFIG": str(self.home.folder / "config"),
            "DLQ_SCHEDULE": schedule,
            "DLQ_APPROVE_FIX": "policy",
        }
        os.environ.update(self._variables)
        self._configure(queue)
        self.config = load_queue(queue)
        self._faults = require_target(self.config).faults
        self.sent: set[str] = set()
        self.no_disk: str | None = None
        self._seed = 0

    @property
    def ledger(self) -> Path:
        """The ledger's folder."""
        return self.home.bundle / "ledger"

    @property
    def disk(self) -> Path:
        """Where the archive lies: a small file system of its own, unless :attr:`no_disk` says why not."""
        return self.home.bundle / "disk"

    @property
    def drain_dag(self) -> str:
        return f"dlq_drain__{self.config.name}"

    def _configure(self, queue: str) -> None:
        """A configuration folder with this queue's file only."""
        folder = self.home.folder / "config"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(
            _SHIPPED, folder, ignore=lambda where, _: ["queues"] if where == str(_SHIPPED) else []
        )
        (folder / "queues").mkdir()
        own = (
            Path(__file__).with_name(f"{queue}.yaml")
            if queue == NAME
            else _SHIPPED / "queues" / f"{queue}.yaml"
        )
        if own.exists():  # else load_queue says what is wrong
            shutil.copy(own, folder / "queues")

    def __enter__(self) -> Self:
        with ExitStack() as opening:
            self._start(opening)
            self._open = opening.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        uninterrupted()
        self._console.print("Stopping Airflow, the orchestrator and Kafka …", style="dim")
        self._open.close()

    def _start(self, opening: ExitStack) -> None:
        opening.enter_context(self.home.taken())
        shutil.rmtree(self.ledger, ignore_errors=True)
        self.ledger.mkdir(parents=True)
        self.no_disk = opening.enter_context(small_disk(self.disk))
        self.around = BreakableSurroundings(
            self.config, orchestrator=self.home.orchestrator, kafka=self.home.kafka
        )
        os.environ.update(self.around.connections)
        self.airflow = AirflowStandalone(
            self.home.airflow,
            dags=CHECKOUT / "dags",
            plugins=CHECKOUT / "plugins",
            env={**self._variables, **self.around.connections},
            fresh=True,
        )
        opening.callback(self.airflow.stop)
        self.airflow.launch()
        with step(self._console, f"{self.around.transport} and the orchestrator") as said:
            opening.enter_context(self.around)
            said.append(str(self.around))
        with step(self._console, "Ledger") as said:
            dlq("ledger", "create", self.config.name)
            dlq("take", self.config.name)  # while it is empty: what comes later is nobody's old letter
            said.append(f"queue {self.config.name}: {', '.join(self._faults)}")
        with step(self._console, "Airflow") as said:
            self.airflow.wait_until_up()
            for kind in ("drain", "chaos"):
                self.airflow.wait_for_dag(f"dlq_{kind}__{self.config.name}")
            said.append(f"{self.airflow.url}  user admin, password {self.airflow.password}")
        quiet = {"bootstrap.servers": self.around.broker.bootstrap, "log_level": 0}
        self._producer = Producer({**quiet, "enable.idempotence": True, "linger.ms": 5})
        self._watch = Consumer({**quiet, "group.id": self.around.group, "enable.auto.commit": False})
        opening.callback(self._watch.close)

    def load(self, count: int, mix: Mapping[str, float] | None = None) -> None:
        """Send so many workflows, of the kinds of ``mix``."""
        self._seed += 1
        records = list(workflows(count, self._seed, dict(mix) if mix else None))
        send(self._producer, self.around.origin, records)
        self.sent |= {dict(record.headers)["correlation-id"].decode() for record in records}  # type: ignore[union-attr]

    def let_run(self) -> None:
        """Wait until all that was sent has run."""
        wait_until_none(lambda: behind(self._watch, self.around.origin), self.around.origin)

    def queued(self) -> int:
        """Dead letters beyond the ledger's position."""
        with dry(self.config, run_id="look", connections=from_environment) as look:
            return look.depth().entries

    def account(self) -> account.Account:
        at = self.around
        return account.read(self.config, at.broker.bootstrap, at.orchestrator, self.sent, self.queued())

    def start_drain(self, why: str) -> str:
        """Trigger a drain; returns its run id."""
        run_id = f"{why}__{uuid.uuid4().hex[:8]}"
        self.airflow.api.trigger(self.drain_dag, run_id, {"incident": why})
        return run_id

    def finish(self, dag_id: str, run_id: str, seconds: float = 900) -> str:
        """Wait for a run's end; returns its state."""
        state = self.airflow.api.wait_for_run(dag_id, run_id, seconds=seconds)
        self.airflow.require_alive()
        return state

    def wait_for_phase(self, run_id: str, phase: str, seconds: float = 120) -> None:
        """Wait until a drain comes to a phase.

        :raises ServiceError: it doesn't by then.
        """
        until = time.monotonic() + seconds
        asked = select(drains.c.phase).where(drains.c.id == drain_id(self.config.name, run_id))
        with dry(self.config, run_id="look", connections=from_environment) as look:
            at = None
            while at != phase:
                if time.monotonic() > until:
                    raise ServiceError(
                        f"run {run_id} of {self.drain_dag} did not come to {phase}, it is in {at}"
                    )
                time.sleep(0.05)
                with look.ledger.read() as tx:
                    at = tx.execute(asked).scalar()
