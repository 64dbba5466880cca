"""The orchestrator of a queue's workflows, as the drain knows it: somebody else's program, behind HTTP.

The contract is docs/orchestrator.md. It comes in levels; ask :meth:`Orchestrator.capabilities` first, and
leave out, saying so, what a missing level makes impossible.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Protocol

from pydantic import Field

from dlq.errors import DlqError

Level = Literal["outcome", "failures", "replay", "routing", "quotas", "plugins", "debugger", "faults"]


@dataclass(frozen=True)
class OutcomeState:
    """What became of one replay, by the value of its header ``dlq-key``.

    ``succeeded`` is final. ``failed``: its newest run failed, and the dead letter of that is in the DLQ.
    ``pending``: being run. ``unknown``: not read yet, or never sent: neither success nor failure.
    """

    state: Literal["succeeded", "failed", "pending", "unknown"]
    failed_at_ms: Annotated[int | None, Field(validation_alias="failed_at")] = None


@dataclass(frozen=True)
class StepState:
    """One step of a workflow; ``attempts`` counts its tries over all runs."""

    name: str
    plugin: str
    tool: str
    state: Literal["succeeded", "failed"]
    attempts: int
    output: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class WorkflowFailure:
    """Why a workflow's newest run failed; holds no payload, but is untrusted text."""

    error_type: str
    message: str
    component: str
    stage: str
    attempts: int
    failed_at_ms: Annotated[int, Field(validation_alias="failed_at")]


@dataclass(frozen=True)
class FailedWorkflow(WorkflowFailure):
    """A workflow whose newest run failed, for dead letters that don't say why."""

    workflow: str | None = None
    trace_id: str | None = None
    retry_count: int = 0


@dataclass(frozen=True)
class WorkflowState:
    """A workflow as its newest run left it; steps not reached are not listed."""

    correlation_id: str
    state: Literal["pending", "succeeded", "failed"]
    workflow: str | None = None
    retry_count: int = 0
    trace_id: str | None = None
    duplicate_of: str | None = None
    steps: tuple[StepState, ...] = ()
    failure: WorkflowFailure | None = None


@dataclass(frozen=True)
class SuccessRate:
    """Distinct workflows that ended within the window, by their last state."""

    succeeded: int
    failed: int
    total: int
    window_s: int

    @property
    def rate(self) -> float | None:
        """Succeeded ÷ total; None where nothing ended."""
        return self.succeeded / self.total if self.total else None


@dataclass(frozen=True)
class RoutingLease:
    """Whether failures are dead-lettered, and who paused that until when (epoch ms).

    ``held`` failures wait, durably, for the lease's end; ``undeliverable`` ones are kept because the DLQ
    takes no record of their size.
    """

    mode: Literal["auto", "paused"]
    holder: str | None = None
    until_ms: Annotated[int | None, Field(validation_alias="until")] = None
    held: int = 0
    undeliverable: int = 0

    @property
    def paused(self) -> bool:
        return self.mode == "paused"


@dataclass(frozen=True)
class Quota:
    """What a plugin, a tool (``payments.charge``) or a tenant (``tenant:acme``) may use; ``plugin`` names it and
    ``resource`` the unit. ``peak_need`` is the most that was asked for.
    """

    plugin: str
    resource: str
    limit: int
    ceiling: int
    peak_need: int = 0
    rejected: int = 0


@dataclass(frozen=True)
class Replay:
    """A workflow to be run again. ``key`` is the header ``dlq-key`` its outcome is asked for by: the same key is put
    into the origin once. ``value`` replaces the record's (an approved edit); ``headers`` are ours (``dlq-…``).
    """

    correlation_id: str
    key: str
    retry_count: int
    value: bytes | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Replayed:
    """What the orchestrator said to a :class:`Replay`; ``why`` it refused is a short code."""

    state: Literal["accepted", "refused"]
    why: str | None = None


@dataclass(frozen=True)
class Circuit:
    """A plugin's circuit breaker; an open one lets a probe through from ``until_ms`` (epoch) on."""

    state: Literal["closed", "open", "half_open"]
    until_ms: Annotated[int | None, Field(validation_alias="until")] = None


@dataclass(frozen=True)
class Violation:
    """Calls of a plugin that reached for a scope it doesn't declare."""

    scope: str
    count: int
    last_at_ms: Annotated[int | None, Field(validation_alias="last_at")] = None


@dataclass(frozen=True)
class Plugin:
    """A plugin as it runs now. ``grantable`` scopes may be declared, beside those that are; ``revision`` counts its
    changes, whoever made them.
    """

    name: str
    version: str
    scopes: tuple[str, ...]
    circuit: Circuit
    revision: int
    versions: tuple[str, ...] = ()
    grantable: tuple[str, ...] = ()
    disabled: bool = False
    violations: tuple[Violation, ...] = ()


