"""Holding a queue from the command line: a lease that lasts as long as the process does, and little longer."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from threading import Event, Thread

from dlq.config import QueueConfig
from dlq.drain import Drain
from dlq.errors import DlqError
from dlq.ledger import lease
from dlq.opening import open_drain
from dlq.ports import Connections

LEASE_S = 120.0
"""How long the queue stays taken after this process was killed (and ``lease.GRACE_S`` more)."""
_BEAT_S = 20.0


def new_run(purpose: str) -> str:
    """A run id nobody else has; it says when and what for."""
    return f"cli__{purpose}__{datetime.now(UTC):%Y-%m-%dT%H:%M:%S}__{secrets.token_hex(4)}"


class Hold:
    """A drain held by this process. ``verdict`` is written down at its end; None where that was done already."""

    def __init__(self, drain: Drain) -> None:
        self.drain = drain
        self.verdict: str | None = "failed"


@contextmanager
def hold(config: QueueConfig, purpose: str, *, connections: Connections, kind: str = "cli") -> Iterator[Hold]:
    """Open a drain and keep its lease alive.

    :raises dlq.errors.QueueBusy: while another holds the queue.
    :raises dlq.errors.Refused: when the world is not as the ledger remembers it.
    """
    drain = open_drain(config, run_id=new_run(purpose), kind=kind, connections=connections, lease_s=LEASE_S)
    held, over = Hold(drain), Event()
    beating = Thread(target=_beat, args=(drain, over), name="dlq-lease", daemon=True)
    beating.start()
    try:
        yield held
        if held.verdict == "failed":
            held.verdict = "done"
    finally:
        over.set()
        beating.join()
        if held.verdict is not None:
            lease.release(drain.ledger, drain.queue, drain.id, drain.epoch, held.verdict)
        drain.close()


def _beat(drain: Drain, over: Event) -> None:
    while not over.wait(_BEAT_S):
        try:
            drain.extend(LEASE_S)
        except DlqError:
            return  # fenced, or no ledger: the drain's own next write says so
