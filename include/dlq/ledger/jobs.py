"""Plans and jobs: frozen lists of entries, one writer each, a cursor that only the target's own moves."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
from sqlalchemy import (
    ColumnElement,
    Connection,
    Text,
    and_,
    bindparam,
    case,
    cast,
    delete,
    exists,
    func,
    insert,
    literal,
    or_,
    select,
    tuple_,
    update,
)

from dlq import clock
from dlq.entry import idempotency_key
from dlq.errors import DlqError, Fenced
from dlq.ledger.custody import batched, mark_returned
from dlq.ledger.schema import CONTESTED, decision, delivery, entry, job, job_entry, plan, segment, source
from dlq.ledger.store import Ledger, insert_rows
from dlq.ports import Delivered

_PAGE = 4_000
_BACK = entry.alias("back")  # of what was replayed
_BEFORE = job_entry.alias("before")  # an earlier job's line of the same entry


class PlanStale(DlqError):
    """An entry of the plan is no longer what was approved; nothing was planned. Make a new plan and look again."""


CLOSED_LATER = "closed by a later drain"
"""How a job ended that a drain, or an earlier life of it, left unfinished."""

EARLIER = "earlier_entry_of_key"
"""Why an entry that would be ready is open: an earlier one of its key waits."""

HAND_BACK_UNFINISHED = "hand_back_unfinished"
"""Why what a restore did not get to is open again: it was to be handed back, so nobody but a person may replay it."""


class Job(msgspec.Struct, frozen=True):
    id: str
    plan: str
    plan_hash: str
    stage: str
    drain: str
    kind: str
    canary: bool
    target: str
    size: int
    cursor: int
    state: str
    target_from: Mapping[str, int] | None
    ended: str | None

    def rest(self, reason: str) -> str:
        """Why what the job does not send is open again: what a person decided on is theirs again, what a fix was to be
        tried on waits for a fix again, else ``reason``."""
        if self.kind == "hand_back":
            return HAND_BACK_UNFINISHED
        waits = {"review": "waiting_for_person", "canary_fix": "waiting_for_fix"}
        return waits.get(self.stage.partition(":")[0], reason)


class Item(msgspec.Struct, frozen=True, gc=False):
    """A job's line: which entry, and which archived bytes to send for it."""

    ordinal: int
    entry: int
    ref: str
    segment: int
    row_no: int
    payload_sha: str
    idem_key: str
    attempts: int
    key_hash: str | None
    origin: str | None
    size: int
    correlation_id: str | None


class Cut(msgspec.Struct, frozen=True):
    """One job of a plan being made: its entries in order."""

    target: str
    entries: Iterable[Sequence[Any]]
    canary: bool = False
    kind: str = "replay"


def propose(
    ledger: Ledger, queue: str, epoch: int, drain: str, stage: str, cuts: Iterable[Cut], *, expires_s: float
) -> str | None:
    """Freeze a plan of jobs; its entries stay as they are until :func:`approve`. Returns its id, None where it
    has no entry.

    ``cuts`` give rows of (entry id, source uri, part, place, segment, row_no, payload_sha), already in sending order.
    """
    with ledger.write(queue, epoch, alone=True) as tx:
        n = tx.execute(select(func.count()).select_from(plan).where(plan.c.drain == drain)).scalar_one() + 1
        plan_id = f"{drain}.p{n}"
        tx.execute(
            insert(plan).values(
                id=plan_id,
                queue=queue,
                drain=drain,
                stage=stage,
                hash=f"incomplete:{plan_id}",
                proposed_at=clock.now(),
                expires_at=clock.after(expires_s),
            )
        )
    # The id is part of it: the same entries planned again, after a try that died, are another plan.
    digest = hashlib.sha256(f"{plan_id}\n{stage}\n".encode())
    total = 0
    for cut in cuts:
        size, job_id = 0, ""
        for page in batched(cut.entries, _PAGE):
            with ledger.write(queue, epoch, alone=size == 0) as tx:
                if size == 0:
                    # Numbered here: another branch of the runbook may be making a plan of this drain, too.
                    made = select(func.count()).select_from(job).where(job.c.drain == drain)
                    job_id = f"{drain}.{tx.execute(made).scalar_one() + 1}"
                    tx.execute(
                        insert(job).values(
                            id=job_id,
                            queue=queue,
                            plan=plan_id,
                            drain=drain,
                            kind=cut.kind,
                            canary=int(cut.canary),
                            target=cut.target,
                            size=0,
                            state="proposed",
                        )
                    )
                    digest.update(f"{cut.kind}\n{cut.target}\n{cut.canary}\n".encode())
                rows = []
                for entry_id, uri, part, place, segment_id, row_no, sha in page:
                    rows.append(
                        (
                            job_id,
                            size,
                            entry_id,
                            segment_id,
                            row_no,
                            sha,
                            idempotency_key(f"{uri}/{part}/{place}", sha, cut.target),
                        )
                    )
                    digest.update(f"{entry_id} {sha}\n".encode())
                    size += 1
                insert_rows(
                    tx,
                    job_entry,
                    ("job", "ordinal", "entry", "segment", "row_no", "payload_sha", "idem_key"),
                    rows,
                )
        if size:
            with ledger.write(queue, epoch) as tx:
                tx.execute(update(job).where(job.c.id == job_id).values(size=size))
        total += size
    with ledger.write(queue, epoch) as tx:
        values = {"hash": digest.hexdigest()} if total else {"withdrawn_at": clock.now()}
        tx.execute(update(plan).where(plan.c.id == plan_id).values(**values))
    return plan_id if total else None


