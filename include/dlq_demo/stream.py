"""The stream before the incident: workflows through the orchestrator, some of which end in the dead-letter queue."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from confluent_kafka import Consumer, Producer, TopicPartition

from dlq_demo.process import ServiceError
from dlq_demo.surroundings import Surroundings
from dlq_orchestrator.traffic import send, workflows

_CHUNK = 500
_PATIENCE_S = 60.0


@dataclass(frozen=True)
class Streamed:
    """Workflows sent, and how many of them were dead-lettered."""

    workflows: int
    dead: int


def stream(
    around: Surroundings, *, until: int, seed: int, progress: Callable[[Streamed], None] = lambda _: None
) -> Streamed:
    """Send workflows, no faster than they are run, until ``until`` of them are dead-lettered and all have run.

    The same seed sends the same workflows.

    :raises ServiceError: when the orchestrator stands still.
    """
    bootstrap = around.broker.bootstrap
    quiet = {"bootstrap.servers": bootstrap, "log_level": 0}  # errors are raised; the terminal is not its log
    producer = Producer({**quiet, "enable.idempotence": True, "linger.ms": 5})
    watch = Consumer({**quiet, "group.id": around.group, "enable.auto.commit": False})
    try:
        sent = 0
        while (dead := sum(_ends(watch, around.dlq).values())) < until:
            send(producer, around.origin, workflows(_CHUNK, seed + sent))
            sent += _CHUNK
            _wait_until_run(watch, around.origin)
            progress(Streamed(sent, dead))
        return Streamed(sent, dead)
    finally:
        watch.close()


def _wait_until_run(watch: Consumer, topic: str) -> None:
    """Wait until the orchestrator's group has committed all there is, as long as it goes on."""
    ends = _ends(watch, topic)
    wanted = [TopicPartition(topic, part) for part in ends]
    left, until = -1, time.monotonic() + _PATIENCE_S
    while True:
        found = watch.committed(wanted, timeout=10)
        behind = sum(ends[at.partition] - max(0, at.offset) for at in found)
        if behind <= 0:
            return
        if behind != left:
            left, until = behind, time.monotonic() + _PATIENCE_S
        if time.monotonic() > until:
            raise ServiceError(
                f"the reference orchestrator has left {behind} records of {topic} unread for {_PATIENCE_S:.0f} s"
            )
        time.sleep(0.05)


def _ends(watch: Consumer, topic: str) -> dict[int, int]:
    parts = watch.list_topics(topic, timeout=10).topics[topic].partitions
    return {part: watch.get_watermark_offsets(TopicPartition(topic, part), timeout=10)[1] for part in parts}
