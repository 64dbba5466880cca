"""The queue's lease: one holder at a time, an epoch that fences the ones before."""

from __future__ import annotations

from datetime import datetime, timedelta

from sqlalchemy import RowMapping, func, insert, select, update

from dlq import clock
from dlq.errors import Fenced, QueueBusy
from dlq.ledger.schema import drain, entry, incident, queue
from dlq.ledger.store import Ledger, insert_rows

GRACE_S = 30.0
"""How long past a lease's end a take-over waits: clocks of two machines differ."""

LONGEST_S = 7 * 86_400.0
"""What no lease exceeds: one that ends later was taken under a wrong clock, and holds nobody off (epochs fence)."""


def known_epoch(ledger: Ledger, name: str, holder: str) -> int:
    """The epoch the ledger remembers, before ``holder`` takes the lease: what the world must not be ahead of.

    :raises QueueBusy: while another holds it.
    """
    with ledger.read() as tx:
        found = tx.execute(select(queue).where(queue.c.name == name)).mappings().first()
    if found is None:
        return 0
    _refuse_if_held(found, holder)
    return int(found["epoch"])


def _refuse_if_held(found: RowMapping, holder: str) -> None:
    held_by = found["holder"]
    if held_by and held_by != holder:
        free_at = datetime.fromisoformat(found["lease_until"]) + timedelta(seconds=GRACE_S)
        if clock.now() < clock.iso(free_at) and found["lease_until"] <= clock.after(LONGEST_S + GRACE_S):
            raise QueueBusy(
                f"queue {found['name']} is held by {held_by} until {found['lease_until']}; wait for it, or look at "
                "its run: it may be live"
            )


def acquire(
    ledger: Ledger,
    name: str,
    holder: str,
    *,
    run_id: str,
    kind: str,
    seconds: float,
    config: str,
    floor: int = 0,
) -> int:
    """Take the queue's lease for ``seconds`` and write the holder's row; returns its epoch.

    A holder that asks again (a retried task) gets a new epoch, so that its older try is fenced. ``floor`` is the
    highest epoch seen outside the ledger.

    :raises QueueBusy: while another holds it.
    """
    with ledger.write(name, None) as tx:
        insert_rows(tx, queue, ("name", "epoch"), [(name, floor)], skip_on=("name",))
        found = tx.execute(select(queue).where(queue.c.name == name).with_for_update()).mappings().one()
        _refuse_if_held(found, holder)
        epoch = max(int(found["epoch"]), floor) + 1
        tx.execute(
            update(queue)
            .where(queue.c.name == name)
            .values(epoch=epoch, holder=holder, lease_until=clock.after(min(seconds, LONGEST_S)))
        )
        unsettled = (
            select(func.count())
            .select_from(entry)
            .where(entry.c.queue == name, entry.c.settled_drain.is_(None))
            .scalar_subquery()
        )
        known = tx.execute(select(drain.c.id).where(drain.c.id == holder)).first()
        if known is None:
            current = _incident(tx, name) if kind == "drain" else None
            tx.execute(
                insert(drain).values(
                    id=holder,
                    queue=name,
                    run_id=run_id,
                    epoch=epoch,
                    kind=kind,
                    opened_at=clock.now(),
                    config=config,
                    open_before=unsettled,
                    phase="opened",
                    incident=current,
                )
            )
        else:
            # Opened again: what it took and settled before stays its own, so the account is written down anew.
            taken = (
                select(func.count()).select_from(entry).where(entry.c.taken_drain == holder).scalar_subquery()
            )
            settled = (
                select(func.count())
                .select_from(entry)
                .where(entry.c.settled_drain == holder)
                .scalar_subquery()
            )
            tx.execute(
                update(drain)
                .where(drain.c.id == holder)
                .values(
                    epoch=epoch,
                    closed_at=None,
                    verdict=None,
                    phase="opened",
                    config=config,
                    open_before=unsettled - taken + settled,
                )
            )
    return epoch


def _incident(tx, name: str) -> int:  # type: ignore[no-untyped-def]
    found = tx.execute(
        select(incident.c.id).where(incident.c.queue == name, incident.c.closed_at.is_(None))
    ).scalar()
    if found is None:
        found = tx.execute(
            insert(incident).values(queue=name, started_at=clock.now()).returning(incident.c.id)
        ).scalar_one()
    return int(found)


def extend(ledger: Ledger, name: str, epoch: int, seconds: float) -> None:
    """Hold the lease until ``seconds`` from now, never shorter than before."""
    with ledger.write(name, epoch) as tx:
        until = clock.after(min(seconds, LONGEST_S))
        tx.execute(
            update(queue).where(queue.c.name == name, queue.c.lease_until < until).values(lease_until=until)
        )


def release(ledger: Ledger, name: str, holder: str, epoch: int, verdict: str) -> None:
    """Close the holder's row and free the queue; doing it twice is fine."""
    with ledger.write(name, None) as tx:
        tx.execute(
            update(drain)
            .where(drain.c.id == holder, drain.c.epoch == epoch)
            .values(closed_at=clock.now(), verdict=verdict, phase="closed")
        )
        tx.execute(
            update(queue)
            .where(queue.c.name == name, queue.c.epoch == epoch, queue.c.holder == holder)
            .values(holder=None, lease_until=None)
        )


def held(ledger: Ledger, name: str, holder: str, epoch: int) -> None:
    """See that nobody took the queue since ``holder`` did, under ``epoch``.

    :raises Fenced: when another did.
    """
    with ledger.read() as tx:
        found = tx.execute(select(queue.c.epoch, queue.c.holder).where(queue.c.name == name)).first()
    if found is None or int(found.epoch) != epoch:
        raise Fenced(
            f"queue {name} was taken by {(found and found.holder) or 'another'} since {holder} held it: clear "
            "open_drain with its downstream to begin again"
        )
