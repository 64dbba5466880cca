"""Golden flows: workflows whose input and output are known, run end to end through the real queue."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dlq.errors import ConfigError
from dlq.orchestrator import Orchestrator, OrchestratorError, WorkflowState

_POLL_S = 0.2
_SHOWN_MAX = 120


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Expectation(_Model):
    """How a golden flow must end: its state, and of each step named a part of its output, exactly."""

    state: Literal["succeeded", "failed"] = "succeeded"
    outputs: dict[str, dict[str, Any]] = {}


class GoldenFlow(_Model):
    """One golden flow: the document to submit, what to expect of it, and within how many seconds."""

    name: str = Field(pattern=r"^[a-z0-9_-]{1,60}$")
    workflow: dict[str, Any]
    expect: Expectation
    deadline: Annotated[float, Field(gt=0, le=600)] = 30.0

    @model_validator(mode="after")
    def _expects_its_own_steps(self) -> GoldenFlow:
        steps = self.workflow.get("steps")
        if (
            not isinstance(steps, list)
            or not steps
            or not all(isinstance(s, dict) and "name" in s for s in steps)
        ):
            raise ValueError("workflow.steps must be a list of steps, each with a name")
        if "correlation_id" in self.workflow:
            raise ValueError("workflow.correlation_id must be left out: each run gets a fresh one")
        names = [str(step["name"]) for step in steps]
        for step in self.expect.outputs:
            if step not in names:
                raise ValueError(
                    f"expect.outputs.{step}: the workflow has no such step; it has {', '.join(names)}"
                )
        return self


@dataclass(frozen=True)
class GoldenResult:
    """How one golden flow went; ``differences`` name flow, step and what is not as expected."""

    flow: str
    correlation_id: str
    seconds: float
    differences: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return not self.differences


def load_golden_flows(path: Path) -> list[GoldenFlow]:
    """Read the golden flows of a folder (``*.yaml``, one a file), by name.

    :raises ConfigError: the folder holds none, a file is no golden flow, or a name is used twice.
    """
    files = sorted(path.glob("*.yaml"))
    if not files:
        raise ConfigError(f"{path}: no golden flows (*.yaml) here; correct `golden_flows`, or put one there.")
    flows: dict[str, GoldenFlow] = {}
    for file in files:
        try:
            flow = GoldenFlow.model_validate(yaml.safe_load(file.read_text()))
        except yaml.YAMLError as error:
            raise ConfigError(f"{file}: not YAML: {error}") from None
        except ValidationError as error:
            faults = "; ".join(
                f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in error.errors()
            )
            raise ConfigError(
                f"{file}: not a golden flow: {faults}. See the shipped ones for the shape."
            ) from None
        if flow.name in flows:
            raise ConfigError(
                f"{file}: name: {flow.name} is used by another golden flow; each needs its own."
            )
        flows[flow.name] = flow
    return list(flows.values())


def run_golden_flows(
    flows: Sequence[GoldenFlow], orchestrator: Orchestrator, *, run_key: str
) -> list[GoldenResult]:
    """Submit all flows at once, wait for each until its deadline, and compare; in the order given.

    A flow that cannot be submitted or asked for has failed: it is a result, not an error.

    :param run_key: names this run in the correlation ids, which are fresh each time.
    """
    runs = [_GoldenRun(flow, f"golden-{flow.name}-{run_key}-{uuid.uuid4().hex[:8]}") for flow in flows]
    for run in runs:
        run.submit(orchestrator)
    while any(run.result is None for run in runs):
        for run in runs:
            if run.result is None:
                run.look(orchestrator)
        if any(run.result is None for run in runs):
            time.sleep(_POLL_S)
    return [run.result for run in runs if run.result is not None]


class _GoldenRun:
    def __init__(self, flow: GoldenFlow, correlation_id: str) -> None:
        self._flow = flow
        self._correlation_id = correlation_id
        self._began = time.monotonic()
        self.result: GoldenResult | None = None

    def submit(self, orchestrator: Orchestrator) -> None:
        try:
            orchestrator.submit_workflow(self._flow.workflow, self._correlation_id)
        except OrchestratorError as error:
            self._end(f"{self._flow.name}: could not be submitted: {error}")

    def look(self, orchestrator: Orchestrator) -> None:
        late = time.monotonic() - self._began > self._flow.deadline
        try:
            state = orchestrator.workflow(self._correlation_id)
        except OrchestratorError as error:
            self._end(f"{self._flow.name}: its state could not be read: {error}")
            return
        if state is not None and state.state != "pending":
            self._end(*differences(self._flow, state))
        elif late:
            done = ", ".join(step.name for step in state.steps) if state else ""
            self._end(
                f"{self._flow.name}: not done in {self._flow.deadline:g} s, steps done: {done or 'none'}; "
                "is the orchestrator consuming its origin topic?"
            )

    def _end(self, *differences: str) -> None:
        seconds = time.monotonic() - self._began
        self.result = GoldenResult(self._flow.name, self._correlation_id, seconds, differences)


def differences(flow: GoldenFlow, state: WorkflowState) -> Iterator[str]:
    """How a workflow that has ended is not what its golden flow expects: flow, step and difference."""
    if state.state != flow.expect.state:
        why = ""
        if state.failure:
            why = f" at step {state.failure.stage}: {state.failure.error_type}: {state.failure.message}"
        yield f"{flow.name}: expected {flow.expect.state}, is {state.state}{why}"
    outputs = {step.name: step.output for step in state.steps}
    for step, expected in flow.expect.outputs.items():
        found = outputs.get(step)
        if found is None:
            yield f"{flow.name}.{step}: has no output"
        else:
            yield from _unlike(f"{flow.name}.{step}", expected, found)


def _unlike(at: str, expected: object, found: object) -> Iterator[str]:
    """Where ``found`` differs from ``expected``; of mappings only the expected fields are compared."""
    if isinstance(expected, Mapping) and isinstance(found, Mapping):
        for name, value in expected.items():
            if name in found:
                yield from _unlike(f"{at}.{name}", value, found[name])
            else:
                yield f"{at}.{name}: is missing"
    elif expected != found:
        yield f"{at}: expected {_shown(expected)}, is {_shown(found)}"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN_MAX else f"{text[:_SHOWN_MAX]}…"
