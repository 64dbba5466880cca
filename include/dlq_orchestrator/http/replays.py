"""The routes of the levels `replay` and `debugger`."""

from __future__ import annotations

import base64
import binascii
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, HTTPException, Path

from dlq_orchestrator.http import models
from dlq_orchestrator.http.idempotency import IdempotencyKey
from dlq_orchestrator.http.parts import WithParts, require_token
from dlq_orchestrator.http.problems import documented
from dlq_orchestrator.replays import Override, Replay

replays = APIRouter(dependencies=[Depends(require_token)])


@replays.post(
    "/v1/replays",
    tags=["replay"],
    status_code=202,
    responses=documented(422, 503),
    response_model_exclude_none=True,
)
def replay(query: models.ReplayQuery, parts: WithParts) -> models.Replays:
    """Run workflows again. Each replay's key is its own idempotency key: a repeated one is not put in again."""
    found = parts.replays.replay([_replay(request) for request in query.replays])
    return models.Replays(
        replays={
            key: models.Replayed(state="refused" if why else "accepted", why=why)
            for key, why in found.items()
        }
    )


@replays.post(
    "/v1/workflows/{correlation_id:path}/debug",
    tags=["debugger"],
    status_code=202,
    responses=documented(404, 409, 422, 503),
)
def debug(
    correlation_id: Annotated[str, Path(min_length=1, max_length=500)],
    request: models.DebugRequest,
    parts: WithParts,
    key: IdempotencyKey = None,
) -> models.Debugged:
    """Override a step's input or output, and go on from there."""

    def change() -> models.Debugged:
        given = request.input if request.output is None else request.output
        kind: Literal["input", "output"] = "input" if request.output is None else "output"
        override = Override(request.step, kind, given or {}, request.person, request.reason)
        return models.Debugged(key=parts.replays.debug(correlation_id, override))

    return parts.idempotency.once(
        key, f"debug {correlation_id} {request.model_dump_json()}", models.Debugged, change
    )


def _replay(request: models.ReplayRequest) -> Replay:
    wanted = request.overrides
    try:
        value = None if wanted.value is None else base64.b64decode(wanted.value, validate=True)
    except (binascii.Error, ValueError):
        raise HTTPException(422, f"replay {request.key}: overrides.value is not base64") from None
    return Replay(request.correlation_id, request.key, wanted.retry_count, value, wanted.headers)
