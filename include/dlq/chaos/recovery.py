"""The second half of a chaos run: after a drain, is every workflow where its golden flow says it must be?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from sqlalchemy import select

from dlq import drafts
from dlq.chaos.faults import WHO, made, require_target
from dlq.chaos.inject import STAGE, Experiment, Injected, before, document, experiments, orchestrator_of
from dlq.drain import Drain
from dlq.golden import differences
from dlq.ledger.schema import draft, entry
from dlq.orchestrator import OrchestratorError
from dlq.review import apply_review, proposals

_SHOWN = 5


@dataclass(frozen=True)
class Recovered:
    """How the workflows of one fault ended: ``recovered`` as their golden flow says, ``waiting`` with an entry that is
    in custody and not settled, else ``lost``. ``why`` tells of some that are not recovered.
    """

    fault: str
    broke: str
    failed: int
    recovered: int
    waiting: int
    lost: int
    why: tuple[str, ...] = ()
    skipped: str | None = None

    @property
    def whole(self) -> bool:
        """Whether the fault struck, and everything it broke works again."""
        return self.skipped is None and self.failed == self.recovered > 0

    def __str__(self) -> str:
        if self.skipped:
            return f"{self.fault}: not injected: {self.skipped}"
        said = f"{self.fault}: {self.recovered} recovered, {self.waiting} waiting, {self.lost} lost"
        return "; ".join((said, *self.why))


def recover(drain: Drain, injected: Sequence[Injected], deadline_s: float) -> list[Recovered]:
    """Mend the corrupt ones as a person would, then hold every workflow against its golden flow.

    :param deadline_s: seconds the mended ones have to run through.
    """
    by_name = {one.fault: one for one in injected}
    found = []
    for one in experiments(drain):
        struck = by_name[one.name]
        if struck.skipped:
            result = Recovered(one.name, one.fault.broke, 0, 0, 0, 0, skipped=struck.skipped)
        else:
            if one.corrupt:
                _mend(drain, one, deadline_s)
            result = _look(drain, one, struck)
        drain.note(STAGE, str(result), level="info" if result.whole else "error", **asdict(result))
        found.append(result)
    return found


def end_faults(drain: Drain) -> list[str]:
    """Bring back what the run broke and the drain did not, or made otherwise; returns what could not be, and why."""
    failed = []
    faults = require_target(drain.config).faults
    for name, was in before(drain).items():
        try:
            made(faults[name], orchestrator_of(drain), 1).undo(was)
        except OrchestratorError as error:
            failed.append(f"{name}: {error}")
    return failed


def _look(drain: Drain, one: Experiment, struck: Injected) -> Recovered:
    orchestrator = orchestrator_of(drain)
    with drain.ledger.read() as tx:
        rows = tx.execute(
            select(entry.c.correlation_id, entry.c.state, entry.c.reason).where(
                entry.c.queue == drain.queue,
                entry.c.correlation_id.in_(one.correlation_ids),
                entry.c.settled_drain.is_(None),
            )
        ).all()
    in_custody = {row.correlation_id: f"{row.state} ({row.reason})" for row in rows}
    recovered, why = 0, []
    lost = waiting = 0
    for each in one.correlation_ids:
        state = orchestrator.workflow(each)
        unlike = [f"{each} was never run"] if state is None else list(differences(one.flow, state))
        if not unlike:
            recovered += 1
        elif each in in_custody:
            waiting += 1
            why.append(f"{each}: {in_custody[each]}")
        else:
            lost += 1
            why.append(f"{each}: {unlike[0]}")
    return Recovered(one.name, one.fault.broke, struck.failed, recovered, waiting, lost, tuple(why[:_SHOWN]))


def _mend(drain: Drain, one: Experiment, deadline_s: float) -> None:
    """What `dlq edit` and the review do: a whole value for each, and the decision to replay it."""
    with drain.ledger.read() as tx:
        waiting = tx.execute(
            select(entry.c.id, entry.c.part, entry.c.place, entry.c.correlation_id).where(
                entry.c.queue == drain.queue,
                entry.c.correlation_id.in_(one.correlation_ids),
                entry.c.state == "open",
                entry.c.id.not_in(select(draft.c.entry)),
            )
        ).all()
    for row in waiting:
        whole = document(one.flow, row.correlation_id)
        drafts.edit(drain.config, f"{row.part}/{row.place}", whole, f"{WHO} {drain.id}", drain.connections)
    with drain.ledger.read() as tx:
        ours = tx.execute(
            select(draft.c.id)
            .join(entry, entry.c.id == draft.c.entry)
            .where(entry.c.queue == drain.queue, entry.c.correlation_id.in_(one.correlation_ids))
        ).scalars()
        subjects = {f"draft {number}" for number in ours}
    offered = [each for each in proposals(drain, drain.queue) if each["subject"] in subjects]
    choices = {each["subject"]: {"choice": "replay", "hash": each["hash"]} for each in offered}
    if choices:
        apply_review(drain, choices, f"{WHO} {drain.id}", deadline_s)
