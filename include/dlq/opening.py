"""Open a drain: take the queue's lease, see that the world is as the ledger remembers it, finish what others left."""

from __future__ import annotations

from sqlalchemy import select

from dlq.archive import Archive
from dlq.config import QueueConfig
from dlq.drain import Drain, drain_id
from dlq.errors import ConfigError, Refused
from dlq.fixes import take_back_untried
from dlq.grouping.taxonomy import load_taxonomy
from dlq.jobs import CursorLost
from dlq.ledger import Ledger, custody, jobs, lease
from dlq.ledger.behind import refuse_if_behind
from dlq.ledger.schema import job, plan, source
from dlq.ports import Connections
from dlq.probes import start_probe
from dlq.sending import running

LEASE_S = 300.0
"""How long a lease lasts from the moment a stage takes or extends it without naming a deadline."""


def open_drain(
    config: QueueConfig,
    *,
    run_id: str,
    kind: str = "drain",
    connections: Connections,
    lease_s: float = LEASE_S,
) -> Drain:
    """Take the queue's lease, see that the world is as the ledger remembers it, and finish what earlier holders left.

    :raises QueueBusy: while another holder lives.
    :raises Refused: when a memory was lost or doubled (law 10).
    :raises ConfigError: when a file, Connection or topic is wrong.
    """
    rules = load_taxonomy()  # nobody is to learn in mid-drain that it can't be used
    identity = drain_id(config.name, run_id)
    ledger = Ledger.open(config.ledger)
    archive = Archive(config.archive, config.name)
    known = lease.known_epoch(ledger, config.name, identity)
    refuse_if_behind(ledger, archive, config.name)
    # Before the lease is taken: a refused opening must not bring an old ledger's epoch up to the world's.
    drain = Drain(identity, config, ledger, connections, epoch=known, kind=kind)
    try:
        with ledger.read() as tx:
            known_as = select(source.c.uri).where(
                source.c.queue == config.name, source.c.retired_at.is_(None)
            )
            living = tx.execute(known_as).scalar()
        if (
            living is None or living.partition("#")[0] == drain.source.uri
        ):  # another source is refused below, with what to do
            _check(drain, known)
    except BaseException:
        drain.close()
        raise
    epoch = lease.acquire(
        ledger,
        config.name,
        identity,
        run_id=run_id,
        kind=kind,
        seconds=lease_s,
        config=config.frozen(),
    )
    drain.epoch = epoch
    try:
        archive.claim_epoch(epoch, ledger.id, identity)
        drain.note("opened", f"epoch {epoch} of queue {config.name}, configuration {config.sha}", epoch=epoch)
        with ledger.write(config.name, epoch) as tx:
            custody.source_id(tx, config.name, drain.source.uri)
        findings = _check(drain, epoch)
        _preflight(drain)
        start_probe(drain)
        for finding in [*findings, *drain.target.findings(drain.source.uri), *rules.findings]:
            drain.note("open_drain", finding, level="warning")
        orphans = custody.register_orphans(ledger, archive, config.name, epoch)
        if orphans:
            drain.note(
                "open_drain",
                f"{orphans} segment(s) without rows, left by a crash, were registered; their entries are read again",
            )
        finish_earlier(drain)
        take_back_untried(drain)
    except BaseException:
        lease.release(ledger, config.name, identity, epoch, "refused")
        drain.close()
        raise
    return drain


def _check(drain: Drain, epoch: int) -> list[str]:
    """What the queue remembers against the ledger's positions; those of now, where an older holder moves them still."""
    while True:
        positions = drain.positions()
        try:
            return drain.source.check(positions, drain.ledger.id, epoch)
        except Refused:
            if drain.positions() == positions:
                raise


def _preflight(drain: Drain) -> None:
    """Look at the target before anything leaves the queue.

    :raises ConfigError: naming the field and the fix.
    """
    target = drain.config.target
    problems = drain.target.preflight()
    if problems:
        raise ConfigError(f"queue {drain.queue}: target ({target.connection}): " + "; ".join(problems))


def finish_earlier(drain: Drain) -> None:
    """Settle what earlier holders left: fence their writers, read the cursors, open the rest again.

    An earlier life of this drain is one of them: opened again it decides anew, and would look for no job of then.
    """
    with drain.ledger.read() as tx:
        left = jobs.find(tx, job.c.queue == drain.queue, job.c.state != "closed")
        proposed = tx.execute(
            select(plan.c.id).where(
                plan.c.queue == drain.queue,
                plan.c.decision.is_(None),
                plan.c.withdrawn_at.is_(None),
                plan.c.stage != "review",
            )
        ).scalars()
        ids = list(proposed)
    for plan_id in ids:
        jobs.withdraw(drain.ledger, drain.queue, drain.epoch, plan_id)
    for one in (j for j in left if j.state in ("approved", "running")):
        try:
            with running(drain, one.id) as run:
                freed = run.close(jobs.CLOSED_LATER, one.rest("ready"))
                drain.note(
                    "open_drain",
                    f"job {one.id} was left unfinished: {run.cursor} of {one.size} were sent, {freed} are open again",
                    level="warning",
                )
        except (ConfigError, CursorLost, jobs.PlanStale, Refused) as lost:
            drain.note("open_drain", str(lost), level="error")
