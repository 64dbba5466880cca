"""What became of a replay: confirmed, returned, or not known yet."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass

from dlq import clock
from dlq.drain import Drain
from dlq.errors import Overtaken
from dlq.intake import Intake
from dlq.ledger import jobs as ledger
from dlq.orchestrator import Orchestrator, OrchestratorBusy

KNOWN = 0.8
"""A gate looks once this share of a step is known (DESIGN §7)."""

_POLL_S = 0.1
_ASKED = 1_000  # keys a question


@dataclass(frozen=True)
class Tally:
    """Counts of a job's sent ordinals."""

    confirmed: int
    returned: int
    awaited: int

    @property
    def success(self) -> float | None:
        """confirmed ÷ (confirmed + returned); None while nothing is known."""
        known = self.confirmed + self.returned
        return self.confirmed / known if known else None

    @property
    def known(self) -> float:
        total = self.confirmed + self.returned + self.awaited
        return (self.confirmed + self.returned) / total if total else 1.0


class Outcomes:
    """Settles the outcomes of jobs: by the orchestrator's word, else by the consuming group's progress.

    A return counts only once its dead letter is in custody; so each look takes what has come into the queue since.
    """

    def __init__(self, drain: Drain) -> None:
        self._drain = drain
        self._orchestrator = (
            drain.orchestrator
            if drain.orchestrator is not None and "outcome" in drain.orchestrator.capabilities()
            else None
        )
        self._intake = Intake(drain)

    def consumed(self, target: str) -> bool:
        """Whether anybody could tell: an orchestrator, or a group that has a position on the target."""
        if self._orchestrator is not None or not self._drain.target.transactional:
            return True
        return self._drain.target.progress(target) is not None

    def wait(
        self, job_id: str, target: str, first: int, last: int, deadline: float, *, share: float = KNOWN
    ) -> Tally:
        """Wait until ``share`` of the ordinals is known, or the (monotonic) deadline."""
        until = min(deadline, time.monotonic() + self._drain.config.outcome.deadline)
        pause = _POLL_S
        while True:
            try:
                tally = self.look(job_id, target, first, last, until)
            except OrchestratorBusy as busy:
                tally, pause = self.known(job_id, first, last), max(pause, busy.retry_after_s or 0.0)
            if tally.known >= share or time.monotonic() >= until:
                return tally
            time.sleep(min(pause, max(0.0, until - time.monotonic())))
            pause = min(pause * 1.5, 2.0)

    def look(self, job_id: str, target: str, first: int, last: int, deadline: float) -> Tally:
        """Settle what can be known now."""
        if self._orchestrator is not None:
            self._ask(self._orchestrator, job_id, first, last, deadline)
        elif self._drain.target.transactional:
            self._observe(job_id, target, first, last, deadline)
        else:
            self._await_digestion(job_id, target, first, last, deadline)
        return self.known(job_id, first, last)

    def glance(self, job_id: str, target: str, first: int, last: int, deadline: float) -> Tally:
        """What is known so far, without a wait: what the consuming group has passed and what did not come back yet
        counts as confirmed here, but is not settled.
        """
        drain = self._drain
        if self._orchestrator is not None:
            with suppress(OrchestratorBusy):  # the step's end waits for it
                self._ask(self._orchestrator, job_id, first, last, deadline)
            return self.known(job_id, first, last)
        # The position first: a dead letter is written before it is passed.
        progress = drain.target.progress(target) if drain.target.transactional else None
        self._take(deadline)
        known = self.known(job_id, first, last)
        with drain.ledger.read() as tx:
            passed = ledger.passed_below(tx, job_id, first, last, progress) if progress else 0
        unsettled = min(known.awaited, max(0, passed - known.confirmed - known.returned))
        return Tally(known.confirmed + unsettled, known.returned, known.awaited - unsettled)

    def known(self, job_id: str, first: int, last: int) -> Tally:
        """What the ledger knows of these ordinals."""
        with self._drain.ledger.read() as tx:
            counts = ledger.outcomes(tx, job_id, first, last)
        return Tally(counts.get("confirmed", 0), counts.get("returned", 0), counts.get("replayed", 0))

    def _ask(self, orchestrator: Orchestrator, job_id: str, first: int, last: int, deadline: float) -> None:
        drain, failed = self._drain, False
        while True:
            with drain.ledger.read() as tx:
                asked = ledger.awaited(tx, job_id, first, last, _ASKED)
            if not asked:
                break
            said = orchestrator.outcomes(list(asked))
            good = [asked[key] for key, state in said.items() if state.state == "succeeded" and key in asked]
            failed = failed or any(state.state == "failed" for state in said.values())
            if good:
                with drain.ledger.write(drain.queue, drain.epoch) as tx:
                    ledger.confirm(tx, job_id, good)
            first = max(asked.values()) + 1
        if failed:
            self._take(deadline)

    def _observe(self, job_id: str, target: str, first: int, last: int, deadline: float) -> None:
        drain = self._drain
        progress = drain.target.progress(target)
        if progress is None:
            return
        with drain.ledger.read() as tx:
            passed = ledger.passed_below(tx, job_id, first, last, progress)
            counts = ledger.outcomes(tx, job_id, first, last)
        sent = counts.get("replayed", 0) + counts.get("confirmed", 0) + counts.get("returned", 0)
        if not counts.get("replayed") or (passed < KNOWN * sent and time.monotonic() < deadline):
            return
        # Passed, and no dead letter of it by the end of the grace: then it succeeded.
        time.sleep(drain.config.outcome.grace)
        if self._take(deadline):
            with drain.ledger.write(drain.queue, drain.epoch) as tx:
                ledger.confirm_below(tx, job_id, first, last, progress)

    def _await_digestion(self, job_id: str, target: str, first: int, last: int, deadline: float) -> None:
        """A queue tells of no message what became of it: what has not come back when it must have succeeded."""
        drain = self._drain
        until = drain.target.digested(target, drain.source.uri)
        if until is None:
            self._take(deadline)
            return
        at = clock.from_ms(int((until - drain.config.outcome.grace) * 1000))
        if self._take(deadline):
            with drain.ledger.write(drain.queue, drain.epoch) as tx:
                ledger.confirm_sent_before(tx, job_id, first, last, at or "")

    def _take(self, deadline: float) -> bool:
        while True:
            try:
                return self._intake.run(max(5.0, deadline - time.monotonic()), glance=True).reached
            except Overtaken:  # by a sibling: jobs of one plan run side by side, each looking for its returns
                continue
