"""The workflow: what a record of the origin must hold, and what running it came to."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import msgspec

from dlq_orchestrator.failures import DataCorruption, Failure, ScopeViolation

# no control characters: names become headers, keys and rows
_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]*$")]

Headers = list[tuple[str, bytes | None]]


class Step(msgspec.Struct, frozen=True):
    """One call of one plugin's tool."""

    name: _Name
    plugin: _Name
    tool: _Name
    args: dict[str, Any] = {}

    @property
    def component(self) -> str:
        return f"{self.plugin}.{self.tool}"


@dataclass(frozen=True, slots=True)
class Call:
    """What a plugin is told beside its arguments.

    :param effect_key: for its upstream, as idempotency key: the same for each try and each replay of this step.
    :param version: the plugin's, as it runs now.
    :param scopes: what it declares.
    """

    step: Step
    effect_key: str
    version: str
    scopes: frozenset[str]

    def reference(self, prefix: str) -> str:
        """The id of what this call makes: the same whenever the call is repeated."""
        return f"{prefix}-{hashlib.sha256(self.effect_key.encode()).hexdigest()[:12]}"

    def require(self, scope: str) -> None:
        """:raises ScopeViolation: the plugin doesn't declare that scope."""
        if scope not in self.scopes:
            raise ScopeViolation(
                f"{self.step.component} asked for scope {scope}, which it doesn't declare", scope
            )


class Workflow(msgspec.Struct, frozen=True):
    """The document of one workflow: its steps run in order, each seen once. `tenant`: whose quota its calls use."""

    workflow: _Name
    correlation_id: _Name
    steps: Annotated[list[Step], msgspec.Meta(min_length=1, max_length=100)]
    tenant: _Name | None = None

    def __post_init__(self) -> None:
        if len({step.name for step in self.steps}) < len(self.steps):
            raise ValueError("the names of a workflow's steps must differ")


_decode = msgspec.json.Decoder(Workflow).decode


def parse_workflow(value: bytes | None) -> Workflow:
    """Read a workflow from a record's value.

    :raises DataCorruption: it isn't a workflow; the message says where, and holds nothing of the value.
    """
    if value is None:
        raise DataCorruption("the record has no value")
    try:
        return _decode(value)
    except msgspec.ValidationError as error:
        raise DataCorruption(f"the record is not a workflow: {error}") from None
    except (msgspec.DecodeError, UnicodeDecodeError):
        # the decoder's own message may quote the bytes
        raise DataCorruption("the record is not valid JSON") from None


@dataclass(frozen=True, slots=True)
class Record:
    """One record of the origin, its bytes as they came. `place` is its name among all the origin's records.

    :param types: of those headers that are no strings, where the origin tells.
    """

    place: str
    value: bytes | None
    headers: Headers
    headers_broken: bool = False
    key: bytes | None = None
    types: Mapping[str, str] = field(default_factory=dict)

    def text(self, name: str) -> str | None:
        """The last header of that name as text; None where it is absent, empty or not printable text."""
        for header, value in reversed(self.headers):
            if header == name and value:
                try:
                    text = value.decode()
                except UnicodeDecodeError:
                    return None
                return text if text.isprintable() else None
        return None

    def count(self, name: str) -> int | None:
        """A header that holds a count; None where it is absent or no sane number."""
        text = self.text(name)
        return int(text) if text and len(text) <= 9 and text.isascii() and text.isdigit() else None

    @property
    def retry_count(self) -> int:
        """How often this workflow was replayed before; the replayer's word overrides the record's own."""
        replays = self.count("dlq-retry-count")
        return replays if replays is not None else self.count("retry-count") or 0

    @property
    def replay_key(self) -> str | None:
        """The key under which this replay's outcome is asked for; None for a record that is no replay."""
        return self.text("dlq-key")


@dataclass(frozen=True, slots=True)
class StepRun:
    """What one step came to in one run. `attempts` counts this run's tries."""

    name: str
    plugin: str
    tool: str
    position: int
    state: Literal["succeeded", "failed"]
    attempts: int
    args: dict[str, Any]
    output: dict[str, Any] | None = None
    effect_key: str | None = None


@dataclass(frozen=True, slots=True)
class Run:
    """What running one record came to; recorded in one transaction with its effects.

    `pending`: it failed, and its queue will hand the record out again. `traceparent` (W3C) is of this run's span.
    """

    record: Record
    correlation_id: str
    workflow: str | None
    dedupe_key: str
    state: Literal["pending", "succeeded", "failed"]
    duplicate_of: str | None = None
    failure: Failure | None = None
    steps: list[StepRun] = field(default_factory=list)
    traceparent: str | None = None
