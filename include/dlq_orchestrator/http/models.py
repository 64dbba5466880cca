"""The contract's bodies."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from dlq_orchestrator.injection import Error
from dlq_orchestrator.replays import Refused

Name = Annotated[str, Field(min_length=1, max_length=200)]
EpochMs = Annotated[int, Field(description="epoch milliseconds")]
Level = Literal["outcome", "failures", "replay", "quotas", "plugins", "debugger", "routing", "faults"]
Resource = Literal["memory_mb", "calls_per_s", "concurrency"]
State = Literal["pending", "succeeded", "failed"]


class Body(BaseModel):
    """What is sent: a text is no number, and a truth none either."""

    model_config = ConfigDict(strict=True)


class Problem(BaseModel):
    """An error (RFC 9457)."""

    model_config = ConfigDict(extra="allow")

    type: str = "about:blank"
    title: str
    status: int
    detail: str


class Capabilities(BaseModel):
    """Which levels of the contract this orchestrator keeps."""

    version: str = Field(description="the contract's version, major.minor", examples=["1.2"])
    levels: list[Level]


class Health(BaseModel):
    status: Literal["ok"]


class OutcomeQuery(Body):
    keys: list[Annotated[str, Field(min_length=1, max_length=500)]] = Field(
        max_length=1000, description="values of the header `dlq-key`, or of `key` in the attribute `dlq`"
    )


class Outcome(BaseModel):
    """What became of one replay."""

    state: Literal["succeeded", "failed", "pending", "unknown"]
    failed_at: EpochMs | None = None


class Outcomes(BaseModel):
    outcomes: dict[str, Outcome] = Field(description="one for each key that was asked for")


class StepDocument(Body):
    model_config = ConfigDict(extra="allow")

    name: Name
    plugin: Name
    tool: Name
    args: dict[str, Any] = {}


class WorkflowDocument(Body):
    """A workflow to run: the value of its record on the origin topic."""

    model_config = ConfigDict(extra="allow")

    workflow: Name
    correlation_id: Name
    steps: list[StepDocument] = Field(min_length=1, max_length=100)


class Submitted(BaseModel):
    """Where the submitted workflow lies: topic, partition and offset, or queue and message id."""

    correlation_id: str
    topic: str | None = None
    partition: int | None = None
    offset: int | None = None
    queue: str | None = None
    message_id: str | None = None


class WorkflowFailure(BaseModel):
    error_type: str
    message: str
    component: str = Field(description="plugin.tool")
    stage: str = Field(description="the step's name")
    attempts: int = Field(description="tries in the run that failed")
    failed_at: EpochMs


class WorkflowStep(BaseModel):
    name: str
    plugin: str
    tool: str
    state: Literal["succeeded", "failed"]
    attempts: int = Field(description="tries over all runs")
    input: dict[str, Any] | None = Field(None, description="its arguments, of the newest run")
    output: dict[str, Any] | None = None


class KnownReplay(BaseModel):
    """A replay that was accepted."""

    key: str
    retry_count: int
    at: EpochMs
    by: str | None = Field(description="the person in the debugger; null: `POST /v1/replays`")


class KnownOverride(BaseModel):
    """A step's input or output that a person replaced."""

    step: str
    input: dict[str, Any] | None = None
    output: dict[str, Any] | None = None
    person: str
    reason: str
    at: EpochMs


class WorkflowState(BaseModel):
    """A workflow as its last run left it; steps that were not reached are not listed."""

    correlation_id: str
    workflow: str | None = Field(description="null where the record could not be read")
    state: State
    retry_count: int = Field(description="how often it had been replayed before its last run")
    trace_id: str | None
    duplicate_of: str | None = Field(
        description="correlation id of the workflow that had succeeded under its dedupe key"
    )
    steps: list[WorkflowStep]
    failure: WorkflowFailure | None
    replays: list[KnownReplay] = Field([], description="oldest first")
    overrides: list[KnownOverride] = Field([], description="made in the debugger, oldest first")


class WorkflowSummary(BaseModel):
    correlation_id: str
    workflow: str | None
    state: State
    changed_at: EpochMs


class Workflows(BaseModel):
    workflows: list[WorkflowSummary]
    next: str | None = Field(description="the cursor of the next page; null: this is the last")


HeaderName = Annotated[str, Field(pattern="^dlq-[a-z0-9-]{1,60}$")]
HeaderText = Annotated[str, Field(max_length=1000, pattern=r"^[\x20-\x7e]*$")]


class Overrides(Body):
    """What differs from the record as it last came."""

    model_config = ConfigDict(extra="forbid")

    retry_count: int = Field(
        ge=0, le=10**6, description="how often the workflow was replayed before, this one counted"
    )
    value: Annotated[str, Field(max_length=2**24)] | None = Field(
        None, description="base64: instead of the record's value"
    )
    headers: dict[HeaderName, HeaderText] = Field(
        {}, max_length=50, description="beside the record's own; `dlq-` ones only"
    )


