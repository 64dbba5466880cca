"""What became of everything that was sent, by those who saw it: topics, ledger, the orchestrator's log of effects."""

from __future__ import annotations

import sqlite3
import time
import uuid
from collections import Counter
from collections.abc import Collection
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from confluent_kafka import Consumer, KafkaError, TopicPartition
from sqlalchemy import func, select

from dlq.config import QueueConfig
from dlq.ledger import Ledger
from dlq.ledger.schema import entry
from dlq_demo.orchestrator import ReferenceOrchestrator
from dlq_demo.process import ServiceError

_SHOWN = 3
_PATIENCE_S = 60.0


@dataclass(frozen=True)
class Account:
    """Counts of now.

    :param into: dead letters that were ever in the queue.
    :param out: entries settled.
    :param waiting: entries in custody that are not.
    :param queued: dead letters not taken yet.
    :param recovered: workflows that failed, and succeeded later.
    :param lost: dead letters in neither place, and workflows that neither succeeded nor have an entry that waits.
    :param doubled: effects that happened more than once, and replays put into the origin more than once.
    """

    into: int
    out: int
    waiting: int
    queued: int
    recovered: int
    lost: tuple[str, ...]
    doubled: tuple[str, ...]

    def __str__(self) -> str:
        said = (
            f"entries in {self.into:,}, out {self.out:,}, waiting {self.waiting:,}, not taken yet {self.queued:,}; "
            f"workflows recovered {self.recovered:,}; lost {len(self.lost)}, doubled {len(self.doubled)}"
        )
        return said + "".join(f"\n  {one}" for one in (*self.lost[:_SHOWN], *self.doubled[:_SHOWN]))


def read(
    config: QueueConfig,
    bootstrap: str,
    orchestrator: ReferenceOrchestrator,
    sent: Collection[str],
    queued: int,
) -> Account:
    """Hold what each witness saw against the others.

    :param bootstrap: of the broker.
    :param orchestrator: whose topics and log of effects are read.
    :param sent: correlation ids of all workflows that were sent, and have ended.
    :param queued: how many dead letters the queue holds beyond the ledger's position.
    :raises ServiceError: a topic can't be read.
    """
    letters, _ = _count(bootstrap, orchestrator.dlq)
    _, keys = _count(bootstrap, orchestrator.origin)
    taken, out, waiting = _ledger(config)
    succeeded, effects, replayed = _orchestrator(orchestrator.state)
    lost = (
        [f"workflow {each}" for each in sorted(set(sent) - succeeded - waiting.keys())] if not queued else []
    )
    lost += [f"{letters - taken - queued} dead letters"] if letters > taken + queued else []
    doubled = [f"effect {key}, {n} times" for key, n in effects.items()]
    doubled += [f"replay {key}, {n} times on the origin" for key, n in keys.items() if n > 1]
    return Account(
        letters, out, sum(waiting.values()), queued, len(replayed & succeeded), tuple(lost), tuple(doubled)
    )


def _ledger(config: QueueConfig) -> tuple[int, int, Counter[str]]:
    """Entries taken, and settled; those that wait by correlation id."""
    with closing(Ledger.open(config.ledger)) as ledger, ledger.read() as tx:
        ours = entry.c.queue == config.name
        taken = tx.execute(select(func.count()).where(ours)).scalar_one()
        rows = tx.execute(
            select(entry.c.correlation_id).where(ours, entry.c.settled_drain.is_(None))
        ).scalars()
        waiting = Counter(str(each) for each in rows)
    return taken, taken - sum(waiting.values()), waiting


def _orchestrator(state: Path) -> tuple[set[str], dict[str, int], set[str]]:
    """Workflows that succeeded, effects that happened more than once, and workflows that were replayed."""
    with closing(sqlite3.connect(f"file:{state / 'orchestrator.sqlite'}?mode=ro", uri=True)) as db:
        succeeded = db.execute("SELECT correlation_id FROM workflow WHERE state = 'succeeded'")
        done = {each for (each,) in succeeded}
        often = "SELECT effect_key, count(*) FROM effect GROUP BY effect_key HAVING count(*) > 1"
        replayed = db.execute("SELECT correlation_id FROM workflow WHERE retry_count > 0")
        return done, dict(db.execute(often)), {each for (each,) in replayed}


def _count(bootstrap: str, topic: str) -> tuple[int, Counter[str]]:
    """Records of a topic, as a read_committed consumer counts them, and how often each replay's key is there."""
    client = Consumer(
        {
            "bootstrap.servers": bootstrap,
            "group.id": f"account-{uuid.uuid4().hex}",
            "isolation.level": "read_committed",
            "auto.offset.reset": "earliest",
            "enable.auto.commit": False,
            "enable.partition.eof": True,
            "log_level": 0,
        }
    )
    records, keys = 0, Counter[str]()
    try:
        left = set(client.list_topics(topic, timeout=10).topics[topic].partitions)
        client.assign([TopicPartition(topic, part, 0) for part in left])
        until = time.monotonic() + _PATIENCE_S
        while left:
            found = client.consume(2_000, timeout=0.1)  # it waits its whole time-out unless it is full
            if time.monotonic() > until:
                raise ServiceError(
                    f"topic {topic} at {bootstrap} can't be read to its end: is the broker up?"
                )
            for message in found:
                if (error := message.error()) is None:
                    records += 1
                    ours = dict(message.headers() or ()).get("dlq-key")
                    keys.update([ours.decode()] if isinstance(ours, bytes) else [])
                elif error.code() == KafkaError._PARTITION_EOF:
                    left.discard(message.partition())
                else:
                    raise ServiceError(f"topic {topic} at {bootstrap} can't be read: {error.str()}")
        return records, keys
    finally:
        client.close()