def approve(ledger: Ledger, queue: str, epoch: int, plan_id: str, plan_hash: str, decision_id: int) -> None:
    """Lock the plan's entries for its jobs, all or none.

    :raises PlanStale: when the hash is another, the approval expired, or an entry is no longer open.
    """
    with ledger.write(queue, epoch) as tx:
        found = tx.execute(select(plan).where(plan.c.id == plan_id)).mappings().one()
        if found["hash"] != plan_hash or found["withdrawn_at"]:
            raise PlanStale(
                f"plan {plan_id} is not the one that was approved (hash {found['hash'][:12]}, approved "
                f"{plan_hash[:12]}); look at it again"
            )
        if found["expires_at"] < clock.now():
            raise PlanStale(
                f"plan {plan_id}: the time to start it ended at {found['expires_at']}; make a new plan"
            )
        for row in tx.execute(
            select(job.c.id, job.c.size).where(job.c.plan == plan_id, job.c.state == "proposed")
        ).all():
            locked = tx.execute(
                update(entry)
                .where(
                    entry.c.id.in_(select(job_entry.c.entry).where(job_entry.c.job == row.id)),
                    entry.c.state == "open",
                )
                .values(state="planned", job=row.id)
            )
            if locked.rowcount != row.size:
                raise PlanStale(
                    f"plan {plan_id}: {row.size - locked.rowcount} of its entries are no longer open; make a new plan"
                )
            tx.execute(update(job).where(job.c.id == row.id).values(state="approved"))
        tx.execute(
            update(plan).where(plan.c.id == plan_id).values(decision=decision_id, approved_at=clock.now())
        )


def withdraw(ledger: Ledger, queue: str, epoch: int, plan_id: str) -> None:
    """Give up a plan that was never approved."""
    with ledger.write(queue, epoch) as tx:
        tx.execute(
            update(plan)
            .where(plan.c.id == plan_id, plan.c.decision.is_(None))
            .values(withdrawn_at=clock.now())
        )
        tx.execute(
            update(job)
            .where(job.c.plan == plan_id, job.c.state == "proposed")
            .values(state="closed", ended="withdrawn")
        )


def plan_hash(tx: Connection, plan_id: str) -> str:
    return str(tx.execute(select(plan.c.hash).where(plan.c.id == plan_id)).scalar_one())


def find(tx: Connection, *conditions: ColumnElement[bool]) -> list[Job]:
    """Jobs in the order they were made."""
    rows = tx.execute(
        select(job, plan.c.hash.label("plan_hash"), plan.c.stage)
        .join(plan, plan.c.id == job.c.plan)
        .where(*conditions)
        .order_by(plan.c.proposed_at, job.c.id)
    ).mappings()
    return [
        Job(
            r["id"],
            r["plan"],
            r["plan_hash"],
            r["stage"],
            r["drain"],
            r["kind"],
            bool(r["canary"]),
            r["target"],
            r["size"],
            r["cursor"],
            r["state"],
            json.loads(r["target_from"]) if r["target_from"] else None,
            r["ended"],
        )
        for r in rows
    ]


def get(tx: Connection, job_id: str) -> Job:
    return find(tx, job.c.id == job_id)[0]


