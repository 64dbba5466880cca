"""The stream before the incident: workflows through the orchestrator, some of which end in the dead-letter queue."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from confluent_kafka import Consumer, Producer, TopicPartition

from dlq_demo.process import ServiceError
from dlq_demo.surroundings import KafkaSurroundings, SqsSurroundings, Surroundings
from dlq_orchestrator.traffic import RUN_THROUGH, send, send_to_queue, workflows

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
    """Send workflows until ``until`` of them are dead-lettered, at least, and all have run.

    The same seed sends the same workflows.

    :raises ServiceError: when the orchestrator stands still.
    """
    if isinstance(around, SqsSurroundings):
        return _through_queue(around, until, seed, progress)
    assert isinstance(around, KafkaSurroundings)
    return _through_topic(around, until, seed, progress)


def _through_topic(
    around: KafkaSurroundings, until: int, seed: int, progress: Callable[[Streamed], None]
) -> Streamed:
    bootstrap = around.broker.bootstrap
    quiet = {"bootstrap.servers": bootstrap, "log_level": 0}  # errors are raised; the terminal is not its log
    producer = Producer({**quiet, "enable.idempotence": True, "linger.ms": 5})
    watch = Consumer({**quiet, "group.id": around.group, "enable.auto.commit": False})
    try:
        sent = 0
        while (dead := sum(_ends(watch, around.dlq).values())) < until:
            send(producer, around.origin, workflows(_CHUNK, seed + sent))
            sent += _CHUNK
            wait_until_none(lambda: behind(watch, around.origin), around.origin)
            progress(Streamed(sent, dead))
        return Streamed(sent, dead)
    finally:
        watch.close()


def _through_queue(
    around: SqsSurroundings, until: int, seed: int, progress: Callable[[Streamed], None]
) -> Streamed:
    # a failure takes several visibility time-outs to become a dead letter: what was sent tells how many there will be
    sqs = around.server.client()
    origin, dlq = (sqs.get_queue_url(QueueName=name)["QueueUrl"] for name in (around.origin, around.dlq))
    sent = failing = 0
    while failing < until:
        kinds = send_to_queue(sqs, origin, workflows(_CHUNK, seed + sent))
        sent += _CHUNK
        failing += sum(count for kind, count in kinds.items() if kind not in RUN_THROUGH)
        progress(Streamed(sent, _messages(sqs, dlq)))
    wait_until_none(lambda: _messages(sqs, origin), around.origin)
    return Streamed(sent, _messages(sqs, dlq))


def wait_until_none(left: Callable[[], int], where: str) -> None:
    """Wait until nothing is left to run, as long as it goes on."""
    before, until = -1, time.monotonic() + _PATIENCE_S
    while (now := left()) > 0:
        if now != before:
            before, until = now, time.monotonic() + _PATIENCE_S
        if time.monotonic() > until:
            raise ServiceError(
                f"the reference orchestrator has left {now} records of {where} unread for {_PATIENCE_S:.0f} s"
            )
        time.sleep(0.05)


def _messages(sqs: Any, queue: str) -> int:
    """How many a queue holds, those in flight and delayed too."""
    counts = sqs.get_queue_attributes(QueueUrl=queue, AttributeNames=["All"])["Attributes"]
    return sum(int(count) for name, count in counts.items() if name.startswith("ApproximateNumberOf"))


def behind(watch: Consumer, topic: str) -> int:
    """How many of a topic's records the orchestrator's group has not committed."""
    end = _ends(watch, topic)
    found = watch.committed([TopicPartition(topic, part) for part in end], timeout=10)
    return sum(end[at.partition] - max(0, at.offset) for at in found)


def _ends(watch: Consumer, topic: str) -> dict[int, int]:
    parts = watch.list_topics(topic, timeout=10).topics[topic].partitions
    return {part: watch.get_watermark_offsets(TopicPartition(topic, part), timeout=10)[1] for part in parts}
