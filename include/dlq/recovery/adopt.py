"""Adopt a source: the topic was recreated, truncated or is another one now, and a person says that this is right."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import select

from dlq.archive import Archive
from dlq.config import QueueConfig
from dlq.drain import Drain, drain_id
from dlq.errors import Refused
from dlq.ledger import Ledger, custody, lease
from dlq.ledger.behind import refuse_if_behind
from dlq.ledger.jobs import record_decision
from dlq.ledger.schema import source
from dlq.ports import Connections

_LEASE_S = 120.0


@dataclass(frozen=True)
class Adopted:
    """The source that was, the one that is, and where each partition's next intake begins."""

    was: str
    now: str
    positions: dict[int, int]


def adopt_source(config: QueueConfig, *, who: str, run_id: str, connections: Connections) -> Adopted:
    """Let the queue start anew by ``source.start``. What is in custody of the old source stays.

    What the new one holds now waits for a decision, like any first intake: of a truncated topic it may be in custody
    already.

    :raises Refused: when the queue is the one the ledger knows, or the ledger itself is behind.
    """
    ledger = Ledger.open(config.ledger)
    identity = drain_id(config.name, run_id)
    drain = Drain(identity, config, ledger, connections, epoch=-1, kind="cli")
    try:
        archive = Archive(config.archive, config.name)
        refuse_if_behind(ledger, archive, config.name)
        was, now = _change(drain)
        drain.epoch = lease.acquire(
            ledger,
            config.name,
            identity,
            run_id=run_id,
            kind="cli",
            seconds=_LEASE_S,
            config=config.frozen(),
        )
        verdict = "failed"
        try:
            archive.claim_epoch(drain.epoch, ledger.id, identity)
            drain.source.uri = now
            with ledger.read() as tx:
                row = custody.find_source(tx, now)
                held = {} if row is None else custody.positions(tx, row)
            first = {p: span for p, span in drain.source.first().items() if p not in held}
            positions = {**held, **{part: start for part, (start, _) in first.items()}}
            # The queue first: told but not written down here, the next try finds the same and does it again.
            drain.source.remember(positions, ledger.id, drain.epoch)
            with ledger.write(config.name, drain.epoch) as tx:
                row = custody.adopt(tx, config.name, now)
                custody.begin(tx, row, identity, first)
                record_decision(
                    tx,
                    config.name,
                    who,
                    "adopt_source",
                    now,
                    f"it was {was}",
                    "start anew by source.start",
                    identity,
                )
            drain.note("adopt_source", f"the queue was {was} and is {now} now", positions=positions)
            verdict = "done"
        finally:
            lease.release(ledger, config.name, identity, drain.epoch, verdict)
    finally:
        drain.close()
    return Adopted(was, now, positions)


def _change(drain: Drain) -> tuple[str, str]:
    """What the queue's source was, and what it is to be called.

    :raises Refused: where nothing changed.
    """
    now = drain.source.uri
    with drain.ledger.read() as tx:
        was = tx.execute(
            select(source.c.uri).where(source.c.queue == drain.queue, source.c.retired_at.is_(None))
        ).scalar()
    if was is None:
        raise Refused(
            f"queue {drain.queue} was never drained by this ledger: there is nothing to adopt, just run a drain"
        )
    if was != now:
        return str(was), now
    positions = drain.positions()
    truncated = [p for p, (_, end) in drain.source.first().items() if positions.get(p, 0) > end]
    if not truncated:
        raise Refused(
            f"queue {drain.queue} is still {was}, and no partition ends before its position: "
            "there is nothing to adopt. To go on, just run a drain"
        )
    base, _, number = now.partition("#")
    return str(was), f"{base}#{int(number or 1) + 1}"