def claim_writer(ledger: Ledger, queue: str, epoch: int, job_id: str, token: str, *, fresh: bool) -> None:
    """Make ``token`` the job's writer (``fresh``: a new try), or see that it still is.

    :raises Fenced: when a newer try took the job.
    """
    with ledger.write(queue, epoch) as tx:
        if fresh:
            tx.execute(update(job).where(job.c.id == job_id).values(writer=token))
        elif tx.execute(select(job.c.writer).where(job.c.id == job_id)).scalar_one() != token:
            raise Fenced(f"job {job_id}: a newer try writes it; this one stops")


def hold_writer(tx: Connection, job_id: str, token: str) -> None:
    """See, in the transaction that acts on it, that ``token`` is still the job's writer.

    :raises Fenced: when a newer try took the job.
    """
    held = tx.execute(select(job.c.writer).where(job.c.id == job_id).with_for_update()).scalar_one()
    if held != token:
        raise Fenced(f"job {job_id}: a newer try writes it; this one stops")


def start(ledger: Ledger, queue: str, epoch: int, job_id: str) -> None:
    """The job runs: its cursor 0 is at the target. One that runs already goes on.

    :raises PlanStale: when its approval expired before it began; its entries are open again.
    """
    with ledger.write(queue, epoch) as tx:
        found = get(tx, job_id)
        if found.state != "approved":
            return
        until = tx.execute(select(plan.c.expires_at).where(plan.c.id == found.plan)).scalar_one()
        late = until < clock.now()
        if late:
            _close(tx, found, "approval_expired", found.rest("approval_expired"))
        else:
            tx.execute(update(job).where(job.c.id == job_id).values(state="running"))
    if late:
        raise PlanStale(
            f"job {job_id}: the time to start it ended at {until}; its entries are open, make a new plan"
        )


def mark_from(ledger: Ledger, queue: str, epoch: int, job_id: str, target_from: Mapping[int, int]) -> None:
    """Write down where the target ended before the job's first output, once."""
    with ledger.write(queue, epoch) as tx:
        tx.execute(
            update(job)
            .where(job.c.id == job_id, job.c.target_from.is_(None))
            .values(target_from=json.dumps({str(p): o for p, o in target_from.items()}))
        )


_LINES = (
    select(
        job_entry.c.ordinal,
        job_entry.c.entry,
        source.c.uri + literal("/") + cast(entry.c.part, Text) + literal("/") + entry.c.place,
        job_entry.c.segment,
        job_entry.c.row_no,
        job_entry.c.payload_sha,
        job_entry.c.idem_key,
        entry.c.attempts,
        entry.c.key_hash,
        entry.c.origin,
        entry.c.size,
        entry.c.correlation_id,
    )
    .join(entry, (entry.c.id == job_entry.c.entry) & (entry.c.job == job_entry.c.job))
    .join(source, source.c.id == entry.c.source)
    .order_by(job_entry.c.ordinal)
)


def items(
    tx: Connection, job_id: str, first: int, until: int, limit: int, state: str = "planned"
) -> list[Item]:
    """The next lines whose entry is in ``state``, ordinals ``first`` ≤ n < ``until``."""
    lines = _LINES.where(
        job_entry.c.job == job_id,
        job_entry.c.ordinal >= first,
        job_entry.c.ordinal < until,
        entry.c.state == state,
    )
    found: Sequence[Sequence[Any]] = tx.execute(lines.limit(limit)).all()
    return [Item(*row) for row in found]


def settle(
    tx: Connection, settled: Job, drain: str, cursor: int, delivered: Sequence[Delivered], sent_at: str
) -> int:
    """What the target's cursor has passed is sent: settle it, and remember where it went. Returns how many."""
    state = "handed_back" if settled.kind == "hand_back" else "replayed"
    passed = select(job_entry.c.entry).where(job_entry.c.job == settled.id, job_entry.c.ordinal < cursor)
    known = tx.execute(select(job.c.cursor).where(job.c.id == settled.id)).scalar_one()
    passed = passed.where(job_entry.c.ordinal >= known)
    done = tx.execute(
        update(entry)
        .where(entry.c.id.in_(passed), entry.c.state == "planned", entry.c.job == settled.id)
        .values(
            state=state,
            settled_drain=drain,
            reason="sent, outcome not known yet" if state == "replayed" else "handed back to the queue",
        )
    ).rowcount
    came_back = passed.join(_BACK, _BACK.c.return_of == job_entry.c.entry)
    tx.execute(  # the consumer may have been faster than our bookkeeping
        update(entry)
        .where(entry.c.id.in_(came_back), entry.c.state == "replayed", entry.c.job == settled.id)
        .values(state="returned", reason="its replay failed again")
    )
    add_deliveries(tx, settled.id, delivered, sent_at)
    tx.execute(update(job).where(job.c.id == settled.id, job.c.cursor <= cursor).values(cursor=cursor))
    return int(done)


