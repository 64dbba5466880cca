"""The first half of a chaos run: one fault after the other, each until its workflows are dead letters."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import select

from dlq.chaos import origin
from dlq.chaos.faults import Fault, made, require_target
from dlq.drain import Drain
from dlq.errors import ConfigError
from dlq.flows import flows_of
from dlq.golden import GoldenFlow
from dlq.ledger.schema import event
from dlq.orchestrator import Orchestrator

STAGE = "chaos"
_POLL_S = 0.2
_MARGIN_S = 60.0


@dataclass(frozen=True)
class Injected:
    """What one fault did: of ``workflows`` like its golden flow, ``failed`` were dead-lettered within ``seconds``.

    ``skipped`` says why it was not injected.
    """

    fault: str
    flow: str
    workflows: int
    failed: int = 0
    seconds: float = 0.0
    skipped: str | None = None

    def __str__(self) -> str:
        if self.skipped:
            return f"{self.fault}: not injected: {self.skipped}"
        return (
            f"{self.fault}: {self.failed} of {self.workflows} workflows dead-lettered in {self.seconds:.1f} s"
        )


@dataclass(frozen=True)
class Experiment:
    """A fault with the workflows it is to break."""

    name: str
    fault: Fault
    flow: GoldenFlow
    correlation_ids: tuple[str, ...]
    corrupt: bool


def inject(drain: Drain) -> list[Injected]:
    """Break, let fail, stop breaking, fault by fault. A run that was cut short goes on where it was.

    :raises Refused: the queue is no chaos target.
    :raises ConfigError: a fault, flow or plugin that isn't there.
    """
    chaos = require_target(drain.config)
    orchestrator = orchestrator_of(drain)
    offered = orchestrator.capabilities()
    done = []
    for one in experiments(drain):
        missing = {one.fault.level, "outcome"} - {None} - offered
        if missing:
            why = f"the orchestrator doesn't offer the level {', '.join(sorted(map(str, missing)))}"
            injected = Injected(one.name, one.flow.name, len(one.correlation_ids), skipped=why)
        elif drain.dry_run:
            injected = Injected(one.name, one.flow.name, len(one.correlation_ids), skipped="dry run")
        else:
            injected = _inject(drain, one, orchestrator, chaos.deadline)
        drain.note(STAGE, str(injected), level="info" if injected.failed else "warning", **asdict(injected))
        done.append(injected)
    return done


def experiments(drain: Drain) -> Iterator[Experiment]:
    """The faults of the queue's file, with the workflows of this run."""
    chaos = require_target(drain.config)
    orchestrator = orchestrator_of(drain)
    flows = {flow.name: flow for flow in flows_of(drain.config)}
    for name, fault in chaos.faults.items():
        if fault.flow not in flows:
            raise ConfigError(
                f"chaos.faults.{name}.flow: no golden flow {fault.flow!r}; there are: {', '.join(flows)}"
            )
        flow = flows[fault.flow]
        called = {str(step.get("plugin")) for step in flow.workflow["steps"]}
        if fault.plugin is not None and fault.plugin not in called:
            raise ConfigError(
                f"chaos.faults.{name}.plugin: the golden flow {flow.name} doesn't call {fault.plugin}, so it can't "
                f"fail by it; it calls {', '.join(sorted(called))}"
            )
        yield Experiment(
            name,
            made(fault, orchestrator, chaos.deadline + _MARGIN_S),
            flow,
            tuple(f"chaos-{name}-{drain.id}-{n}" for n in range(chaos.workflows)),
            fault.corrupt is True,
        )


def orchestrator_of(drain: Drain) -> Orchestrator:
    assert drain.orchestrator is not None  # the configuration's own check
    return drain.orchestrator


def before(drain: Drain) -> dict[str, Mapping[str, Any]]:
    """By fault, what was before this run broke it: written down first, for whoever comes later to bring it back."""
    with drain.ledger.read() as tx:
        rows = tx.execute(
            select(event.c.data)
            .where(event.c.drain == drain.id, event.c.stage == f"{STAGE}_before")
            .order_by(event.c.id.desc())
        ).scalars()
        noted = [json.loads(row) for row in rows]
    return {each["fault"]: each["before"] for each in noted}


def _inject(drain: Drain, one: Experiment, orchestrator: Orchestrator, deadline_s: float) -> Injected:
    began = time.monotonic()
    if one.name not in before(drain):
        was = one.fault.before()
        drain.note(f"{STAGE}_before", f"{one.name} begins", fault=one.name, before=was)
    one.fault.begin()
    try:
        _start(drain, one, orchestrator)
        failed = _failed(one.correlation_ids, orchestrator, began + deadline_s)
    finally:
        one.fault.stop()
    return Injected(
        one.name, one.flow.name, len(one.correlation_ids), failed, round(time.monotonic() - began, 2)
    )


def _start(drain: Drain, one: Experiment, orchestrator: Orchestrator) -> None:
    if not one.corrupt:
        for each in one.correlation_ids:
            orchestrator.submit_workflow(one.flow.workflow, each)
        return
    new = [each for each in one.correlation_ids if orchestrator.workflow(each) is None]
    records = {each: document(one.flow, each) for each in new}
    origin.put(drain, {each: whole[: len(whole) // 2] for each, whole in records.items()})


def document(flow: GoldenFlow, correlation_id: str) -> bytes:
    """A golden flow's workflow as a record of the origin."""
    return json.dumps({**flow.workflow, "correlation_id": correlation_id}).encode()


def _failed(correlation_ids: Sequence[str], orchestrator: Orchestrator, deadline: float) -> int:
    """How many have failed, once all have ended or the deadline (monotonic) is over."""
    ended: dict[str, str] = {}
    while True:
        for each in correlation_ids:
            if each not in ended and (found := orchestrator.workflow(each)) and found.state != "pending":
                ended[each] = found.state
        if len(ended) == len(correlation_ids) or time.monotonic() > deadline:
            return sum(state == "failed" for state in ended.values())
        time.sleep(_POLL_S)
