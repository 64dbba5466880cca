"""Run a job to a target without transactions: each line is marked before its call and settled after it."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import TracebackType
from typing import Protocol, Self

from dlq import clock
from dlq.drain import Drain
from dlq.errors import ConfigError, Fenced
from dlq.jobs import JobRun, paused
from dlq.ledger import jobs as ledger
from dlq.ledger.jobs import Item, Job, Marked
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


@dataclass
class _Answered:
    """What became of lines: taken, refused with the reason, in doubt, or too late to be called at all; ``denied``: the
    target lets nobody send.
    """

    taken: list[Delivered] = field(default_factory=list)
    refused: dict[int, str] = field(default_factory=dict)
    doubtful: list[int] = field(default_factory=list)
    late: list[int] = field(default_factory=list)
    denied: ConfigError | None = None


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
        self.cursor = self.job.cursor
        if left:
            # A window is marked as a whole: nothing before is still to be sent.
            self.cursor = left[-1].ordinal + 1
            self._settle_left(self._send_again(left))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing is held open."""

    def _send_again(self, left: Sequence[Marked]) -> list[Marked]:
        """A killed try had marked these: those so young that the target passes over what it has already are sent
        again, under the same key; returns the others.
        """
        young = [m for m in left if m.at > clock.after(-self._sender.again_s)]
        if not young:
            return list(left)
        outbox = Outbox(self._drain, self.job, "sending")
        call_by = time.monotonic() + self._sender.again_s - _age_s(young[0].at)
        first, until = young[0].ordinal, young[-1].ordinal + 1
        known: set[int] = set()
        while first < until:
            chunk = outbox.next(first, until, WINDOW)
            if not chunk.items:  # broken in the archive: in doubt, like what is too old
                break
            answered = self._deliver(chunk.outputs, call_by, fixed=True)
            # A refusal says nothing of what the killed try did: those stay in doubt.
            self._settle(answered.taken, {}, [], chunk.items[-1].ordinal + 1)
            if answered.denied is not None:
                raise answered.denied
            known.update(d.ordinal for d in answered.taken)
            first = chunk.items[-1].ordinal + 1
        self._drain.note(
            "replay",
            f"job {self.job.id}: a try died while it sent {len(left)}: {len(known)} were sent again under the same "
            "deduplication ids",
            level="warning",
        )
        return [m for m in left if m.ordinal not in known]

    def _settle_left(self, left: Sequence[Marked]) -> None:
        """Of these it is not known whether they were sent: where the orchestrator has seen one it was, the others stay
        in doubt.
        """
        if not left:
            return
        drain = self._drain
        seen: set[str] = set()
        if drain.orchestrator is not None:
            try:
                if "outcome" in drain.orchestrator.capabilities():
                    said = drain.orchestrator.outcomes([m.key for m in left])
                    seen = {key for key, found in said.items() if found.state in _KNOWN}
            except OrchestratorError as error:
                drain.note(
                    "replay",
                    f"job {self.job.id}: what a killed try sent can't be asked: {error}",
                    level="warning",
                )
        sent = [Delivered(m.ordinal, None, None) for m in left if m.key in seen]
        doubtful = [m.ordinal for m in left if m.key not in seen]
        self._settle(sent, {}, doubtful, self.cursor)
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
            swallowed = ledger.settle_sent(tx, self.job, drain.id, taken, refused, doubtful, cursor)
            if self._ordered and (unsent := [*refused, *doubtful, *swallowed]):
                self.skipped += ledger.hold_back_after(tx, self.job, unsent)
                self._outbox.forget()
            if doubtful and self._resends:
                ledger.free_doubtful(tx, self.job, doubtful)

    @property
    def _ordered(self) -> bool:
        return self._drain.config.target.ordering == "per_key"

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
            self.skipped += ledger.skip(tx, self.job, item, reason, per_key=self._ordered)
        self._outbox.forget()

    def _send(self, outputs: Sequence[Output], cursor: int) -> None:
        """A window: marked, sent wave by wave, settled."""
        drain = self._drain
        with drain.ledger.write(drain.queue, drain.epoch) as tx:
            ledger.hold_writer(tx, self.job.id, self._token)
            marked = ledger.mark_sending(tx, self.job, [o.ordinal for o in outputs], clock.now())
        answered = self._deliver(
            [o for o in outputs if o.ordinal in marked], time.monotonic() + _CALL_WITHIN_S
        )
        refused = answered.refused | dict.fromkeys(answered.late, "ready")
        self._settle(answered.taken, refused, answered.doubtful, cursor)
        self.skipped += len(refused) + len(answered.doubtful)
        self.cursor = cursor
        if answered.denied is not None:
            raise answered.denied

    def _deliver(self, outputs: Sequence[Output], call_by: float, *, fixed: bool = False) -> _Answered:
        """Send wave by wave; where one of a lane was not taken, its later ones wait.

        :param call_by: (monotonic) when the first call must have begun; a later one as long after the one before it
            ended, or all by then, tried again or not (``fixed``).
        """
        answered = _Answered()
        stopped: set[str] = set()
        for wave in self._sender.waves(outputs):
            lanes = {o.ordinal: self._sender.lane(o) for o in wave}
            now = [o for o in wave if lanes[o.ordinal] is None or lanes[o.ordinal] not in stopped]
            waiting = (o.ordinal for o in wave if o not in now)
            answered.refused.update(dict.fromkeys(waiting, self.job.rest(ledger.EARLIER)))
            if time.monotonic() > call_by or answered.denied is not None:
                answered.late.extend(o.ordinal for o in now)
                continue
            until = call_by if fixed else time.monotonic() + _ANSWER_WITHIN_S
            try:
                answers = {a.ordinal: a for a in self._sender.send(now, until)}
            except ConfigError as error:
                answered.denied = error
                answered.late.extend(o.ordinal for o in now)
                continue
            for output in now:
                answer = answers.get(output.ordinal)
                if isinstance(answer, Delivered):
                    answered.taken.append(answer)
                    continue
                if isinstance(answer, Refusal):
                    answered.refused[output.ordinal] = answer.reason
                else:
                    answered.doubtful.append(output.ordinal)
                if (lane := lanes[output.ordinal]) is not None:
                    stopped.add(lane)
            if not fixed:
                call_by = time.monotonic() + _CALL_WITHIN_S
        return answered

    def close(self, ended: str, rest: str) -> int:
        """End the job; what was not sent is open again. Returns how many that were."""
        drain = self._drain
        return ledger.close(
            drain.ledger, drain.queue, drain.epoch, self.job.id, ended, rest, writer=self._token
        )


def _age_s(at: str) -> float:
    return (datetime.now(UTC) - datetime.fromisoformat(at)).total_seconds()