def mark_sending(tx: Connection, marked: Job, ordinals: Sequence[int], at: str) -> set[int]:
    """Write down, before the call, which lines are about to be sent; returns those that are still to be."""
    found: set[int] = set()
    for some in batched(ordinals, 500):
        ours = select(job_entry.c.entry).where(job_entry.c.job == marked.id, job_entry.c.ordinal.in_(some))
        moved = tx.execute(
            update(entry)
            .where(entry.c.id.in_(ours), entry.c.job == marked.id, entry.c.state == "planned")
            .values(state="sending", reason="being sent")
            .returning(entry.c.id)
        ).scalars()
        ids = list(moved)
        lines = select(job_entry.c.ordinal).where(job_entry.c.job == marked.id, job_entry.c.entry.in_(ids))
        found.update(tx.execute(lines).scalars())
    rows = [(marked.id, ordinal, at) for ordinal in sorted(found)]
    insert_rows(tx, delivery, ("job", "ordinal", "sent_at"), rows, skip_on=("job", "ordinal"))
    return found


def settle_sent(
    tx: Connection,
    settled: Job,
    drain: str,
    taken: Sequence[Delivered],
    refused: Mapping[int, str],
    doubtful: Sequence[int],
    cursor: int,
) -> set[int]:
    """What became of lines marked as being sent: taken by the target, certainly refused (open with that reason), or
    not known. One whose message is another line's was swallowed, not sent: returns those ordinals, open now. A refusal
    says nothing of an earlier send whose outcome is not known: nor is that of its entry."""
    swallowed = _swallowed(tx, settled, taken)
    refused = {**refused, **dict.fromkeys(swallowed, "swallowed")}
    for some in batched(refused, 500):
        tx.execute(delete(delivery).where(delivery.c.job == settled.id, delivery.c.ordinal.in_(some)))
    final = [ordinal for ordinal, why in refused.items() if why not in ("ready", EARLIER)]
    doubted = _maybe_sent_before(tx, settled, final)
    refused = {ordinal: why for ordinal, why in refused.items() if ordinal not in doubted}
    doubtful = [*doubtful, *doubted]
    taken = [d for d in taken if d.ordinal not in swallowed]
    state = "handed_back" if settled.kind == "hand_back" else "replayed"
    reason = "sent, outcome not known yet" if state == "replayed" else "handed back to the queue"
    by_reason: dict[str, list[int]] = {}
    for ordinal, why in refused.items():
        by_reason.setdefault(why, []).append(ordinal)
    moves: list[tuple[Sequence[int], dict[str, Any]]] = [
        ([d.ordinal for d in taken], {"state": state, "settled_drain": drain, "reason": reason}),
        (doubtful, {"state": "ambiguous", "reason": "send_in_doubt"}),
        *((ordinals, {"state": "open", "job": None, "reason": why}) for why, ordinals in by_reason.items()),
    ]
    for ordinals, values in moves:
        for some in batched(ordinals, 500):
            ours = select(job_entry.c.entry).where(
                job_entry.c.job == settled.id, job_entry.c.ordinal.in_(some)
            )
            tx.execute(
                update(entry)
                .where(entry.c.id.in_(ours), entry.c.job == settled.id, entry.c.state == "sending")
                .values(**values)
            )
    if state == "replayed":
        for some in batched(
            [*(d.ordinal for d in taken), *doubtful], 500
        ):  # their consumer may have been faster
            came_back = (
                select(job_entry.c.entry)
                .join(_BACK, _BACK.c.return_of == job_entry.c.entry)
                .where(job_entry.c.job == settled.id, job_entry.c.ordinal.in_(some))
            )
            mark_returned(tx, list(tx.execute(came_back).scalars()), drain)
    where = and_(delivery.c.job == settled.id, delivery.c.ordinal == bindparam("line"))
    if taken:
        tx.execute(
            update(delivery).where(where).values(ref=bindparam("became")),
            [{"line": d.ordinal, "became": d.ref} for d in taken],
        )
    tx.execute(update(job).where(job.c.id == settled.id, job.c.cursor <= cursor).values(cursor=cursor))
    return swallowed


