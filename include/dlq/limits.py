"""The guard against data loss: past a number of entries nothing is replayed before the archive was read back
in full.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import select

from dlq.drain import Drain
from dlq.entry import payload_sha
from dlq.errors import ArchiveError
from dlq.ledger.schema import entry, segment
from dlq.notify import notify


def guard_data_loss(drain: Drain) -> dict[str, Any]:
    """Whether more is outstanding than ``limits.dr``: then the disaster-recovery plan comes first."""
    depth, unsettled, limit = drain.depth().entries, drain.unsettled(), drain.config.limits.dr
    over = depth + unsettled > limit
    after = "invoke_dr_plan" if over else "within_limits"
    said = f"{depth + unsettled} outstanding ({unsettled} in custody, {depth} in the queue), the limit is {limit}"
    drain.note(
        "guard_data_loss",
        said + (": the disaster-recovery plan is invoked" if over else ""),
        level="warning" if over else "info",
        next=after,
    )
    return {"outstanding": depth + unsettled, "limit": limit, "next": after, "said": said}


def forbids(drain: Drain) -> str | None:
    """Why nothing may be replayed now: the start probe failed, or the guard asked for a go-ahead that was refused, or
    was not given yet. None where nothing speaks against it.
    """
    if (why := not_started(drain)) is not None:
        return why
    choice = (drain.noted("approve_dr") or {}).get("choice")
    if choice == "Reject":
        return "going on was rejected"
    if choice == "Approve" or (drain.noted("guard_data_loss") or {}).get("next") != "invoke_dr_plan":
        return None
    return "more is outstanding than limits.dr, and nobody said to go on (approve_dr)"


def not_started(drain: Drain) -> str | None:
    """Why this drain replays nothing although it goes on with all else: its start probe failed. None: it may."""
    start = drain.noted("start_probe")
    return None if start is None or start["passed"] else str(start["why"])


def invoke_dr_plan(drain: Drain) -> dict[str, Any]:
    """Read the archive of everything unsettled back in full and call for help, before anything is replayed.

    :raises ArchiveError: when a segment is missing or changed: nothing may be replayed from it.
    """
    if drain.dry_run:
        return {
            "verified_segments": 0,
            "verified_entries": 0,
            "said": "dry run: the archive would be read back in full",
        }
    drain.phase("invoke_dr_plan")
    with drain.ledger.read() as tx:
        needed = (
            select(entry.c.segment)
            .where(entry.c.queue == drain.queue, entry.c.settled_drain.is_(None))
            .distinct()
        )
        segments = tx.execute(
            select(segment.c.id, segment.c.uri, segment.c.sha256).where(segment.c.id.in_(needed))
        ).all()
    verified = 0
    for one in segments:
        table, _ = drain.archive.verified(one.uri, one.sha256, ("key", "value"))
        keys, values = table["key"].to_pylist(), table["value"].to_pylist()
        with drain.ledger.read() as tx:
            expected = tx.execute(
                select(entry.c.row_no, entry.c.payload_sha).where(
                    entry.c.segment == one.id, entry.c.settled_drain.is_(None)
                )
            ).all()
        for row_no, sha in expected:
            if row_no >= len(keys) or payload_sha(keys[row_no], values[row_no]) != sha:
                raise ArchiveError(
                    f"archive: segment {one.uri}, row {row_no} is not what the ledger says; restore the "
                    "archive from a backup before any replay"
                )
        verified += len(expected)
    said = f"backup verified: {verified} entries in {len(segments)} segments read back, every sum right"
    delivered, how = notify(
        drain,
        f"DLQ {drain.queue}: disaster-recovery plan invoked",
        f"{drain.unsettled()} entries unsettled. {said}. Restore: dlq restore {drain.queue} --help",
    )
    drain.note(
        "invoke_dr_plan",
        f"{said}. Escalation: {how}",
        level="warning",
        verified=verified,
        delivered=delivered,
    )
    return {
        "verified_segments": len(segments),
        "verified_entries": verified,
        "escalated": delivered,
        "said": said,
    }
