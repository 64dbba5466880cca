"""A queue of a test's own with everything around it: broker, orchestrator, a real Airflow, ledger, `dlq`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from confluent_kafka import Consumer, TopicPartition
from sqlalchemy import func, select
from tests.integration.rig import wait_until

from dlq.config import QueueConfig, load_queue
from dlq.connections import from_environment
from dlq.drain import Drain, drain_id, dry
from dlq.ledger.schema import entry, metadata
from dlq_demo.airflow import AirflowStandalone
from dlq_demo.broker import Broker
from dlq_demo.stream import stream
from dlq_demo.surroundings import KafkaSurroundings

ROOT = Path(__file__).parents[2]
QUEUE, DRAIN, REVIEW = "orders", "dlq_drain__orders", "dlq_review__orders"

_SETTLED = timedelta(seconds=8)

Place = tuple[int, int]
"""Partition and offset."""


@dataclass(frozen=True)
class Seen:
    """A record as a read_committed consumer sees it."""

    key: bytes | None
    value: bytes | None
    headers: dict[str, bytes]


@dataclass
class House:
    """What runs, and what a test asks of it."""

    folder: Path
    config: QueueConfig
    around: KafkaSurroundings
    airflow: AirflowStandalone
    seed: int = 0

    def incident(self, dead: int) -> None:
        """Workflows run until ``dead`` more of them are dead-lettered."""
        self.seed += 100_000
        stream(self.around, until=len(self.records(self.around.dlq)) + dead, seed=self.seed)

    def start(self, dag_id: str, **conf: Any) -> str:
        run_id = f"test__{uuid.uuid4().hex[:8]}"
        self.airflow.api.trigger(dag_id, run_id, conf)
        return run_id

    def finish(self, dag_id: str, run_id: str, *, seconds: float = 240) -> dict[str, str | None]:
        """Wait for a run that must succeed; its task states. What failed is shown with its log."""
        state = self.airflow.api.wait_for_run(dag_id, run_id, seconds=seconds)
        states = self.airflow.api.task_states(dag_id, run_id)
        failed = [task for task, found in states.items() if found == "failed"]
        logs = "".join(f"\n--- {task}\n{self.airflow.api.log(dag_id, run_id, task)}" for task in failed)
        assert state == "success", f"{states}{logs}"
        return states

    def question(self, dag_id: str, run_id: str) -> dict[str, Any]:
        """What a run asks a person, once an answer can't get lost any more (see `AirflowApi.answer`)."""
        api = self.airflow.api
        [asked] = wait_until(lambda: api.questions(dag_id, run_id), f"{dag_id} asks", seconds=120)
        at = datetime.fromisoformat(asked["created_at"])
        wait_until(lambda: datetime.now(UTC) - at > _SETTLED, "the task is parked", seconds=30)
        return dict(asked)

    def dlq(self, *words: str, stdin: bytes | None = None) -> bytes:
        """Run the command line as its user does; it must end with 0."""
        program = Path(sys.executable).with_name("dlq")
        done = subprocess.run([program, *words], input=stdin, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout

    @contextmanager
    def look(self, run_id: str = "nobody") -> Iterator[Drain]:
        """The queue and its ledger, to read."""
        with dry(self.config, run_id=run_id, connections=from_environment) as drain:
            yield drain

    def states(self) -> dict[str, int]:
        """Entries in custody by state."""
        with self.look() as drain, drain.ledger.read() as tx:
            rows = tx.execute(select(entry.c.state, func.count()).group_by(entry.c.state)).all()
        return {str(state): int(count) for state, count in rows}

    def records(self, topic: str) -> dict[Place, Seen]:
        """All that a read_committed consumer finds in a topic now."""
        return dict(_read(self.around.broker.bootstrap, topic))

    def replays(self, drain: str | None = None) -> dict[Place, list[Seen]]:
        """Records on the origin topic that a drain (or any) put there, by the place of their entry in the DLQ."""
        found: dict[Place, list[Seen]] = {}
        for record in self.records(self.around.origin).values():
            if (ours := record.headers.get("dlq-entry")) and drain in (
                None,
                record.headers["dlq-drain"].decode(),
            ):
                part, offset = ours.decode().split("/")[-2:]
                found.setdefault((int(part), int(offset)), []).append(record)
        return found

    def orchestrator(self, path: str) -> Any:
        token = {"Authorization": f"Bearer {self.around.orchestrator.token}"}
        answer = httpx.get(f"{self.around.orchestrator.url}{path}", headers=token, trust_env=False)
        return answer.raise_for_status().json()

    def everything(self) -> dict[str, Any]:
        """All a dry run must leave as it is: ledger, archive, topics, offsets, the orchestrator's settings."""
        bootstrap = self.around.broker.bootstrap
        with self.look() as drain, drain.ledger.read() as tx:
            rows = {t.name: sorted(map(str, tx.execute(select(t)).all())) for t in metadata.sorted_tables}
        return {
            "ledger": rows,
            "files": sorted(str(p.relative_to(self.folder)) for p in (self.folder / "dlq").rglob("*")),
            "ends": {topic: _ends(bootstrap, topic) for topic in (self.around.origin, self.around.dlq)},
            "offsets": _committed(bootstrap, f"dlq-drain.{QUEUE}", self.around.dlq),
            "routing": self.orchestrator("/v1/routing"),
            "limits": {
                (q["plugin"], q["resource"]): q["limit"] for q in self.orchestrator("/v1/quotas")["quotas"]
            },
        }


@contextmanager
def built(broker: Broker, folder: Path, settings: Mapping[str, str] | None = None) -> Iterator[House]:
    """Everything up, the queue's first intake done while it was empty.

    :param settings: of Airflow, such as ``{"AIRFLOW__SCHEDULER__…": "5"}``.
    """
    mark = uuid.uuid4().hex[:8]
    shutil.copytree(ROOT / "include" / "config", folder / "config")
    file = folder / "config" / "queues" / f"{QUEUE}.yaml"
    shipped = file.read_text()
    for name in (
        "topic: orders.dlq",
        "allow: [orders",
        "group: orders-workers",
    ):  # topics and group of our own
        assert name in shipped
        shipped = shipped.replace(name, f"{name}.{mark}")
    file.write_text(shipped)
    (folder / "dlq").mkdir()
    variables = {
        "DLQ_CONFIG": str(folder / "config"),
        "DLQ_HOME": str(folder / "dlq"),
        "DLQ_LEDGER": f"sqlite:///{folder / 'dlq' / 'ledger.db'}",
    }
    with pytest.MonkeyPatch.context() as patch, ExitStack() as services:
        patch.delenv("DLQ_APPROVE_FIX", raising=False)
        for name, value in variables.items():
            patch.setenv(name, value)
        config = load_queue(QUEUE)
        around = KafkaSurroundings(config, orchestrator=folder / "orchestrator", broker=broker)
        for name, value in around.connections.items():
            patch.setenv(name, value)
        services.enter_context(around)
        airflow = AirflowStandalone(
            folder / "airflow",
            dags=ROOT / "dags",
            plugins=ROOT / "plugins",
            env={**variables, **around.connections, **(settings or {})},
        )
        services.enter_context(airflow)
        house = House(folder, config, around, airflow)
        house.dlq("ledger", "create", QUEUE)
        house.dlq("take", QUEUE)
        for dag_id in (DRAIN, REVIEW):
            airflow.wait_for_dag(dag_id)
        yield house


def identity(run_id: str) -> str:
    """The drain's id, as every record and log line of a run carries it."""
    return drain_id(QUEUE, run_id)


def _reader(bootstrap: str, group: str) -> Consumer:
    return Consumer(
        {
            "bootstrap.servers": bootstrap,
            "group.id": group,
            "isolation.level": "read_committed",
            "enable.auto.commit": False,
            "enable.partition.eof": True,
        }
    )


def _read(bootstrap: str, topic: str) -> Iterator[tuple[Place, Seen]]:
    reader = _reader(bootstrap, f"witness-{os.getpid()}")
    try:
        ends = _ends_of(reader, topic)
        reader.assign([TopicPartition(topic, part, 0) for part in ends])
        left = set(ends)
        while left:
            message = reader.poll(10)
            assert message is not None, f"{topic}: {left} did not end"
            part, error = message.partition(), message.error()
            assert part is not None
            if error is not None:
                assert error.code() == -191, error  # the end of a partition
                left.discard(part)
                continue
            offset = message.offset()
            assert offset is not None
            headers = {name: value or b"" for name, value in message.headers() or []}
            yield (part, offset), Seen(message.key(), message.value(), headers)
    finally:
        reader.close()


def _ends(bootstrap: str, topic: str) -> dict[int, int]:
    reader = _reader(bootstrap, "witness")
    try:
        return _ends_of(reader, topic)
    finally:
        reader.close()


def _ends_of(reader: Consumer, topic: str) -> dict[int, int]:
    parts = reader.list_topics(topic, timeout=10).topics[topic].partitions
    return {part: reader.get_watermark_offsets(TopicPartition(topic, part), timeout=10)[1] for part in parts}


def _committed(bootstrap: str, group: str, topic: str) -> dict[int, tuple[int, str | None]]:
    reader = _reader(bootstrap, group)
    try:
        found = reader.committed(
            [TopicPartition(topic, part) for part in _ends_of(reader, topic)], timeout=10
        )
        return {at.partition: (at.offset, at.metadata) for at in found}
    finally:
        reader.close()
