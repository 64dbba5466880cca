"""Run a job to a target without transactions: each line is marked before its call and settled after it."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from types import TracebackType
from typing import Protocol, Self

from dlq import clock
from dlq.drain import Drain
from dlq.errors import Fenced
from dlq.jobs import JobRun, paused
from dlq.ledger import jobs as ledger
from dlq.ledger.jobs import Item, Job
from dlq.orchestrator import OrchestratorError
from dlq.outbox import Outbox
from dlq.pace import Rate
from dlq.ports import Delivered, Output, Refusal

WINDOW = 200
"""Lines marked at once: so many are in doubt after a kill."""

_CALL_WITHIN_S = 5.0
"""How long after its mark a call may still begin: what is not called by then was certainly not sent."""

_ANSWER_WITHIN_S = 60.0
_KNOWN = ("succeeded", "failed", "pending")


class Run(Protocol):
    """This process as the one writer of a job. Enter it, ``send`` up to an ordinal, again and again, close it."""

    job: Job
    cursor: int
    skipped: int

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def send(self, until: int, deadline: float) -> int: ...

    def close(self, ended: str, rest: str) -> int: ...


def running(drain: Drain, job_id: str) -> Run:
    """A job as its target has it run: with its cursor at the target, or marked line by line."""
    with drain.ledger.read() as tx:
        kind = ledger.get(tx, job_id).kind
    return JobRun(drain, job_id) if drain.target_of(kind).transactional else SendRun(drain, job_id)


class SendRun:
    """The writer of a job whose target knows no transactions (see :class:`Run`)."""

    def __init__(self, drain: Drain, job_id: str) -> None:
        self._drain = drain
        self._token = uuid.uuid4().hex
        limits = drain.config.limits
        self._rate = Rate(limits.rate / max(1, limits.jobs) if limits.rate else None)
        with drain.ledger.read() as tx:
            self.job = ledger.get(tx, job_id)
        self._outbox = Outbox(drain, self.job)
        self._stopped: set[str] = set()
        self.cursor = self.job.cursor
        self.skipped = 0

    def __enter__(self) -> Self:
        drain, job = self._drain, self.job
        ledger.claim_writer(drain.ledger, drain.queue, drain.epoch, job.id, self._token, fresh=True)
        drain.archive.claim_plan(drain.epoch, job.plan, job.plan_hash)
        with drain.ledger.read() as tx:
            job = self.job = ledger.get(tx, job.id)
        if job.state == "closed":
            raise Fenced(f"job {job.id} was closed by another; this one stops")
        if job.target_from is None:
            ledger.mark_from(drain.ledger, drain.queue, drain.epoch, job.id, {})
        if job.state != "running":
            ledger.start(drain.ledger, drain.queue, drain.epoch, job.id)
        self._sender = drain.target_of(job.kind).sender(job.target)
        with drain.ledger.read() as tx:
            left = ledger.being_sent(tx, job.id)
            self.job = ledger.get(tx, job.id)
        if left:
            self._settle_left(left)
        self.cursor = self.job.cursor
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing is held open."""

    def _settle_left(self, left: dict[int, str]) -> None:
        """A killed try had marked these: where the orchestrator has seen one it was sent, the others stay in doubt."""
        drain = self._drain
        seen: set[str] = set()
        if drain.orchestrator is not None:
            try:
                if "outcome" in drain.orchestrator.capabilities():
                    said = drain.orchestrator.outcomes(list(left.values()))
                    seen = {key for key, found in said.items() if found.state in _KNOWN}
            except OrchestratorError as error:
                drain.note(
                    "replay",
                    f"job {self.job.id}: what a killed try sent can't be asked: {error}",
                    level="warning",
                )
        sent = [Delivered(ordinal, None, None) for ordinal, key in left.items() if key in seen]
        doubtful = [ordinal for ordinal, key in left.items() if key not in seen]
        self._settle(sent, {}, doubtful, self.job.cursor)
        drain.note(
            "replay",
            f"job {self.job.id}: a try died while it sent {len(left)}: {len(sent)} were seen by the orchestrator, "
            f"{len(doubtful)} are in doubt",
            level="warning",
        )

    def _settle(
        self, taken: Sequence[Delivered], refused: dict[int, str], doubtful: Sequence[int], cursor: int
    ) -> None:
        drain = self._drain
        with drain.ledger.write(drain.queue, drain.epoch) as tx:
            ledger.hold_writer(tx, self.job.id, self._token)
            ledger.settle_sent(tx, self.job, drain.id, taken, refused, doubtful, cursor)
            if doubtful and self._resends:
                ledger.free_doubtful(tx, self.job, doubtful)

    @property
    def _resends(self) -> bool:
        return getattr(self._drain.config.target, "on_ambiguous", "hold") == "resend"

    def send(self, until: int, deadline: float) -> int:
        """Send on until ordinal ``until`` or the (monotonic) deadline; returns the cursor.

        :raises Fenced: when another try or drain took over.
        """
        until = min(until, self.job.size)
        self._outbox.forget()
        while self.cursor < until and time.monotonic() < deadline and not paused(self._drain):
            chunk = self._outbox.next(self.cursor, until, self._rate.room(WINDOW))
            if chunk.broken:
                for item in chunk.broken:
                    self._skip(item, "archive_broken")
            elif not chunk.items:
                self._settle([], {}, [], until)
                self.cursor = until
            else:
                self._rate.wait(len(chunk.items))
                self._send(chunk.outputs, chunk.items[-1].ordinal + 1)
        return self.cursor

    def _skip(self, item: Item, reason: str) -> None:
        drain = self._drain
        with drain.ledger.write(drain.queue, drain.epoch) as tx:
            self.skipped += ledger.skip(tx, self.job, item, reason, per_key=False)
        self._outbox.forget()

    def _send(self, outputs: Sequence[Output], cursor: int) -> None:
        """A window: marked, sent wave by wave, settled. Where one of a lane was not taken the later ones wait."""
        drain = self._drain
        with drain.ledger.write(drain.queue, drain.epoch) as tx:
            ledger.hold_writer(tx, self.job.id, self._token)
            marked = ledger.mark_sending(tx, self.job, [o.ordinal for o in outputs], clock.now())
        call_by = time.monotonic() + _CALL_WITHIN_S
        taken: list[Delivered] = []
        refused: dict[int, str] = {}
        doubtful: list[int] = []
        for wave in self._sender.waves([o for o in outputs if o.ordinal in marked]):
            now = [o for o in wave if (lane := self._sender.lane(o)) is None or lane not in self._stopped]
            refused.update({o.ordinal: "earlier_of_its_group" for o in wave if o not in now})
            if time.monotonic() > call_by:
                refused.update({o.ordinal: "ready" for o in now})
                continue
            answers = {a.ordinal: a for a in self._sender.send(now, time.monotonic() + _ANSWER_WITHIN_S)}
            for output in now:
                answer = answers.get(output.ordinal)
                if isinstance(answer, Delivered):
                    taken.append(answer)
                    continue
                if isinstance(answer, Refusal):
                    refused[output.ordinal] = answer.reason
                else:
                    doubtful.append(output.ordinal)
                if (lane := self._sender.lane(output)) is not None:
                    self._stopped.add(lane)
            call_by = time.monotonic() + _CALL_WITHIN_S
        self._settle(taken, refused, doubtful, cursor)
        self.skipped += len(refused) + len(doubtful)
        self.cursor = cursor

    def close(self, ended: str, rest: str) -> int:
        """End the job; what was not sent is open again. Returns how many that were."""
        drain = self._drain
        return ledger.close(
            drain.ledger, drain.queue, drain.epoch, self.job.id, ended, rest, writer=self._token
        )
