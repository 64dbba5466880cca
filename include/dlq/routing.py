"""Isolate the queue: pause auto-DLQ routing under a lease of the orchestrator's, and give it back."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import select

from dlq import clock
from dlq.drain import Drain
from dlq.ledger.schema import drain as drains
from dlq.orchestrator import Orchestrator, OrchestratorError, RoutingHeld


def isolate(drain: Drain, seconds: float) -> dict[str, Any]:
    """Pause routing for ``seconds``; it comes back by itself. Always succeeds: custody needs no isolation."""
    orchestrator = drain.orchestrator
    if orchestrator is None:
        return _said(
            drain,
            "isolate",
            "none",
            "isolation: none, no orchestrator is configured; the queue may grow while it is drained",
        )
    if drain.dry_run:
        return _said(drain, "isolate", "none", "dry run: routing would be paused")
    drain.phase("isolate")
    try:
        if "routing" not in orchestrator.capabilities():
            return _said(
                drain, "isolate", "none", "isolation: none, the orchestrator can't pause its routing"
            )
        try:
            lease = orchestrator.pause_routing(drain.id, max(1, round(seconds)))
        except RoutingHeld:
            if not _end_an_earlier_pause(drain, orchestrator):
                raise
            lease = orchestrator.pause_routing(drain.id, max(1, round(seconds)))
    except OrchestratorError as error:
        return _said(drain, "isolate", "none", f"isolation: none, {error}", level="warning")
    until = clock.iso(datetime.fromtimestamp((lease.until_ms or 0) / 1000, UTC))
    return _said(
        drain,
        "isolate",
        "routing",
        f"auto-DLQ routing is paused until {until}, failures are held by the orchestrator",
        until=until,
    )


def _end_an_earlier_pause(drain: Drain, orchestrator: Orchestrator) -> bool:
    """Give back what an earlier drain of this queue paused and could not give back: who holds the queue now is ours."""
    holder = orchestrator.routing().holder
    with drain.ledger.read() as tx:
        ours = select(drains.c.id).where(drains.c.id == holder, drains.c.queue == drain.queue)
        earlier = tx.execute(ours).scalar()
    if earlier is None:
        return False
    orchestrator.resume_routing(earlier)
    said = f"{earlier} is over and had left routing paused: it is given back"
    drain.note("isolate", said, level="warning")
    return True


def extend_isolation(drain: Drain, seconds: float) -> None:
    """Hold the pause for ``seconds`` more, where there is one of ours: each stage extends it to its own deadline.

    A stage that is told to stop may still begin while routing is given back: what it paused after that it gives back.
    """
    orchestrator = drain.orchestrator
    noted = drain.noted("isolate")
    if (
        orchestrator is None
        or drain.dry_run
        or noted is None
        or noted.get("isolation") != "routing"
        or drain.noted("restore_routing") is not None
    ):
        return
    try:
        orchestrator.pause_routing(drain.id, max(1, round(seconds)))
        if drain.noted("restore_routing") is not None:
            orchestrator.resume_routing(drain.id)
    except OrchestratorError as error:
        drain.note("extend_isolation", f"the pause could not be extended: {error}", level="warning")


def restore_routing(drain: Drain) -> dict[str, Any]:
    """Give routing back.

    :raises OrchestratorError: when the orchestrator can't be reached; a retry, or the lease's own end, gives it back.
    """
    orchestrator = drain.orchestrator
    if orchestrator is None or drain.dry_run or "routing" not in orchestrator.capabilities():
        return {"restored": True, **_said(drain, "restore_routing", "none", "routing was never paused")}
    drain.phase("restore_routing")
    # Said before it is done: who extends the pause looks again afterwards.
    _said(drain, "restore_routing", "routing", "auto-DLQ routing is being given back", restored=False)
    try:
        lease = orchestrator.resume_routing(drain.id)
    except RoutingHeld as held:
        said = f"not this drain's to give back: {held}"
        told = _said(drain, "restore_routing", "none", said, level="warning", restored=True)
        return {"restored": True, **told}
    return {
        "restored": not lease.paused,
        **_said(
            drain,
            "restore_routing",
            lease.mode,
            f"auto-DLQ routing is {lease.mode} again",
            restored=not lease.paused,
        ),
    }


def _said(
    drain: Drain, stage: str, isolation: str, said: str, *, level: Any = "info", **data: Any
) -> dict[str, Any]:
    drain.note(stage, said, level=level, isolation=isolation, **data)
    return {"isolation": isolation, "until": data.get("until"), "said": said}
