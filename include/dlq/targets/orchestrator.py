"""Replay through the orchestrator: the runbook's ``replay_workflow(correlation_id, overrides)`` over its contract."""

from __future__ import annotations

import time
from collections.abc import Sequence

from dlq.errors import ConfigError
from dlq.ledger.custody import batched
from dlq.orchestrator import (
    CapabilityMissing,
    Orchestrator,
    OrchestratorBusy,
    OrchestratorError,
    OrchestratorUnauthorized,
    Replay,
    Replayed,
)
from dlq.ports import Delivered, Output, Refusal
from dlq.targets.untransacted import Untransacted

_AT_ONCE = 100  # the runbook's batch
_PAUSE_S = 1.0
_OURS = "dlq-"
_ITS_OWN = ("dlq-key", "dlq-retry-count")

_REMEMBERED_S = 23 * 3600.0
"""So long a key that was accepted is put in no more: the contract's day, less an hour for calls and clocks."""


class OrchestratorReplay(Untransacted):
    """The target adapter for a queue's own orchestrator. Outcomes are asked of it, too."""

    def __init__(self, orchestrator: Orchestrator) -> None:
        self._orchestrator = orchestrator

    def preflight(self) -> list[str]:
        try:
            levels = self._orchestrator.capabilities()
        except OrchestratorError as error:
            return [str(error)]
        return [
            f"the orchestrator doesn't offer the level {level!r} of the contract: offer it there "
            "(docs/orchestrator.md), or let target.kind be kafka or sqs"
            for level in ("replay", "outcome")
            if level not in levels
        ]

    def findings(self, _source: str) -> list[str]:
        return []

    def sender(self, _topic: str) -> OrchestratorSender:
        return OrchestratorSender(self._orchestrator)

    def digested(self, _topic: str, _source: str) -> float | None:
        return None

    def close(self) -> None:
        """The orchestrator's client is the drain's."""


class OrchestratorSender:
    """Asks for replays, a hundred a call. The bytes that were planned go with each: what was approved is run."""

    again_s = _REMEMBERED_S

    def __init__(self, orchestrator: Orchestrator) -> None:
        self._orchestrator = orchestrator

    def lane(self, _output: Output) -> str | None:
        return None

    def waves(self, outputs: Sequence[Output]) -> list[list[Output]]:
        return [list(outputs)]

    def _ask(self, replays: Sequence[Replay], deadline: float) -> dict[str, Replayed]:
        """A repeated key is put in once, so one that is busy is asked again when it said, if that is in time."""
        while True:
            try:
                return self._orchestrator.replay_workflows(replays)
            except OrchestratorBusy as busy:
                pause_s = busy.retry_after_s or _PAUSE_S
                if time.monotonic() + pause_s > deadline:
                    raise
                time.sleep(pause_s)

    def send(self, outputs: Sequence[Output], deadline: float) -> list[Delivered | Refusal]:
        done: list[Delivered | Refusal] = []
        going: list[tuple[Output, Replay]] = []
        for output in outputs:
            if output.correlation_id is None:
                done.append(Refusal(output.ordinal, "refused:no_correlation_id"))
            else:
                going.append((output, _replay(output, output.correlation_id)))
        for some in batched(going, _AT_ONCE):
            if time.monotonic() > deadline:
                break
            try:
                said = self._ask([replay for _, replay in some], deadline)
            except (CapabilityMissing, OrchestratorUnauthorized) as error:
                if done:
                    break
                raise ConfigError(f"target: nothing can be replayed: {error}") from error
            except OrchestratorError:
                break  # no answer: it may have taken them, and takes them once
            for output, replay in some:
                answer = said[replay.key]
                done.append(
                    Delivered(output.ordinal, None, None)
                    if answer.state == "accepted"
                    else Refusal(output.ordinal, f"refused:{answer.why or 'unknown'}"[:80])
                )
        return done


def _replay(output: Output, correlation_id: str) -> Replay:
    ours = {name: (value or b"").decode() for name, value in output.headers if name.startswith(_OURS)}
    return Replay(
        correlation_id,
        ours["dlq-key"],
        int(ours["dlq-retry-count"]),
        output.value,
        {name: value for name, value in ours.items() if name not in _ITS_OWN},
    )
