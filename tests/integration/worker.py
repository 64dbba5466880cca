"""A process that works on a queue step by step, to be killed, stopped and restarted by tests.

It is forked from a server that has imported all this before (a restart costs milliseconds, not seconds of
imports), reads
``spec.json`` in the folder it is given, and writes ``out`` and ``err`` there. The spec holds the queue's
configuration, the
fields of its Connections by id, the steps, and

* ``lease_s``, ``grace_s``: of the queue's lease; ``batch``: entries an intake batch; ``records``: a transaction's, or
  marked at once
* ``die``, ``stop``: ``point:n``, SIGKILL this process when it comes to that crash point for the n-th time; or
SIGSTOP it there

Steps: ``open:<run>`` ``attach:<run>`` ``take`` ``categorize`` ``canary`` ``batches`` ``job:<id>``
``remaining`` ``release``.
A line of JSON is written for each step that ended; an error of the core is the line ``{"step": "error", …}``
and status 3.
"""

from __future__ import annotations

import ctypes
import faulthandler
import functools
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dlq import intake, jobs, replay, sending, triage
from dlq.archive import Archive
from dlq.config import QueueConfig
from dlq.drain import Drain, drain_id
from dlq.errors import DlqError, Fenced
from dlq.ledger import Ledger, custody, lease
from dlq.ledger import jobs as ledger_jobs
from dlq.opening import open_drain
from dlq.ports import Connection
from dlq.sources.kafka import KafkaPass
from dlq.sources.sqs import SqsPass
from dlq.targets.kafka import KafkaWriter
from dlq.targets.sqs import SqsSender

_PR_SET_PDEATHSIG = 1  # linux/prctl.h

POINTS: Mapping[str, tuple[Any, str, str]] = {
    # intake, in the order it comes to them
    "begun": (custody, "begin", "after"),  # in the transaction that writes where a first intake begins
    "ranged": (KafkaPass, "echo", "before"),  # ranges are open, nothing is read
    "read": (KafkaPass, "read", "after"),
    "segment": (Archive, "write", "after"),
    "rows": (custody, "move", "after"),  # in the transaction: it must not hold
    "untold": (KafkaPass, "acknowledge", "before"),  # rows are committed, the queue isn't told
    "told": (KafkaPass, "acknowledge", "after"),
    # plans and jobs
    "proposed": (ledger_jobs, "propose", "after"),
    "approved": (ledger_jobs, "approve", "after"),
    "claimed": (ledger_jobs, "claim_writer", "after"),
    "fenced": (KafkaWriter, "__enter__", "after"),  # init is done, the cursor isn't read
    "cursor": (KafkaWriter, "cursor", "after"),
    "running": (ledger_jobs, "start", "after"),
    "produced": (KafkaWriter, "produce", "after"),  # a transaction is open
    "uncommitted": (KafkaWriter, "commit", "before"),
    "committed": (KafkaWriter, "commit", "after"),  # sent, and the ledger doesn't know
    "settled": (ledger_jobs, "settle", "after"),  # in the transaction: it must not hold
    "confirmed": (ledger_jobs, "confirm_below", "after"),
    "unclosed": (ledger_jobs, "close", "before"),
    "closed": (ledger_jobs, "close", "after"),
    # the same on SQS
    "received": (SqsPass, "read", "after"),
    "undeleted": (SqsPass, "acknowledge", "before"),  # rows are committed, nothing is deleted
    "deleted": (SqsPass, "acknowledge", "after"),
    "marked": (ledger_jobs, "mark_sending", "after"),  # in the transaction: it must not hold
    "sending": (SqsSender, "send", "before"),  # marked, nothing is sent
    "calling": (SqsSender, "_call", "before"),  # of several calls side by side some may be under way
    "called": (SqsSender, "_call", "after"),
    "sent": (SqsSender, "send", "after"),  # sent, and the ledger doesn't know
    "answered": (ledger_jobs, "settle_sent", "after"),  # in the transaction: it must not hold
    "digested": (ledger_jobs, "confirm_sent_before", "after"),
}
"""Crash points: what is called, and whether the process ends before or after it. (Only what core modules look up by
attribute at each call can be wrapped so.)"""


