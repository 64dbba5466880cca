"""The golden flows of a queue, run end to end: before the drain as a baseline, and after it as the last check."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlq.config import QueueConfig, config_root
from dlq.drain import Drain, Level
from dlq.golden import GoldenFlow, differences, load_golden_flows, missing_spans
from dlq.orchestrator import Orchestrator, OrchestratorError, WorkflowState
from dlq.telemetry import own_trace
from dlq.traces import JaegerTraces, TracesError

_POLL_S = 0.2
_NO_TRACES = "its spans are not checked: no trace store is configured (traces)"


@dataclass(frozen=True)
class GoldenResult:
    """How one golden flow went; ``differences`` name flow, step and what is not as expected."""

    flow: str
    correlation_id: str
    seconds: float
    differences: tuple[str, ...]
    not_checked: str | None = None

    @property
    def passed(self) -> bool:
        return not self.differences


def baseline(drain: Drain) -> dict[str, Any]:
    """How the golden flows go before anything was touched: a drain isn't blamed for what was broken already."""
    return _run(drain, "baseline", {})


def verify_golden_flows(drain: Drain) -> dict[str, Any]:
    """The golden flows, end to end. ``passed`` is None where there are none, and false where one fails that was green
    before; those that were broken before are named (``broken_before``), and so are those mended since.
    """
    drain.phase("verify")
    before = {f["flow"]: f["passed"] for f in (drain.noted("baseline") or {}).get("flows", [])}
    return _run(drain, "verify_golden_flows", before)


def flows_of(config: QueueConfig) -> list[GoldenFlow]:
    """A queue's golden flows; it has some.

    :raises ConfigError: they can't be read.
    """
    assert config.golden_flows is not None
    return load_golden_flows(Path(str(config_root() / "golden_flows" / config.golden_flows)))


def run_golden_flows(
    flows: Sequence[GoldenFlow],
    orchestrator: Orchestrator,
    *,
    run_key: str,
    traces: JaegerTraces | None = None,
) -> list[GoldenResult]:
    """Submit all flows at once, wait for each until its deadline, and compare; in the order given.

    A flow that cannot be submitted or asked for has failed: it is a result, not an error.

    :param run_key: names this run in the correlation ids, which are fresh each time.
    :param traces: where the spans of a trace are found; without it they are not checked.
    """
    runs = [
        _GoldenRun(flow, f"golden-{flow.name}-{run_key}-{uuid.uuid4().hex[:8]}", traces) for flow in flows
    ]
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
    def __init__(self, flow: GoldenFlow, correlation_id: str, traces: JaegerTraces | None) -> None:
        self._flow = flow
        self._correlation_id = correlation_id
        self._traces = traces
        self._began = time.monotonic()
        self.result: GoldenResult | None = None

    def submit(self, orchestrator: Orchestrator) -> None:
        try:
            with own_trace(f"golden flow {self._flow.name}"):
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
            self._compare(state, late)
        elif late:
            done = ", ".join(step.name for step in state.steps) if state else ""
            self._end(
                f"{self._flow.name}: not done in {self._flow.deadline:g} s, steps done: {done or 'none'}; "
                "is the orchestrator consuming its origin topic?"
            )

    def _compare(self, state: WorkflowState, late: bool) -> None:
        unlike = list(differences(self._flow, state))
        missing = [] if unlike or self._traces is None else self._missing_spans(self._traces, state)
        if unlike or late or not missing:  # spans may come later than the outcome
            self._end(*unlike, *missing)

    def _missing_spans(self, traces: JaegerTraces, state: WorkflowState) -> list[str]:
        if not self._flow.expect.spans:
            return []
        if state.trace_id is None:
            return [f"{self._flow.name}: the orchestrator tells no trace id, so its spans can't be found"]
        try:
            return list(missing_spans(self._flow, traces.spans(state.trace_id)))
        except TracesError as error:
            return [f"{self._flow.name}: its spans can't be looked at: {error}"]

    def _end(self, *unlike: str) -> None:
        seconds = time.monotonic() - self._began
        unseen = _NO_TRACES if self._flow.expect.spans and self._traces is None else None
        self.result = GoldenResult(self._flow.name, self._correlation_id, seconds, unlike, unseen)


def _flows(drain: Drain) -> tuple[list[GoldenFlow], str | None]:
    """The queue's flows, and why they can't be run where they can't."""
    if drain.config.golden_flows is None:
        return [], "no golden flows are configured (golden_flows)"
    if drain.orchestrator is None:
        return [], "golden flows are configured, but no orchestrator to run them"
    return flows_of(drain.config), None


def _run(drain: Drain, stage: str, before: dict[str, bool]) -> dict[str, Any]:
    """:param before: by flow, whether it passed when the drain was opened."""
    flows, why_not = _flows(drain)
    if why_not is not None or drain.dry_run:
        said = why_not or "dry run: golden flows are not run"
        drain.note(stage, said, passed=None, flows=[])
        return {"passed": None, "flows": [], "said": said}
    assert drain.orchestrator is not None
    store = drain.config.traces
    try:
        if "outcome" not in drain.orchestrator.capabilities():
            raise OrchestratorError("the orchestrator can't run workflows for us (level outcome)")
        opened = JaegerTraces.connect(drain.connections(store.connection)) if store else nullcontext()
        with opened as traces:
            results = run_golden_flows(flows, drain.orchestrator, run_key=drain.id, traces=traces)
    except OrchestratorError as error:
        drain.note(stage, f"golden flows could not be run: {error}", level="error", passed=False, flows=[])
        return {"passed": False, "flows": [], "said": str(error)}
    told = [
        {
            "flow": r.flow,
            "passed": r.passed,
            "seconds": round(r.seconds, 2),
            "differences": list(r.differences),
        }
        for r in results
    ]
    already = sorted(r.flow for r in results if not r.passed and before.get(r.flow) is False)
    mended = sorted(r.flow for r in results if r.passed and before.get(r.flow) is False)
    passed = all(r.passed or r.flow in already for r in results)
    broken = "; ".join(d for r in results for d in r.differences)
    said = "".join(
        (
            f"{sum(r.passed for r in results)} of {len(results)} golden flows are green",
            f": {broken}" if broken else "",
            f". Broken before this drain already: {', '.join(already)}" if already else "",
            f". Mended since this drain began: {', '.join(mended)}" if mended else "",
            *(f". {r.flow}: {r.not_checked}" for r in results if r.not_checked),
        )
    )
    level: Level = "info" if not broken else "warning" if passed else "error"
    drain.note(stage, said, level=level, passed=passed, flows=told, broken_before=already, mended=mended)
    return {"passed": passed, "flows": told, "said": said, "broken_before": already, "mended": mended}
