"""What the routes work on, and who may call them."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, HTTPException, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from dlq_orchestrator.core.calls import PluginCalls
from dlq_orchestrator.core.rate_limiter import RateLimiter
from dlq_orchestrator.core.registry import Registry
from dlq_orchestrator.core.workflow_safety import WorkflowSafety
from dlq_orchestrator.http.idempotency import Idempotency
from dlq_orchestrator.injection import InjectedFaults
from dlq_orchestrator.origin import Consumer
from dlq_orchestrator.replays import Replays
from dlq_orchestrator.routing import Routing
from dlq_orchestrator.submission import Submission


@dataclass(frozen=True, slots=True)
class Parts:
    """The running orchestrator, as the routes see it."""

    token: str
    safety: WorkflowSafety
    limiter: RateLimiter
    registry: Registry
    calls: PluginCalls
    routing: Routing | None
    replays: Replays
    faults: InjectedFaults | None
    submission: Submission
    idempotency: Idempotency
    consumer: Consumer


def _parts(request: Request) -> Parts:
    parts: Parts = request.app.state.parts
    return parts


WithParts = Annotated[Parts, Depends(_parts)]

_bearer = HTTPBearer(auto_error=False, description="The token the orchestrator was started with.")


def require_token(
    parts: WithParts, given: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]
) -> None:
    if given is None or not secrets.compare_digest(given.credentials.encode(), parts.token.encode()):
        raise HTTPException(
            401, "a bearer token is needed, and it must be the orchestrator's", {"WWW-Authenticate": "Bearer"}
        )