def _maybe_sent_before(tx: Connection, settled: Job, ordinals: Sequence[int]) -> set[int]:
    """Those whose entry an earlier job may have sent: what it certainly did would be settled."""
    found: set[int] = set()
    for some in batched(ordinals, 500):
        rows = tx.execute(
            select(job_entry.c.ordinal)
            .join(_BEFORE, (_BEFORE.c.entry == job_entry.c.entry) & (_BEFORE.c.job != job_entry.c.job))
            .join(delivery, (delivery.c.job == _BEFORE.c.job) & (delivery.c.ordinal == _BEFORE.c.ordinal))
            .where(job_entry.c.job == settled.id, job_entry.c.ordinal.in_(some))
        )
        found.update(rows.scalars())
    return found


def forget_sends(tx: Connection, unsent: ColumnElement[bool]) -> None:
    """Somebody knows that these entries were never sent."""
    lines = (
        select(job_entry.c.job, job_entry.c.ordinal)
        .join(entry, entry.c.id == job_entry.c.entry)
        .where(unsent)
    )
    tx.execute(delete(delivery).where(tuple_(delivery.c.job, delivery.c.ordinal).in_(lines)))


def _swallowed(tx: Connection, settled: Job, taken: Sequence[Delivered]) -> set[int]:
    """The ordinals whose message is another line's."""
    owners: dict[str, tuple[str, int]] = {}
    for some in batched([d.ref for d in taken if d.ref is not None], 500):
        rows = tx.execute(
            select(delivery.c.job, delivery.c.ordinal, delivery.c.ref).where(delivery.c.ref.in_(some))
        )
        owners.update({str(r.ref): (str(r.job), int(r.ordinal)) for r in rows})
    return {
        d.ordinal
        for d in taken
        if d.ref is not None and owners.setdefault(d.ref, (settled.id, d.ordinal)) != (settled.id, d.ordinal)
    }


def free_doubtful(tx: Connection, settled: Job, ordinals: Sequence[int]) -> None:
    """By policy: what may have been sent is sent again, by a later plan under the same key."""
    for some in batched(ordinals, 500):
        ours = select(job_entry.c.entry).where(job_entry.c.job == settled.id, job_entry.c.ordinal.in_(some))
        tx.execute(
            update(entry)
            .where(entry.c.id.in_(ours), entry.c.job == settled.id, entry.c.state == "ambiguous")
            .values(state="open", job=None, reason="ready")
        )


class Marked(msgspec.Struct, frozen=True):
    """A line that was about to be sent; ``at`` is when it was marked."""

    ordinal: int
    key: str
    at: str


def being_sent(tx: Connection, job_id: str) -> list[Marked]:
    """The lines a killed try had marked, in order."""
    rows = tx.execute(
        select(job_entry.c.ordinal, job_entry.c.idem_key, delivery.c.sent_at)
        .join(entry, (entry.c.id == job_entry.c.entry) & (entry.c.job == job_entry.c.job))
        .join(delivery, (delivery.c.job == job_entry.c.job) & (delivery.c.ordinal == job_entry.c.ordinal))
        .where(job_entry.c.job == job_id, entry.c.state == "sending")
        .order_by(job_entry.c.ordinal)
    )
    return [Marked(int(ordinal), str(key), str(at)) for ordinal, key, at in rows]


def confirm_sent_before(tx: Connection, job_id: str, first: int, last: int, until: str) -> int:
    """Confirm what was sent before ``until``, ordinals ``first`` ≤ n < ``last``."""
    ours = (
        select(job_entry.c.entry)
        .join(delivery, (delivery.c.job == job_entry.c.job) & (delivery.c.ordinal == job_entry.c.ordinal))
        .where(
            job_entry.c.job == job_id,
            job_entry.c.ordinal >= first,
            job_entry.c.ordinal < last,
            delivery.c.sent_at < until,
        )
    )
    return int(tx.execute(_confirm_silent.where(entry.c.id.in_(ours), entry.c.job == job_id)).rowcount)