@dataclass(frozen=True)
class PluginPatch:
    """A change of a plugin, made by a named person (or policy) for a reason, of the revision that was looked at."""

    revision: int
    person: str
    reason: str
    scopes: tuple[str, ...] | None = None
    version: str | None = None
    disabled: bool | None = None


class OrchestratorError(DlqError):
    """The orchestrator could not do what was asked; the message names the address and what to do."""


class OrchestratorUnreachable(OrchestratorError):
    """No answer, or only 5xx, after some tries: a later try may help."""


class OrchestratorBusy(OrchestratorUnreachable):
    """It asks to be left alone (429, or 503 with Retry-After), for :attr:`retry_after_s` seconds where it says so."""

    def __init__(self, message: str, retry_after_s: float | None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class OrchestratorUnauthorized(OrchestratorError):
    """The token was refused. A retry can't heal it."""


class ContractBroken(OrchestratorError):
    """The answer is not what the contract says. A retry can't heal it."""


class CapabilityMissing(OrchestratorError):
    """The orchestrator doesn't keep that level of the contract; :attr:`level` names it."""

    def __init__(self, url: str, level: Level) -> None:
        super().__init__(
            f"The orchestrator at {url} doesn't offer the level {level!r} of the contract: ask "
            "capabilities() first and leave the stage out, or add the level there (docs/orchestrator.md)."
        )
        self.level = level


class RoutingHeld(OrchestratorError):
    """Another holder's routing lease is live; it ends by itself."""


class AboveCeiling(OrchestratorError):
    """The limit asked for is above the quota's ceiling, :attr:`ceiling`. A retry can't heal it."""

    def __init__(self, message: str, ceiling: int) -> None:
        super().__init__(message)
        self.ceiling = ceiling


class PluginChanged(OrchestratorError):
    """The plugin was changed since it was looked at: look again."""


class Orchestrator(Protocol):
    """What the drain asks of an orchestrator. Every call may raise `OrchestratorError`.

    Levels: *outcome* (outcomes, submit_workflow, workflow, success_rate), *failures*, *replay*, *routing*, *quotas*,
    *plugins*, *faults*; a call of a level that is not offered raises `CapabilityMissing`.
    """

    def capabilities(self) -> frozenset[str]:
        """The levels offered now."""

    def outcomes(self, keys: Sequence[str]) -> dict[str, OutcomeState]:
        """What became of the replays with these keys (header ``dlq-key``): one state for each."""

    def submit_workflow(self, document: Mapping[str, Any], correlation_id: str) -> None:
        """Have a workflow run, under this correlation id; repeating the call does not run it again."""

    def workflow(self, correlation_id: str) -> WorkflowState | None:
        """A workflow's state; None where it was never seen."""

    def failures(self, correlation_ids: Sequence[str]) -> dict[str, FailedWorkflow]:
        """Those of the workflows whose newest run failed, and why; what is left out is not known to have failed."""

    def success_rate(self, window_s: int) -> SuccessRate:
        """How many workflows ended well in the last ``window_s`` seconds."""

    def routing(self) -> RoutingLease:
        """Whether failures are dead-lettered now."""

    def pause_routing(self, holder: str, seconds: int) -> RoutingLease:
        """Hold failures, those of replays excepted, for at least so many seconds from now; again: extend it.

        :raises RoutingHeld: another holder's lease is live.
        """

    def resume_routing(self, holder: str) -> RoutingLease:
        """End one's own pause. Not paused: nothing to do.

        :raises RoutingHeld: another holder's lease is live.
        """

    def quotas(self) -> list[Quota]:
        """The plugins' quotas."""

    def set_quota(self, plugin: str, limit: int, idempotency_key: str, resource: str = "memory_mb") -> Quota:
        """Change a limit of a plugin, tool or tenant for the next call on.

        :raises AboveCeiling: the orchestrator doesn't allow so much.
        """

    def replay_workflows(self, replays: Sequence[Replay]) -> dict[str, Replayed]:
        """Have workflows run again; an answer for each key. A repeated key is not put in twice."""

    def plugins(self) -> list[Plugin]:
        """The plugins as they run now."""

    def patch_plugin(self, name: str, patch: PluginPatch, idempotency_key: str) -> Plugin:
        """Change a plugin for its next call on.

        :raises PluginChanged: it is not at the revision the patch was made for.
        """

    def inject_fault(self, name: str, plugin: str, error: str, seconds: float) -> None:
        """Have every call of a plugin fail with ``error``, for so long at most; in place of a fault of that name."""

    def end_fault(self, name: str) -> None:
        """End a fault. None of that name: nothing to do."""

    def close(self) -> None: ...
