"""Whether the ledger is older than the world, or another's: by the marks left in the archive (law 10).

Each holder's epoch, and each plan before its first output, is written there before use; a ledger that doesn't know of
one was lost, restored from a backup, or is a second one.
"""

from __future__ import annotations

from sqlalchemy import func, select

from dlq.archive import Archive
from dlq.errors import Refused
from dlq.ledger.schema import plan, queue, segment
from dlq.ledger.store import Ledger


def behind(ledger: Ledger, archive: Archive, name: str) -> str | None:
    """What the archive knows of queue ``name`` and this ledger doesn't, in words; None where nothing is.

    :raises ArchiveError: when a mark can't be read.
    """
    newest, plans = archive.newest_epoch(), archive.newest_plans()
    with ledger.read() as tx:
        known = int(tx.execute(select(queue.c.epoch).where(queue.c.name == name)).scalar() or 0)
        approved = {
            str(row.id): str(row.hash)
            for row in tx.execute(
                select(plan.c.id, plan.c.hash).where(plan.c.id.in_(list(plans)), plan.c.decision.is_not(None))
            )
        }
    if newest is not None and newest[1] != ledger.id:
        return f"the archive was last used by ledger {newest[1]}, this is {ledger.id}"
    if newest is not None and newest[0] > known:
        return f"the archive knows epoch {newest[0]}, the ledger {known}"
    for plan_id, digest in plans.items():
        if approved.get(plan_id) != digest:
            return f"the archive knows plan {plan_id} ({digest[:12]}), the ledger doesn't"
    return None


def refuse_if_behind(ledger: Ledger, archive: Archive, name: str) -> None:
    """:raises Refused: when the ledger is behind, or the archive is not its own; the message says what to do."""
    if (why := behind(ledger, archive, name)) is not None:
        raise Refused(
            f"queue {name}: {why}: the ledger is new, a second one, or was restored from an older backup. Point the "
            f"queue's file at the right ledger; if that one is lost, run `dlq ledger rebuild {name}`: it adopts what "
            "the archive has, as in doubt"
        )
    if archive.newest_epoch() is None:
        with ledger.read() as tx:
            ours = segment.c.queue == name, segment.c.purged_at.is_(None)
            known = tx.execute(select(func.count()).select_from(segment).where(*ours)).scalar_one()
        if known:
            raise Refused(
                f"queue {name}: the archive {archive.root} is empty, the ledger knows {known} segment(s) of it: it is "
                "not mounted, or archive: in the queue's file names another place. Bring it back before anything else"
            )