def add_deliveries(tx: Connection, job_id: str, delivered: Iterable[Delivered], sent_at: str) -> None:
    insert_rows(
        tx,
        delivery,
        ("job", "ordinal", "part", "pos", "ref", "sent_at"),
        [(job_id, d.ordinal, d.part, d.pos, d.ref, sent_at) for d in delivered],
        skip_on=("job", "ordinal"),
    )


def undelivered(tx: Connection, job_id: str) -> bool:
    """Whether an entry of the job is settled as sent without a known place on the target."""
    known = exists().where(delivery.c.job == job_entry.c.job, delivery.c.ordinal == job_entry.c.ordinal)
    missing = (
        select(job_entry.c.ordinal)
        .join(entry, (entry.c.id == job_entry.c.entry) & (entry.c.job == job_entry.c.job))
        .where(job_entry.c.job == job_id, entry.c.state.in_(("replayed", "handed_back")), ~known)
        .limit(1)
    )
    return tx.execute(missing).first() is not None


def skip(tx: Connection, skipping: Job, item: Item, reason: str, *, per_key: bool) -> int:
    """Leave an entry out, before the cursor may pass it; with it, in a queue ordered by key, the later ones of its key:
    of this job, and of those of its plan that nobody sends yet."""
    tx.execute(
        update(entry)
        .where(entry.c.id == item.entry, entry.c.job == skipping.id, entry.c.state == "planned")
        .values(state="open", job=None, reason=reason)
    )
    if not per_key or item.key_hash is None:
        return 1
    return 1 + _hold_back(tx, skipping, item.key_hash, item.entry)


def _hold_back(tx: Connection, skipping: Job, key_hash: str, after: int) -> int:
    to_come = select(job.c.id).where(job.c.plan == skipping.plan, job.c.state == "approved")
    later = tx.execute(
        update(entry)
        .where(
            or_(entry.c.job == skipping.id, entry.c.job.in_(to_come)),
            entry.c.state == "planned",
            entry.c.key_hash == key_hash,
            entry.c.id > after,
        )
        .values(state="open", job=None, reason=skipping.rest(EARLIER))
    )
    return int(later.rowcount)


def hold_back_after(tx: Connection, settled: Job, ordinals: Iterable[int]) -> int:
    """In a queue ordered by key, leave out what comes after these lines in their keys, as :func:`skip` does."""
    held = 0
    for some in batched(sorted(ordinals), 500):
        first = (
            select(entry.c.key_hash, func.min(entry.c.id))
            .join(job_entry, job_entry.c.entry == entry.c.id)
            .where(
                job_entry.c.job == settled.id, job_entry.c.ordinal.in_(some), entry.c.key_hash.is_not(None)
            )
            .group_by(entry.c.key_hash)
        )
        held += sum(_hold_back(tx, settled, str(key), int(n)) for key, n in tx.execute(first).all())
    return held


def close(
    ledger: Ledger, queue: str, epoch: int, job_id: str, ended: str, rest: str, *, writer: str | None = None
) -> int:
    """End a job: what was not sent is open again with reason ``rest``. Returns how many that were.

    :param writer: who closes it, having read its cursor; None for a job that never ran.
    :raises Fenced: when another is its writer: what it has under way must not be planned again.
    """
    with ledger.write(queue, epoch) as tx:
        found = get(tx, job_id)
        holder = tx.execute(select(job.c.writer).where(job.c.id == job_id).with_for_update()).scalar_one()
        if (writer is None and found.state == "running") or (writer is not None and writer != holder):
            raise Fenced(f"job {job_id}: a newer try writes it; this one stops")
        return _close(tx, found, ended, rest)


def _close(tx: Connection, closed: Job, ended: str, rest: str) -> int:
    freed = tx.execute(
        update(entry)
        .where(entry.c.job == closed.id, entry.c.state == "planned")
        .values(state="open", job=None, reason=rest)
    )
    tx.execute(update(job).where(job.c.id == closed.id).values(state="closed", ended=ended))
    return int(freed.rowcount)


def doubt(ledger: Ledger, queue: str, epoch: int, job_id: str) -> int:
    """The job's cursor is gone from the target: what is planned may or may not have been sent."""
    with ledger.write(queue, epoch) as tx:
        moved = tx.execute(
            update(entry)
            .where(entry.c.job == job_id, entry.c.state == "planned")
            .values(state="ambiguous", reason="the job's cursor is gone from the target")
        )
        tx.execute(update(job).where(job.c.id == job_id).values(state="closed", ended="cursor lost"))
    return int(moved.rowcount)