def _strike(where: str | None, number: signal.Signals) -> None:
    if where is None:
        return
    point, _, count = where.partition(":")
    owner, name, when = POINTS[point]
    original: Callable[..., Any] = getattr(owner, name)
    left = int(count or 1)
    write, writing = Ledger.write, threading.RLock()

    @contextmanager
    def alone(*arguments: Any, **named: Any) -> Iterator[Any]:
        with writing, write(*arguments, **named) as tx:
            yield tx

    if (
        number == signal.SIGSTOP
    ):  # one that sleeps with SQLite's lock would stop its successor too: see strike
        Ledger.write = alone

    def strike() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            with writing:
                signal.pthread_kill(
                    threading.get_ident(), number
                )  # this thread: sent to the process, it would go on a while

    @functools.wraps(original)
    def wrapped(*arguments: Any, **named: Any) -> Any:
        if when == "before":
            strike()
        done = original(*arguments, **named)
        if when == "after":
            strike()
        return done

    setattr(owner, name, wrapped)


def _say(step: str, **what: Any) -> None:
    sys.stdout.write(json.dumps({"step": step, **what}, default=str) + "\n")
    sys.stdout.flush()


class _Work:
    def __init__(self, spec: Mapping[str, Any]) -> None:
        self.spec = spec
        self.config = QueueConfig.model_validate(spec["config"])
        self.drain: Drain | None = None
        self.jobs: list[str] = []

    def _connection(self, name: str) -> Connection:
        return Connection(name, **self.spec["connections"][name])

    def do(self, step: str) -> dict[str, Any]:
        verb, _, what = step.partition(":")
        if verb == "open":
            self.drain = open_drain(
                self.config, run_id=what, connections=self._connection, lease_s=self.spec["lease_s"]
            )
            return {"drain": self.drain.id, "epoch": self.drain.epoch}
        if verb == "attach":
            self.drain = Drain.attach(
                drain_id(self.config.name, what), config=self.config, connections=self._connection
            )
            return {"drain": self.drain.id, "epoch": self.drain.epoch}
        drain = self.drain
        assert drain is not None
        if verb == "take":
            return intake.take_custody(drain, 120)
        if verb == "categorize":
            return {"by_category": triage.categorize(drain)["by_category"]}
        if verb == "canary":
            done = replay.replay_canary(drain, "retry_transient", 120)
            self.jobs = done["jobs"]
            return done
        if verb == "batches":
            return {"ran": [replay.replay_batches(drain, job, 120) for job in self.jobs]}
        if verb == "job":
            return replay.replay_batches(drain, what, 120)
        if verb == "remaining":
            return replay.drain_remaining(drain, 120)
        if verb == "release":
            lease.release(drain.ledger, drain.queue, drain.id, drain.epoch, "green")
            return {}
        raise ValueError(f"no step {step!r}")


def run(folder: str) -> None:
    """Be the worker; ends this process."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(
            _PR_SET_PDEATHSIG, signal.SIGKILL
        )  # also when it is stopped while its test is killed
    for name, descriptor in (("out", 1), ("err", 2)):
        with (Path(folder) / name).open("ab") as file:
            os.dup2(file.fileno(), descriptor)
    faulthandler.register(signal.SIGUSR1)  # a test that waited in vain asks where it is
    sys.exit(_main(json.loads((Path(folder) / "spec.json").read_text())))


def _main(spec: Mapping[str, Any]) -> int:
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(message)s")
    lease.GRACE_S = spec["grace_s"]
    intake.MAX_ENTRIES = spec["batch"]
    defaults = jobs.JobRun.__init__.__kwdefaults__
    assert defaults is not None
    defaults["records"] = sending.WINDOW = spec["records"]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as the command has it
    _strike(spec["die"], signal.SIGKILL)
    for point in spec["stop"]:
        _strike(point, signal.SIGSTOP)
    work = _Work(spec)
    for step in spec["steps"]:
        try:
            _say(step, **work.do(step))
        except DlqError as error:
            logging.exception("step %s", step)
            _say(
                "error", at=step, type=type(error).__name__, fenced=isinstance(error, Fenced), text=str(error)
            )
            return 3
    return 0
