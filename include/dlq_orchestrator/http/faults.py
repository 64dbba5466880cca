"""The routes of the level `faults`."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, HTTPException, Path

from dlq_orchestrator.http import models
from dlq_orchestrator.http.parts import Parts, WithParts, require_token
from dlq_orchestrator.http.problems import documented
from dlq_orchestrator.injection import InjectedFault, InjectedFaults
from dlq_orchestrator.plugins import TOOLS

faults = APIRouter(dependencies=[Depends(require_token)], tags=["faults"])

Name = Annotated[str, Path(min_length=1, max_length=200)]


@faults.get("/v1/faults", responses=documented(404))
def list_faults(parts: WithParts) -> models.Faults:
    """The faults being injected now."""
    return models.Faults(faults=[_fault(fault) for fault in _offered(parts).faults()])


@faults.put("/v1/faults/{name}", responses=documented(404, 422))
def put_fault(name: Name, new: models.NewFault, parts: WithParts) -> models.Fault:
    """Break a share of a plugin's calls for some time, in place of a fault of the same name."""
    injected = _offered(parts)
    if not any(plugin == new.plugin and new.tool in (None, tool) for plugin, tool in TOOLS):
        tools = ", ".join(f"{plugin}.{tool}" for plugin, tool in TOOLS)
        raise HTTPException(422, f"no plugin has that tool; there are: {tools}")
    return _fault(injected.put(name, new.plugin, new.tool, new.error, new.share, new.seconds))


@faults.delete("/v1/faults/{name}", status_code=204, responses=documented(404, 422))
def end_fault(name: Name, parts: WithParts) -> None:
    """End a fault; none of that name: nothing to do."""
    _offered(parts).end(name)


def _offered(parts: Parts) -> InjectedFaults:
    if parts.faults is None:
        raise HTTPException(404, "no faults can be injected here: it was started without --fault-injection")
    return parts.faults


def _fault(fault: InjectedFault) -> models.Fault:
    return models.Fault(
        name=fault.name,
        plugin=fault.plugin,
        tool=fault.tool,
        error=fault.error,
        share=fault.share,
        until=int(fault.until * 1000),
    )