def segment_uris(tx: Connection, ids: Iterable[int]) -> dict[int, tuple[str, str]]:
    """Each segment's uri and file sum."""
    found: dict[int, tuple[str, str]] = {}
    for some in batched(ids, 500):
        found.update(
            {
                r.id: (r.uri, r.sha256)
                for r in tx.execute(
                    select(segment.c.id, segment.c.uri, segment.c.sha256).where(segment.c.id.in_(some))
                )
            }
        )
    return found


def _passed(job_id: str, first: int, last: int, progress: Mapping[int, int]) -> ColumnElement[bool]:
    """Deliveries of ordinals ``first`` ≤ n < ``last`` before the consuming group's position. (Written so that no index
    of places is used for it: those of all jobs lie below a position, those of a step are few.)"""
    position = case(dict(progress), value=delivery.c.part, else_=-1)
    return and_(
        delivery.c.job == job_id,
        delivery.c.ordinal >= first,
        delivery.c.ordinal < last,
        delivery.c.pos < position,
    )


def confirm_below(tx: Connection, job_id: str, first: int, last: int, progress: Mapping[int, int]) -> int:
    """Confirm what was delivered before the consuming group's position, ordinals ``first`` ≤ n < ``last``."""
    passed = (
        select(job_entry.c.entry)
        .join(delivery, (delivery.c.job == job_entry.c.job) & (delivery.c.ordinal == job_entry.c.ordinal))
        .where(_passed(job_id, first, last, progress))
    )
    return int(tx.execute(_confirm_silent.where(entry.c.id.in_(passed), entry.c.job == job_id)).rowcount)


_confirm = (
    update(entry).where(entry.c.state == "replayed").values(state="confirmed", reason="its replay succeeded")
)
_confirm_silent = _confirm.where(entry.c.reason != CONTESTED)


def confirm(tx: Connection, job_id: str, ordinals: Iterable[int]) -> int:
    """Confirm these lines of the job: somebody said so of each."""
    done = 0
    for some in batched(ordinals, 500):
        ours = select(job_entry.c.entry).where(job_entry.c.job == job_id, job_entry.c.ordinal.in_(some))
        done += tx.execute(_confirm.where(entry.c.id.in_(ours), entry.c.job == job_id)).rowcount
    return done


def awaited(tx: Connection, job_id: str, first: int, last: int, limit: int) -> dict[str, int]:
    """The keys, with their ordinals, of the first lines sent whose outcome is not known."""
    rows = tx.execute(
        select(job_entry.c.idem_key, job_entry.c.ordinal)
        .join(entry, (entry.c.id == job_entry.c.entry) & (entry.c.job == job_entry.c.job))
        .where(
            job_entry.c.job == job_id,
            job_entry.c.ordinal >= first,
            job_entry.c.ordinal < last,
            entry.c.state == "replayed",
        )
        .order_by(job_entry.c.ordinal)
        .limit(limit)
    )
    return {str(key): int(ordinal) for key, ordinal in rows}


def passed_below(tx: Connection, job_id: str, first: int, last: int, progress: Mapping[int, int]) -> int:
    """How many deliveries of the ordinals the consuming group has passed."""
    passed = select(func.count()).select_from(delivery).where(_passed(job_id, first, last, progress))
    return int(tx.execute(passed).scalar_one())


def outcomes(tx: Connection, job_id: str, first: int, last: int) -> dict[str, int]:
    """Counts by state of the entries of ordinals ``first`` ≤ n < ``last`` that this job holds."""
    rows = tx.execute(
        select(entry.c.state, func.count())
        .join(job_entry, and_(entry.c.id == job_entry.c.entry, entry.c.job == job_entry.c.job))
        .where(job_entry.c.job == job_id, job_entry.c.ordinal >= first, job_entry.c.ordinal < last)
        .group_by(entry.c.state)
    )
    return {str(state): int(n) for state, n in rows}


def record_decision(
    tx: Connection,
    queue: str,
    who: str,
    kind: str,
    subject: str,
    saw: str,
    choice: str,
    drain: str | None = None,
) -> int:
    """Write a decision down: who, when, what they saw, what they chose."""
    return int(
        tx.execute(
            insert(decision)
            .values(
                queue=queue,
                at=clock.now(),
                who=who,
                kind=kind,
                subject=subject,
                saw=saw,
                choice=choice,
                drain=drain,
            )
            .returning(decision.c.id)
        ).scalar_one()
    )
