"""A drain: one holder of a queue's lease, from opening to verdict, attached to by each of its tasks."""

from __future__ import annotations

import hashlib
import json
import logging
from functools import cached_property
from typing import Any, Literal, Self

from sqlalchemy import func, insert, select, update

from dlq import clock
from dlq.archive import Archive
from dlq.config import KafkaSource, KafkaTarget, OrchestratorTarget, QueueConfig, SqsSource, SqsTarget
from dlq.errors import ConfigError, Refused
from dlq.ledger import Ledger, custody, lease
from dlq.ledger.schema import drain as drains
from dlq.ledger.schema import entry, event
from dlq.orchestrator import Orchestrator
from dlq.orchestrator_http import HttpOrchestrator
from dlq.ports import Connections, Depth, Source, Target

Level = Literal["info", "warning", "error"]
_LEVELS = {"info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
log = logging.getLogger("dlq.drain")


def drain_id(queue: str, run_id: str) -> str:
    """The id every record, header and log line of a run carries."""
    return f"{queue}-{hashlib.sha256(run_id.encode()).hexdigest()[:12]}"


class Drain:
    """One run on one queue. Made by :func:`dlq.opening.open_drain`, :meth:`attach` or :func:`dry`; close it, or use
    ``with``.

    ``config`` is the queue's file as it was when the drain was opened. A dry run holds no lease and writes nothing.
    """

    def __init__(
        self,
        identity: str,
        config: QueueConfig,
        ledger: Ledger,
        connections: Connections,
        *,
        epoch: int,
        kind: str = "drain",
        dry_run: bool = False,
    ) -> None:
        self.id = identity
        self.queue = config.name
        self.config = config
        self.ledger = ledger
        self.archive = Archive(config.archive, config.name)
        self.connections = connections
        self.epoch = epoch
        self.kind = kind
        self.dry_run = dry_run

    @classmethod
    def attach(cls, identity: str, *, config: QueueConfig, connections: Connections) -> Drain:
        """A later task's hold on the drain ``identity``; ``config`` says where its ledger is, the rest is as opened.

        :raises Fenced: when another holder took the queue since.
        """
        drain = cls.look(identity, config=config, connections=connections)
        lease.held(drain.ledger, config.name, identity, drain.epoch)
        return drain

    @classmethod
    def look(cls, identity: str, *, config: QueueConfig, connections: Connections) -> Drain:
        """The drain ``identity``, whoever holds the queue now: to read it, as its report does."""
        ledger = Ledger.open(config.ledger)
        with ledger.read() as tx:
            found = tx.execute(
                select(drains.c.config, drains.c.epoch, drains.c.kind).where(drains.c.id == identity)
            ).first()
        if found is None:
            ledger.close()
            raise Refused(
                f"the ledger knows no drain {identity}: open_drain did not run, or the queue's file names "
                "another ledger"
            )
        return cls(
            identity,
            QueueConfig.thaw(found.config, identity).model_copy(update={"ledger": config.ledger}),
            ledger,
            connections,
            epoch=int(found.epoch),
            kind=str(found.kind),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for name in ("source", "target", "returning"):
            if (client := self.__dict__.pop(name, None)) is not None:
                client.close()
        self.ledger.close()

    @cached_property
    def source(self) -> Source:
        found = connect(self.config, self.connections)
        with self.ledger.read() as tx:
            found.uri = custody.living_uri(tx, self.queue, found.uri)
        return found

    @cached_property
    def target(self) -> Target:
        if isinstance(self.config.target, KafkaTarget):
            from dlq.targets.kafka import KafkaReplay

            return KafkaReplay(self.config.target, self.connections)
        if isinstance(self.config.target, SqsTarget):
            from dlq.targets.sqs import SqsReplay

            return SqsReplay(self.config.target, self.connections)
        if isinstance(self.config.target, OrchestratorTarget):
            from dlq.targets.orchestrator import OrchestratorReplay

            assert self.orchestrator is not None  # the configuration's own check
            return OrchestratorReplay(self.orchestrator)
        from dlq.targets.memory import MemoryReplay

        return MemoryReplay.shared(
            self.config.target.connection,
            self.config.target.allow,
            allow_compacted=self.config.target.allow_compacted,
        )

    @cached_property
    def returning(self) -> Target:
        """The queue itself as a target: where entries are handed back, and nothing else may go."""
        if isinstance(self.config.source, SqsSource):
            from dlq.targets.sqs import SqsReplay

            queue = self.config.source.queue
            dlq = SqsTarget(kind="sqs", connection=self.config.source.connection, allow=(queue,), queue=queue)
            return SqsReplay(dlq, self.connections)
        if not isinstance(self.config.source, KafkaSource):
            raise ConfigError(f"queue {self.queue}: entries can't be handed back to this kind of source")
        from dlq.targets.kafka import KafkaReplay

        back = KafkaTarget(
            kind="kafka", connection=self.config.source.connection, allow=(self.config.source.topic,)
        )
        return KafkaReplay(back, self.connections)

    def target_of(self, kind: str) -> Target:
        """Where the outputs of a job of ``kind`` (replay, hand_back) go."""
        return self.returning if kind == "hand_back" else self.target

    @cached_property
    def orchestrator(self) -> Orchestrator | None:
        if self.config.orchestrator is None:
            return None
        return HttpOrchestrator.connect(self.connections(self.config.orchestrator.connection))

    def note(self, stage: str, said: str, *, level: Level = "info", **data: Any) -> None:
        """One line of the drain's timeline and of the log. ``data`` is JSON without payloads."""
        log.log(_LEVELS[level], "%s: %s", stage, said)
        if not self.dry_run:
            with self.ledger.write(self.queue, None) as tx:
                tx.execute(
                    insert(event).values(
                        drain=self.id,
                        at=clock.now(),
                        stage=stage,
                        level=level,
                        text=said,
                        data=json.dumps(data, default=str),
                    )
                )

    def noted(self, stage: str) -> dict[str, Any] | None:
        """The data of the newest line a stage wrote since the drain was opened last, None where it wrote none.

        What an earlier life of a cleared run said is not of this one.
        """
        opened = select(func.max(event.c.id)).where(event.c.drain == self.id, event.c.stage == "opened")
        with self.ledger.read() as tx:
            found = tx.execute(
                select(event.c.data)
                .where(
                    event.c.drain == self.id,
                    event.c.stage == stage,
                    event.c.id > func.coalesce(opened.scalar_subquery(), 0),
                )
                .order_by(event.c.id.desc())
                .limit(1)
            ).scalar()
        return json.loads(found) if found is not None else None

    def phase(self, name: str) -> None:
        """Say where the drain is, for those who watch it."""
        if not self.dry_run:
            with self.ledger.write(self.queue, self.epoch) as tx:
                tx.execute(update(drains).where(drains.c.id == self.id).values(phase=name))

    def extend(self, seconds: float) -> None:
        """Hold the lease for ``seconds`` more: a stage extends it to its own deadline before it starts."""
        if not self.dry_run:
            lease.extend(self.ledger, self.queue, self.epoch, seconds)

    def positions(self) -> dict[int, int]:
        """The ledger's position of each partition of the source."""
        with self.ledger.read() as tx:
            row = custody.find_source(tx, self.source.uri)
            return {} if row is None else custody.positions(tx, row)

    def depth(self) -> Depth:
        """What the DLQ still holds beyond the ledger's positions."""
        return self.source.depth(self.positions())

    def unsettled(self) -> int:
        """How many entries in custody are not settled."""
        with self.ledger.read() as tx:
            return int(
                tx.execute(
                    select(func.count())
                    .select_from(entry)
                    .where(entry.c.queue == self.queue, entry.c.settled_drain.is_(None))
                ).scalar_one()
            )


def connect(config: QueueConfig, connections: Connections) -> Source:
    """A client of the queue's source.

    :raises ConfigError: when the queue or its Connection is wrong.
    """
    source = config.source
    if isinstance(source, KafkaSource):
        from dlq.sources.kafka import KafkaDlq

        return KafkaDlq(config.name, source, connections)
    if isinstance(source, SqsSource):
        from dlq.sources.sqs import SqsDlq

        return SqsDlq(source, connections)
    from dlq.sources.memory import MemoryDlq

    return MemoryDlq.shared(source.connection, source.start)


def dry(config: QueueConfig, *, run_id: str, connections: Connections) -> Drain:
    """A drain that holds no lease and changes nothing: for dry runs, samples and looks."""
    return Drain(
        drain_id(config.name, run_id), config, Ledger.open(config.ledger), connections, epoch=-1, dry_run=True
    )
