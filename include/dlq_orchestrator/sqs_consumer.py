"""The consumer of a queue: messages in, workflows run, outcomes recorded, what is done deleted."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import Self

import structlog
from botocore.exceptions import BotoCoreError, ClientError

from dlq_orchestrator.core.calls import PluginCalls
from dlq_orchestrator.core.workflow_safety import WorkflowSafety
from dlq_orchestrator.runner import Runner
from dlq_orchestrator.sqs_queue import AT_ONCE, SqsQueue, SqsRecord
from dlq_orchestrator.store import Store
from dlq_orchestrator.workflow import Run

_log = structlog.get_logger()

_RECEIVERS = 4
_BATCH = 250
_POLL_S = 0.1
_PAUSE_S = 1.0


class SqsConsumer:
    """Runs batch after batch until told to stop.

    Threads receive; one runs what they bring: two batches at once could run one dedupe key twice. For each
    batch, in this order: run the workflows; record effects, steps and outcomes in one transaction; delete the
    messages of those that succeeded. A crash before the transaction runs the batch again, a crash after it
    finds the workflows done.

    What fails is left in the queue, which hands it out again when its visibility time-out is over, and moves
    it to the dead-letter queue instead of handing it out more often than its redrive policy says. It carries
    no error there: the workflow's state has it. Nothing can be held back, so there is no routing.
    """

    def __init__(
        self, source: SqsQueue, runner: Runner, safety: WorkflowSafety, calls: PluginCalls, store: Store
    ) -> None:
        self._queue = source
        self._runner = runner
        self._safety = safety
        self._calls = calls
        self._store = store
        self._loop = asyncio.Runner()
        # bounded: what waits here is already on its visibility time-out
        self._inbox: queue.Queue[list[SqsRecord]] = queue.Queue(_BATCH // AT_ONCE)
        self._receivers = ThreadPoolExecutor(_RECEIVERS, thread_name_prefix="receiver")
        self._deleters = ThreadPoolExecutor(_RECEIVERS, thread_name_prefix="deleter")
        self._deletions: list[Future[None]] = []
        self._all_seen_ms = 0
        self.last_turn = time.monotonic()

    @property
    def dead_lettered_until(self) -> float:
        """A message is moved when it would be handed out once more, after its visibility time-out.

        So it has been, as far as can be known from here, once a later poll gave less than it could have.
        """
        return self._all_seen_ms - self._queue.visibility_ms

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._receivers.shutdown()
        self._deleters.shutdown()
        self._loop.close()

    def run(self, stop: threading.Event, ready: Callable[[], None]) -> None:
        """Consume until `stop` is set; `ready` is called once, when the first polls have begun.

        :raises ConsumerFailed: the queue is gone, or refuses.
        """
        ending = threading.Event()
        receivers = [self._receivers.submit(self._receive, ending) for _ in range(_RECEIVERS)]
        try:
            ready()
            while not stop.is_set():
                self.last_turn = time.monotonic()
                if records := self._next_batch():
                    self._process(records)
                for receiver in receivers:
                    if receiver.done():
                        receiver.result()  # it ends by an error only
        finally:
            ending.set()
            while not all(receiver.done() for receiver in receivers) or not self._inbox.empty():
                with suppress(queue.Empty):
                    self._queue.give_back(self._inbox.get(timeout=_POLL_S))

    def _receive(self, ending: threading.Event) -> None:
        while not ending.is_set():
            began = self._store.now_ms()
            try:
                records = self._queue.receive()
            except (BotoCoreError, ClientError) as error:
                _log.warning("nothing received", queue=self._queue.name, why=str(error))
                ending.wait(_PAUSE_S)
                continue
            if len(records) < AT_ONCE:
                self._all_seen_ms = max(self._all_seen_ms, began)
            if records:
                self._inbox.put(records)

    def _next_batch(self) -> list[SqsRecord]:
        """What has been received by now; waits a moment for the first."""
        batch: list[SqsRecord] = []
        with suppress(queue.Empty):
            while len(batch) < _BATCH:
                batch += self._inbox.get(not batch, _POLL_S)
        return batch

    def _process(self, records: list[SqsRecord]) -> None:
        self._safety.claim(records)
        runs = [
            self._outcome(record, run)
            for record, run in zip(records, self._loop.run(self._runner.run(records)), strict=True)
        ]
        with self._store.transaction() as db:
            self._safety.record(db, runs)
            self._calls.save_counts(db)
        self._delete([r for r, run in zip(records, runs, strict=True) if run.state == "succeeded"])
        _tell(runs)

    def _delete(self, done: list[SqsRecord]) -> None:
        """Delete messages while the next batch runs; of one batch at a time."""
        for deletion in self._deletions:
            deletion.result()
        self._deletions = [
            self._deleters.submit(self._queue.delete, done[first : first + AT_ONCE])
            for first in range(0, len(done), AT_ONCE)
        ]

    def _outcome(self, record: SqsRecord, run: Run) -> Run:
        """A failure is one for good where the queue won't hand the message out again."""
        again = run.failure is not None and record.receives < self._queue.max_receives
        return replace(run, state="pending") if again else run


def _tell(runs: list[Run]) -> None:
    counts = {"failed": 0, "pending": 0, "duplicates": 0}
    for run in runs:
        counts["duplicates"] += run.duplicate_of is not None
        if run.state != "succeeded":
            counts[run.state] += 1
    _log.info("batch done", workflows=len(runs), **counts)
