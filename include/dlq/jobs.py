"""Run a job: its entries to the target, in transactions whose cursor the target keeps."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from types import TracebackType
from typing import NoReturn, Self

from sqlalchemy import select

from dlq import clock
from dlq.drain import Drain
from dlq.errors import Fenced, NotFound, Refused, TargetError
from dlq.ledger import jobs as ledger
from dlq.ledger.jobs import Item
from dlq.ledger.schema import queue as queues
from dlq.outbox import Chunk, Outbox
from dlq.pace import Rate
from dlq.ports import Delivered, Output, Unproducible, Writer

MAX_RECORDS = 1_000
"""A transaction's records (RULES, Kafka 10); its bytes are bound by the outbox."""

_TRIES = 3


def paused(drain: Drain) -> bool:
    """Whether a person holds the queue's replays; asked between transactions."""
    with drain.ledger.read() as tx:
        found = tx.execute(select(queues.c.paused_by).where(queues.c.name == drain.queue)).scalar()
    return found is not None


class CursorLost(TargetError):
    """The target has no memory of a job that ran: what was planned is in doubt until a person, or evidence, says."""


class JobRun:
    """This process as the writer of one job. Enter it, ``send`` up to an ordinal, again and again; it goes on
    after a crash.

    :param records: the most records a transaction carries.
    """

    def __init__(self, drain: Drain, job_id: str, *, records: int = MAX_RECORDS) -> None:
        self._drain = drain
        self._records = records
        self._token = uuid.uuid4().hex
        self._rate = Rate(
            drain.config.limits.rate / max(1, drain.config.limits.jobs) if drain.config.limits.rate else None
        )
        self._per_key = drain.config.target.ordering == "per_key"
        self._open = ExitStack()
        with drain.ledger.read() as tx:
            self.job = ledger.get(tx, job_id)
        self._target = drain.target_of(self.job.kind)
        self._outbox = Outbox(drain, self.job)
        self.cursor = self.job.cursor
        self.skipped = 0

    def __enter__(self) -> Self:
        self._writers = self._open.enter_context(ExitStack())
        self._pool = self._open.enter_context(ThreadPoolExecutor(2, thread_name_prefix="dlq-job"))
        try:
            self._reopen(fresh=True)
        except BaseException:
            self._open.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.__exit__(kind, error, trace)

    def _reopen(self, *, fresh: bool = False) -> None:
        """Init (fences an older writer), read the cursor, settle what it has passed, go on from there."""
        drain, job = self._drain, self.job
        ledger.claim_writer(drain.ledger, drain.queue, drain.epoch, job.id, self._token, fresh=fresh)
        drain.archive.claim_plan(drain.epoch, job.plan, job.plan_hash)
        self._writers.close()
        about = json.dumps({"ledger": drain.ledger.id, "plan": job.plan_hash[:16], "size": job.size})
        self._writer: Writer = self._writers.enter_context(self._opened(about))
        # Once more, now that an older writer can't commit: a try that slept between the claim and the init above
        # would be the writer the target believes in, while its successor sends the same entries in another job.
        ledger.claim_writer(drain.ledger, drain.queue, drain.epoch, job.id, self._token, fresh=False)
        with drain.ledger.read() as tx:
            job = self.job = ledger.get(tx, job.id)
        if job.state == "closed":
            raise Fenced(f"job {job.id} was closed by another; this one stops")
        found = self._cursor()
        if job.state == "running" and (found is None or found < job.cursor):
            self._doubt(
                "the target keeps no cursor of it" if found is None else f"its cursor went back to {found}"
            )
        if job.target_from is None:
            ledger.mark_from(drain.ledger, drain.queue, drain.epoch, job.id, self._target.ends(job.target))
        if found is None:
            self._writer.send([], 0)
        if job.state != "running":
            ledger.start(drain.ledger, drain.queue, drain.epoch, job.id)
        if found is not None and found > job.cursor:
            self._settle(found, [])
        with drain.ledger.read() as tx:
            self.job = ledger.get(tx, job.id)
            unknown = ledger.undelivered(tx, job.id)
        self.cursor = self.job.cursor
        if unknown:
            self._find_deliveries()

    def _opened(self, about: str) -> Writer:
        job = self.job
        try:
            return self._target.writer(job.id, job.target, about)
        except NotFound:
            if job.state == "running":
                self._doubt("its target is gone, and its cursor with it")
            self.close("target gone", job.rest("target_gone"))
            raise

    def _cursor(self) -> int | None:
        try:
            return self._writer.cursor()
        except Refused:
            # A job of this name ran before, out of a ledger that is lost or another one: what its cursor says is not of
            # these entries.
            if self.job.state == "running":
                self._doubt("its cursor at the target is another job's")
            self.close("cursor of another job", self.job.rest("ready"))
            raise

    def _doubt(self, why: str) -> NoReturn:
        n = ledger.doubt(self._drain.ledger, self._drain.queue, self._drain.epoch, self.job.id)
        raise CursorLost(
            f"job {self.job.id}: {why}; {n} entries are in doubt and wait for a person (`dlq explain`, review)"
        )

    def _find_deliveries(self) -> None:
        """After a crash between the target's commit and ours: find where the last outputs went by our header."""
        start = {int(p): o for p, o in (self.job.target_from or {}).items()}
        for page in self._target.delivered(self.job.target, start):
            ours = [
                Delivered(ordinal, part, pos)
                for job, ordinal, part, pos in page
                if job == self.job.id and ordinal < self.cursor
            ]
            if ours:
                with self._drain.ledger.write(self._drain.queue, self._drain.epoch) as tx:
                    ledger.add_deliveries(tx, self.job.id, ours, clock.now())

    def _settle(self, cursor: int, delivered: Sequence[Delivered]) -> None:
        drain = self._drain
        with drain.ledger.write(drain.queue, drain.epoch) as tx:
            ledger.settle(tx, self.job, drain.id, cursor, delivered, clock.now())

    def send(self, until: int, deadline: float) -> int:
        """Send on until ordinal ``until`` or the (monotonic) deadline; returns the cursor.

        The next transaction's records are read while the target commits the one before.

        :raises Fenced: when another try or drain took over.
        :raises TargetError: when the target does not come back; the job goes on from its cursor at the next try.
        """
        until = min(until, self.job.size)
        tries = 0
        while self.cursor < until and time.monotonic() < deadline and not paused(self._drain):
            try:
                self._send_some(until, deadline)
                tries = 0
            except Fenced:
                raise
            except TargetError:
                tries += 1
                if tries >= _TRIES:
                    raise
                time.sleep(min(2.0**tries, 10.0))
                self._reopen()
        return self.cursor

    def _send_some(self, until: int, deadline: float) -> None:
        """Transactions up to ``until``. While the target takes one's records the next one's are made, of what was read
        while it committed the one before (nothing that could wait is done inside a transaction), and the ledger settles
        those before; a crash anywhere between is mended by the target's cursor."""
        books = _Books(self._pool, self._settle)
        self._outbox.forget()  # since the last step others may have changed the plan's lines
        chunk = self._next(self.cursor, until)
        try:
            while chunk.items:
                cursor = chunk.items[-1].ordinal + 1
                self._rate.wait(len(chunk.items))
                self._writer.produce(chunk.outputs)
                ahead = self._outbox.next(cursor, until, self._room)
                delivered = self._writer.flush()
                commit = self._pool.submit(self._writer.commit, cursor)
                try:
                    self._outbox.read_ahead(self._room)
                finally:
                    commit.result()
                self.cursor = cursor
                books.enter(cursor, delivered)
                if time.monotonic() >= deadline or paused(self._drain):
                    return
                chunk = self._next(cursor, until) if ahead.broken else ahead
        except Unproducible as fault:
            books.close()
            self._reopen()
            self._isolate(chunk.items, chunk.outputs, fault)
            return
        finally:
            books.close()
        if self.cursor < until:
            self._pass(until)

    def _pass(self, until: int) -> None:
        """Nothing is left to send before ``until`` (all of it was skipped): move the cursor past it."""
        self._writer.send([], until)
        self._settle(until, [])
        self.cursor = until

    def _isolate(self, chunk: Sequence[Item], outputs: Sequence[Output], fault: Unproducible) -> None:
        """Halve a refused batch until the culprit is alone, then leave it out, written down before the cursor
        may pass it.
        """
        culprit = (
            chunk if len(chunk) == 1 else [i for i in chunk if fault.certain and i.ordinal == fault.ordinal]
        )
        if culprit:
            self._skip(culprit[0], fault.reason)
            return
        half = len(chunk) // 2
        for some, out in ((chunk[:half], outputs[:half]), (chunk[half:], outputs[half:])):
            cursor = some[-1].ordinal + 1
            try:
                delivered = self._writer.send(out, cursor)
            except Unproducible as found:
                self._reopen()
                self._isolate(some, out, found)
                return
            self._settle(cursor, delivered)
            self.cursor = cursor

    @property
    def _room(self) -> int:
        """How many records a transaction may carry."""
        return self._rate.room(self._records)

    def _next(self, first: int, until: int) -> Chunk:
        """The next transaction's records, and what the one after needs is read; what is broken in the archive is left
        out, written down first."""
        while True:
            chunk = self._outbox.next(first, until, self._room)
            if not chunk.broken:
                self._outbox.read_ahead(self._room)
                return chunk
            for item in chunk.broken:
                self._skip(item, "archive_broken")

    def _skip(self, item: Item, reason: str) -> None:
        drain = self._drain
        with drain.ledger.write(drain.queue, drain.epoch) as tx:
            self.skipped += ledger.skip(tx, self.job, item, reason, per_key=self._per_key)
        self._outbox.forget()

    def close(self, ended: str, rest: str) -> int:
        """End the job; what was not sent is open again. Returns how many that were."""
        return ledger.close(
            self._drain.ledger,
            self._drain.queue,
            self._drain.epoch,
            self.job.id,
            ended,
            rest,
            writer=self._token,
        )