class ReplayRequest(Body):
    model_config = ConfigDict(extra="forbid")

    correlation_id: str = Field(min_length=1, max_length=500)
    key: str = Field(
        min_length=1,
        max_length=500,
        pattern=r"^[\x21-\x7e]+$",
        description="this replay's own idempotency key",
    )
    overrides: Overrides


class ReplayQuery(Body):
    replays: list[ReplayRequest] = Field(max_length=1000)

    @model_validator(mode="after")
    def _a_key_each(self) -> ReplayQuery:
        if len({replay.key for replay in self.replays}) < len(self.replays):
            raise ValueError("two replays have the same `key`: each needs its own")
        return self


class Replayed(BaseModel):
    """What became of asking for a replay; what becomes of the replay itself is its outcome."""

    state: Literal["accepted", "refused"]
    why: Refused | None = None


class Replays(BaseModel):
    replays: dict[str, Replayed] = Field(description="one for each key that was asked for")


class DebugRequest(Body):
    """A step's input or output, one of them, as a person wants it."""

    model_config = ConfigDict(extra="forbid")

    step: Name
    input: dict[str, Any] | None = None
    output: dict[str, Any] | None = None
    person: Name
    reason: str = Field(min_length=1, max_length=2000)

    @model_validator(mode="after")
    def _one_of_them(self) -> DebugRequest:
        if (self.input is None) == (self.output is None):
            raise ValueError("either `input` or `output` must be given")
        return self


class Debugged(BaseModel):
    key: str = Field(description="the outcome of going on is asked for by it")


class NewFault(Body):
    model_config = ConfigDict(extra="forbid")

    plugin: Name
    tool: Name | None = None
    error: Error
    share: float = Field(ge=0, le=1, description="of the calls")
    seconds: float = Field(gt=0, le=3600, description="it ends by itself")


class Fault(BaseModel):
    """A fault being injected."""

    name: str
    plugin: str
    tool: str | None
    error: Error
    share: float
    until: EpochMs


class Faults(BaseModel):
    faults: list[Fault]


class FailureQuery(Body):
    correlation_ids: list[Annotated[str, Field(min_length=1, max_length=500)]] = Field(max_length=1000)


class FailedWorkflow(WorkflowFailure):
    """Why a workflow's last run failed."""

    workflow: str | None = Field(description="null where the record could not be read")
    trace_id: str | None
    retry_count: int = Field(description="how often it had been replayed before that run")


class Failures(BaseModel):
    failures: dict[str, FailedWorkflow | None] = Field(
        description="one for each id that was asked for; null where its last run did not fail, or none was seen"
    )


class SuccessRate(BaseModel):
    """Distinct workflows that ended in the window, by their last state."""

    succeeded: int
    failed: int
    total: int
    window_s: int


class Routing(BaseModel):
    """Whether failures are dead-lettered."""

    mode: Literal["auto", "paused"]
    holder: str | None = None
    until: EpochMs | None = None
    held: int = Field(description="failures that wait for the lease's end")
    undeliverable: int = Field(description="dead letters kept because the DLQ takes none of their size")


class Pause(Body):
    holder: Name
    seconds: int = Field(ge=1, le=4 * 3600)


class Resume(Body):
    holder: Name


class Quota(BaseModel):
    plugin: str = Field(
        description="whose it is: a plugin's, a tool's or a tenant's",
        examples=["payments", "payments.charge", "tenant:acme"],
    )
    resource: Resource = Field(description="names the unit")
    limit: int
    ceiling: int
    peak_need: int = Field(description="the most a call ever asked for")
    rejected: int = Field(description="calls refused so far")


class Quotas(BaseModel):
    quotas: list[Quota]


class NewLimit(Body):
    limit: int = Field(ge=1, le=2**53)
    resource: Resource = "memory_mb"


class Circuit(BaseModel):
    """A plugin's circuit breaker."""

    state: Literal["closed", "open", "half_open"]
    until: EpochMs | None = Field(None, description="when an open one lets a probe through")


class Violation(BaseModel):
    """Calls that reached for a scope their plugin doesn't declare."""

    scope: str
    count: int
    last_at: EpochMs


class Plugin(BaseModel):
    """A plugin as it runs now."""

    name: str
    version: str
    versions: list[str] = Field(description="what it may be set to")
    scopes: list[str] = Field(description="declared: what its calls may reach for")
    grantable: list[str] = Field(description="what may be declared too")
    disabled: bool
    circuit: Circuit
    violations: list[Violation]
    revision: int = Field(description="counts its changes")


class Plugins(BaseModel):
    plugins: list[Plugin]
    next: str | None = Field(description="the cursor of the next page; null: this is the last")


class PluginPatch(Body):
    """A change of a plugin; what is left out stays as it is."""

    model_config = ConfigDict(extra="forbid")

    revision: int = Field(description="the one that was looked at", ge=0, le=2**53)
    person: Name = Field(description="who changes it")
    reason: str = Field(min_length=1, max_length=2000)
    scopes: list[Name] | None = Field(None, description="the whole new list", max_length=100)
    version: Name | None = None
    disabled: bool | None = None
