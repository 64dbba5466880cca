"""The consumer: origin topic in, workflows run, failures routed, outcomes recorded, offsets committed."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Self, cast

import structlog
from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from dlq_orchestrator.core.calls import PluginCalls
from dlq_orchestrator.core.workflow_safety import WorkflowSafety
from dlq_orchestrator.dead_letter import DeadLetter, DeadLetterWriter, KafkaRecord, dead_letter
from dlq_orchestrator.origin import ConsumerFailed
from dlq_orchestrator.routing import Routing
from dlq_orchestrator.runner import Runner
from dlq_orchestrator.store import Store
from dlq_orchestrator.workflow import Headers, Run

_log = structlog.get_logger()

_BATCH = 1000
_POLL_S = 0.1

# a consumer has no other fatal error
_FENCING = (KafkaError._FATAL, KafkaError.FENCED_INSTANCE_ID)
_FENCED_MAX = 3
_FENCED_WITHIN_S = 60.0


class _Fenced(Exception):
    """The group knows another member under this one's name."""


class KafkaConsumer:
    """Runs batch after batch until told to stop.

    For each batch, in this order: run the workflows; dead-letter the failures and wait until the broker has
    them (or hold them, under a routing lease); record effects, steps, outcomes and what is held in one
    transaction; commit the offsets. A crash before the transaction runs the batch again, a crash after it
    finds the workflows done; a failure whose dead letter was written just before a crash is dead-lettered
    again, never lost.

    :param connect: makes a consumer with manual commits and a static membership.
    :param group: its group, for the dead letters.
    """

    def __init__(
        self,
        connect: Callable[[], Consumer],
        topic: str,
        group: str,
        runner: Runner,
        safety: WorkflowSafety,
        calls: PluginCalls,
        routing: Routing,
        writer: DeadLetterWriter,
        store: Store,
    ) -> None:
        self._connect = connect
        self._topic = topic
        self._group = group
        self._runner = runner
        self._safety = safety
        self._calls = calls
        self._routing = routing
        self._writer = writer
        self._store = store
        self._loop = asyncio.Runner()
        self._to_commit: dict[tuple[str, int], int] = {}
        self.last_turn = time.monotonic()

    @property
    def dead_lettered_until(self) -> float:
        """No failure is recorded before its dead letter is acknowledged."""
        return math.inf

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.close()

    def run(self, stop: threading.Event, ready: Callable[[], None]) -> None:
        """Consume until `stop` is set; `ready` is called once, when the group has taken this consumer in.

        A broker that restarts while a static member joins can take that member for its own rival and fence
        it. No other process has this one's state folder, so it joins again.

        :raises ConsumerFailed: the topic is gone, or there is a rival indeed: fenced again and again.
        """
        joined = threading.Event()
        fenced: deque[float] = deque(maxlen=_FENCED_MAX)
        while not stop.is_set():
            consumer = self._connect()
            try:
                self._consume(consumer, stop, joined, ready)
            except _Fenced:
                if len(fenced) == _FENCED_MAX and time.monotonic() - fenced[0] < _FENCED_WITHIN_S:
                    raise ConsumerFailed(
                        f"group {self._group} has another member of this one's name: "
                        "is there a copy of the state folder?"
                    ) from None
                fenced.append(time.monotonic())
                _log.warning("fenced, joins again", group=self._group)
            finally:
                self._to_commit.clear()
                consumer.close()

    def _consume(
        self, consumer: Consumer, stop: threading.Event, joined: threading.Event, ready: Callable[[], None]
    ) -> None:
        def assigned(_: Consumer, __: list[TopicPartition]) -> None:
            if not joined.is_set():
                joined.set()
                ready()

        consumer.subscribe(
            [self._topic],
            on_assign=assigned,
            # whoever gets the partitions runs what was not committed again, and finds the workflows done
            on_revoke=lambda *_: self._to_commit.clear(),
        )
        while not stop.is_set():
            self.last_turn = time.monotonic()
            self._routing.release(self._writer)
            messages = consumer.consume(_BATCH, _POLL_S)
            records = [record_of(message) for message in messages if self._is_record(message)]
            if records:
                self._process(records)
            self._commit(consumer)

    def _process(self, records: list[KafkaRecord]) -> None:
        self._safety.claim(records)
        runs = self._loop.run(self._runner.run(records))
        with self._routing.gate:
            paused = self._routing.paused()
            held: list[DeadLetter] = []
            letters: list[DeadLetter] = []
            for record, run in zip(records, runs, strict=True):
                if run.failure is not None:
                    waits = paused and not record.replay_key
                    (held if waits else letters).append(dead_letter(record, run, run.failure, self._group))
            too_large = [letters[place] for place in self._writer.write(letters)]
            with self._store.transaction() as db:
                self._safety.record(db, runs)
                self._routing.hold(db, held)
                self._routing.hold(db, too_large, undeliverable=True)
                self._calls.save_counts(db)
        for letter in too_large:
            _log.error("dead letter too large for the DLQ, kept in the state folder", record=letter.name)
        for record in records:
            self._to_commit[record.topic, record.partition] = record.offset + 1
        _tell(runs, len(held))

    def _commit(self, consumer: Consumer) -> None:
        """Commit what is recorded; where that fails for now, the next turn tries again."""
        if not self._to_commit:
            return
        offsets = [TopicPartition(topic, part, end) for (topic, part), end in self._to_commit.items()]
        try:
            consumer.commit(offsets=offsets, asynchronous=False)
            self._to_commit.clear()
        except KafkaException as error:
            if error.args[0].fatal() or error.args[0].code() in _FENCING:
                raise _Fenced from None
            _log.warning("offsets not committed", why=error.args[0].str())

    def _is_record(self, message: Message) -> bool:
        error = message.error()
        if error is None:
            return True
        gone = error.code() in (KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError.TOPIC_AUTHORIZATION_FAILED)
        if gone:
            raise ConsumerFailed(f"{self._topic}: {error.str()}")
        if error.fatal() or error.code() in _FENCING:
            raise _Fenced
        _log.warning("consumer error", why=error.str())
        return False


def record_of(message: Message) -> KafkaRecord:
    """The record in a message, whatever its headers are made of."""
    broken = False
    headers: Headers = []
    try:
        headers = cast(Headers, list(message.headers() or []))
    except (UnicodeDecodeError, ValueError):
        broken = True
    # only an error has no place
    topic, partition, offset = message.topic(), message.partition(), message.offset()
    return KafkaRecord(
        f"{topic}/{partition}/{offset}",
        message.value(),
        headers,
        broken,
        topic=cast(str, topic),
        partition=cast(int, partition),
        offset=cast(int, offset),
        timestamp=message.timestamp()[1],
        key=message.key(),
    )


def _tell(runs: list[Run], held: int) -> None:
    counts = {"failed": 0, "duplicates": 0}
    for run in runs:
        counts["failed"] += run.failure is not None
        counts["duplicates"] += run.duplicate_of is not None
    _log.info("batch done", workflows=len(runs), held=held, **counts)
