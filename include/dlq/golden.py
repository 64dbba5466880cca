"""Golden flows: workflows whose input is known, and what is expected of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from jsonpath import JSONPath, JSONPathEnvironment
from jsonpath.exceptions import JSONPathError
from jsonschema.exceptions import SchemaError
from jsonschema.validators import Draft202012Validator
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from dlq.errors import ConfigError
from dlq.orchestrator import WorkflowState
from dlq.traces import Span

_SHOWN_MAX = 120
_PATHS = JSONPathEnvironment(strict=True)


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SpanExpectation(_Model):
    """A span that the flow's trace must hold: of that name, with this status and these attributes where given."""

    name: str = Field(min_length=1)
    status: Literal["ok", "error"] | None = None
    attributes: dict[str, str | bool | int | float] = {}

    def fits(self, span: Span) -> bool:
        return (
            self.name == span.name
            and self.status in (None, span.status)
            and all(span.attributes.get(name) == value for name, value in self.attributes.items())
        )

    def __str__(self) -> str:
        wanted = [self.status] if self.status else []
        return " ".join([self.name, *wanted, *(f"{name}={value}" for name, value in self.attributes.items())])


class Expectation(_Model):
    """How a golden flow must end: its state, the spans of its trace, and of steps by name any of

    - ``outputs``: fields of its output, exactly; others are not looked at;
    - ``schemas``: a JSON Schema (2020-12) that its output fits;
    - ``paths``: JSON Paths (RFC 9535) and what each finds: the value; of a path that may find several, their list.
    """

    state: Literal["succeeded", "failed"] = "succeeded"
    outputs: dict[str, dict[str, Any]] = {}
    schemas: dict[str, dict[str, Any] | bool] = {}
    paths: dict[str, dict[str, Any]] = {}
    spans: tuple[SpanExpectation, ...] = ()

    @field_validator("schemas")
    @classmethod
    def _are_schemas(cls, schemas: dict[str, Any]) -> dict[str, Any]:
        for step, schema in schemas.items():
            try:
                Draft202012Validator.check_schema(schema)
            except SchemaError as error:
                where = "/".join(map(str, error.absolute_path))
                raise ValueError(f"{step}: no JSON Schema: {error.message}, at /{where}") from None
        return schemas

    @field_validator("paths")
    @classmethod
    def _are_paths(cls, paths: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for step, found in paths.items():
            for path in found:
                try:
                    _compiled(path)
                except JSONPathError as error:
                    why = str(error).splitlines()[0]
                    raise ValueError(
                        f"{step}: {path!r} is no JSON Path, such as $.items[0].id: {why}"
                    ) from None
        return paths

    @property
    def steps(self) -> Iterator[tuple[str, str]]:
        """The fields that name steps, with each step they name."""
        for field in ("outputs", "schemas", "paths"):
            for step in getattr(self, field):
                yield field, step


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
        for field, step in self.expect.steps:
            if step not in names:
                raise ValueError(
                    f"expect.{field}.{step}: the workflow has no such step; it has {', '.join(names)}"
                )
        return self


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


def differences(flow: GoldenFlow, state: WorkflowState) -> Iterator[str]:
    """How a workflow that has ended is not what its golden flow expects: flow, step and difference."""
    if state.state != flow.expect.state:
        why = ""
        if state.failure:
            why = f" at step {state.failure.stage}: {state.failure.error_type}: {state.failure.message}"
        yield f"{flow.name}: expected {flow.expect.state}, is {state.state}{why}"
    outputs = {step.name: step.output for step in state.steps}
    for step in dict.fromkeys(step for _, step in flow.expect.steps):
        if (found := outputs.get(step)) is None:
            yield f"{flow.name}.{step}: has no output"
        else:
            yield from _step(f"{flow.name}.{step}", flow.expect, step, found)


def missing_spans(flow: GoldenFlow, spans: list[Span]) -> Iterator[str]:
    """The spans that a golden flow expects and its trace does not hold."""
    for wanted in flow.expect.spans:
        if not any(wanted.fits(span) for span in spans):
            alike = next((span for span in spans if span.name == wanted.name), None)
            there = ", ".join(sorted({span.name for span in spans})) or "none"
            seen = (
                f"it is there as {alike.status} {dict(alike.attributes)}" if alike else f"there are: {there}"
            )
            yield f"{flow.name}: its trace holds no span {wanted}; {_shown(seen)}"


def _step(at: str, expect: Expectation, step: str, found: Mapping[str, Any]) -> Iterator[str]:
    yield from _unlike(at, expect.outputs.get(step, {}), found)
    for error in Draft202012Validator(expect.schemas.get(step, True)).iter_errors(found):
        yield f"{at}{error.json_path.removeprefix('$')}: {_shown(error.message)}"
    for path, expected in expect.paths.get(step, {}).items():
        query = _compiled(path)
        values = query.findall(found)
        if not query.singular_query():
            yield from _unlike(f"{at} {path}", expected, values)
        elif values:
            yield from _unlike(f"{at} {path}", expected, values[0])
        else:
            yield f"{at} {path}: is missing"


def _compiled(path: str) -> JSONPath:
    query = _PATHS.compile(path)
    if not isinstance(query, JSONPath):
        raise ValueError(f"{path!r}: write one JSON Path, not several")
    return query


def _unlike(at: str, expected: object, found: object) -> Iterator[str]:
    """Where ``found`` differs from ``expected``; of mappings only the expected fields are compared."""
    if isinstance(expected, Mapping) and isinstance(found, Mapping):
        for name, value in expected.items():
            if name in found:
                yield from _unlike(f"{at}.{name}", value, found[name])
            else:
                yield f"{at}.{name}: is missing"
    elif expected != found:
        yield f"{at}: expected {_shown(repr(expected))}, is {_shown(repr(found))}"


def _shown(text: str) -> str:
    return text if len(text) <= _SHOWN_MAX else f"{text[:_SHOWN_MAX]}…"