class _Books:
    """Settles what the target has committed, beside the sending. What commits while the ledger is busy is settled
    together: a small transaction costs the ledger as much as a large one."""

    def __init__(self, pool: ThreadPoolExecutor, settle: Callable[[int, Sequence[Delivered]], None]) -> None:
        self._pool = pool
        self._settle = settle
        self._settling: Future[None] | None = None
        self._due: list[Delivered] = []
        self._cursor = self._begun = 0  # what is committed, and up to where of it the ledger was told

    def enter(self, cursor: int, delivered: Sequence[Delivered]) -> None:
        """A transaction was committed. Waits where the ledger is :data:`MAX_RECORDS` behind."""
        self._cursor = cursor
        self._due.extend(delivered)
        if self._settling is None or self._settling.done() or len(self._due) >= MAX_RECORDS:
            self._wait()
            self._settling = self._pool.submit(self._settle, cursor, self._take())

    def close(self) -> None:
        """Settle all of it. Doing it twice is fine."""
        self._wait()
        if self._begun < self._cursor:
            self._settle(self._cursor, self._take())

    def _take(self) -> list[Delivered]:
        due, self._due, self._begun = self._due, [], self._cursor
        return due

    def _wait(self) -> None:
        if self._settling is not None:
            settling, self._settling = self._settling, None
            settling.result()
