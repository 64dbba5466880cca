"""The golden flows of a queue, before the drain as a baseline and after it as the last check."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dlq.config import QueueConfig, config_root
from dlq.drain import Drain
from dlq.golden import GoldenFlow, load_golden_flows, run_golden_flows
from dlq.orchestrator import OrchestratorError


def flows_of(config: QueueConfig) -> list[GoldenFlow]:
    """A queue's golden flows; it has some.

    :raises ConfigError: they can't be read.
    """
    assert config.golden_flows is not None
    return load_golden_flows(Path(str(config_root() / "golden_flows" / config.golden_flows)))


def _flows(drain: Drain) -> tuple[list[GoldenFlow], str | None]:
    """The queue's flows, and why they can't be run where they can't."""
    if drain.config.golden_flows is None:
        return [], "no golden flows are configured (golden_flows)"
    if drain.orchestrator is None:
        return [], "golden flows are configured, but no orchestrator to run them"
    return flows_of(drain.config), None


def baseline(drain: Drain) -> dict[str, Any]:
    """How the golden flows go before anything was touched: a drain isn't blamed for what was broken already."""
    return _run(drain, "baseline")


def verify_golden_flows(drain: Drain) -> dict[str, Any]:
    """The golden flows, end to end; ``passed`` is None where there are none, and names what was broken before."""
    drain.phase("verify")
    result = _run(drain, "verify_golden_flows")
    before = {f["flow"]: f["passed"] for f in (drain.noted("baseline") or {}).get("flows", [])}
    result["broken_before"] = sorted(
        f["flow"] for f in result["flows"] if not f["passed"] and before.get(f["flow"]) is False
    )
    return result


def _run(drain: Drain, stage: str) -> dict[str, Any]:
    flows, why_not = _flows(drain)
    if why_not is not None or drain.dry_run:
        said = why_not or "dry run: golden flows are not run"
        drain.note(stage, said, passed=None, flows=[])
        return {"passed": None, "flows": [], "said": said}
    assert drain.orchestrator is not None
    try:
        if "outcome" not in drain.orchestrator.capabilities():
            raise OrchestratorError("the orchestrator can't run workflows for us (level outcome)")
        results = run_golden_flows(flows, drain.orchestrator, run_key=drain.id)
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
    passed = all(r.passed for r in results)
    broken = "; ".join(d for r in results for d in r.differences)
    said = f"{sum(r.passed for r in results)} of {len(results)} golden flows are green" + (
        f": {broken}" if broken else ""
    )
    drain.note(stage, said, level="info" if passed else "error", passed=passed, flows=told)
    return {"passed": passed, "flows": told, "said": said}
