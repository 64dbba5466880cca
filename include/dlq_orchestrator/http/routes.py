"""The routes of the contract, by level."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, HTTPException, Path, Query, Request

from dlq_orchestrator.core.rate_limiter import Quota as PluginQuota
from dlq_orchestrator.http import models
from dlq_orchestrator.http.idempotency import IdempotencyKey
from dlq_orchestrator.http.parts import Parts, WithParts, require_token
from dlq_orchestrator.http.problems import documented
from dlq_orchestrator.routing import Routing

CONTRACT_VERSION = "1.2"

# a batch of slow plugins can take seconds; a turn that takes this long is stuck
_STUCK_S = 60

public = APIRouter()
contract = APIRouter(dependencies=[Depends(require_token)])

CorrelationId = Annotated[str, Path(min_length=1, max_length=200)]


@public.get("/healthz", tags=["health"], responses={503: documented(503)[503]})
def health(parts: WithParts) -> models.Health:
    """Whether records are being consumed; needs no token."""
    silent = time.monotonic() - parts.consumer.last_turn
    if silent > _STUCK_S:
        raise HTTPException(503, f"the consumer has been silent for {silent:.0f} s")
    return models.Health(status="ok")


@contract.get("/capabilities", tags=["capabilities"], responses=documented())
def capabilities(parts: WithParts) -> models.Capabilities:
    """Which levels are kept; ask this first."""
    levels: list[models.Level] = ["outcome", "failures", "replay", "quotas", "plugins", "debugger"]
    if parts.routing is not None:
        levels.append("routing")
    if parts.faults is not None:
        levels.append("faults")
    return models.Capabilities(version=CONTRACT_VERSION, levels=levels)


@contract.get("/openapi.json", include_in_schema=False)
def openapi(request: Request) -> dict[str, Any]:
    schema: dict[str, Any] = request.app.openapi()
    return schema


@contract.post("/v1/outcomes", tags=["outcome"], responses=documented(422), response_model_exclude_none=True)
def outcomes(query: models.OutcomeQuery, parts: WithParts) -> models.Outcomes:
    """What became of replays, by the key each carried. Changes nothing."""
    dead_lettered_until = parts.consumer.dead_lettered_until
    known = parts.safety.outcomes(query.keys)
    answer: dict[str, models.Outcome] = {}
    for key in query.keys:
        state, at = known.get(key, ("unknown", 0))
        if state == "succeeded":
            answer[key] = models.Outcome(state="succeeded")
        elif state == "failed" and at <= dead_lettered_until:
            answer[key] = models.Outcome(state="failed", failed_at=at)
        else:
            answer[key] = models.Outcome(state="pending" if key in known else "unknown")
    return models.Outcomes(outcomes=answer)


@contract.post(
    "/v1/workflows",
    tags=["outcome"],
    status_code=202,
    responses=documented(409, 422, 503),
    response_model_exclude_none=True,
)
def submit(
    document: models.WorkflowDocument,
    parts: WithParts,
    key: IdempotencyKey = None,
    traceparent: Annotated[
        str | None, Header(pattern="^[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}$")
    ] = None,
) -> models.Submitted:
    """Run a workflow: it is put into the origin, and run from there like any other."""

    def change() -> models.Submitted:
        place = parts.submission.submit(document.model_dump_json().encode(), traceparent)
        return models.Submitted(correlation_id=document.correlation_id, **asdict(place))

    return parts.idempotency.once(key, f"submit {document.model_dump_json()}", models.Submitted, change)


@contract.get("/v1/workflows/{correlation_id:path}", tags=["outcome"], responses=documented(404, 422))
def workflow(correlation_id: CorrelationId, parts: WithParts) -> models.WorkflowState:
    """A workflow's state, its steps with their outputs, and why it failed."""
    found = parts.safety.workflow(correlation_id)
    if found is None:
        raise HTTPException(404, "no workflow with this correlation id has been seen")
    row, steps = found
    replays, overrides = parts.replays.lineage(correlation_id)
    return models.WorkflowState(
        correlation_id=row["correlation_id"],
        workflow=row["workflow"],
        state=row["state"],
        retry_count=row["retry_count"],
        trace_id=row["trace_id"],
        duplicate_of=row["duplicate_of"],
        steps=[
            models.WorkflowStep(
                name=step["name"],
                plugin=step["plugin"],
                tool=step["tool"],
                state=step["state"],
                attempts=step["attempts"],
                input=json.loads(step["input"]) if step["input"] else None,
                output=json.loads(step["output"]) if step["output"] else None,
            )
            for step in steps
        ],
        failure=models.WorkflowFailure.model_validate_json(row["failure"]) if row["failure"] else None,
        replays=[models.KnownReplay(**dict(replay)) for replay in replays],
        overrides=[
            models.KnownOverride.model_validate(
                {**dict(override), override["kind"]: json.loads(override["document"])}
            )
            for override in overrides
        ],
    )


@contract.get("/v1/workflows", tags=["outcome"], responses=documented(422))
def workflows(
    parts: WithParts,
    state: Annotated[models.State | None, Query(description="of these only")] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    cursor: Annotated[str | None, Query(max_length=500, description="`next` of the page before")] = None,
) -> models.Workflows:
    """The workflows that are known, by correlation id."""
    rows = parts.safety.workflows(state, cursor or "", limit + 1)
    page = [models.WorkflowSummary(**dict(row)) for row in rows[:limit]]
    return models.Workflows(workflows=page, next=page[-1].correlation_id if len(rows) > limit else None)


@contract.post("/v1/failures", tags=["failures"], responses=documented(422))
def failures(query: models.FailureQuery, parts: WithParts) -> models.Failures:
    """Why workflows failed, for dead letters that don't say. Changes nothing."""
    known = parts.safety.failures(query.correlation_ids)
    return models.Failures(
        failures={
            correlation_id: models.FailedWorkflow(
                workflow=row["workflow"],
                trace_id=row["trace_id"],
                retry_count=row["retry_count"],
                **json.loads(row["failure"]),
            )
            if (row := known.get(correlation_id))
            else None
            for correlation_id in query.correlation_ids
        }
    )


@contract.get("/v1/success-rate", tags=["outcome"], responses=documented(422))
def success_rate(
    parts: WithParts, window: Annotated[int, Query(ge=1, le=31 * 86400, description="seconds")]
) -> models.SuccessRate:
    """How many workflows ended well in the last `window` seconds."""
    succeeded, failed = parts.safety.success_rate(window)
    return models.SuccessRate(succeeded=succeeded, failed=failed, total=succeeded + failed, window_s=window)


@contract.get("/v1/routing", tags=["routing"], responses=documented(404))
def routing(parts: WithParts) -> models.Routing:
    """Whether failures are dead-lettered, and who paused that until when."""
    return _routing(parts)


@contract.post("/v1/routing/pause", tags=["routing"], responses=documented(404, 409, 422))
def pause(pause: models.Pause, parts: WithParts, key: IdempotencyKey = None) -> models.Routing:
    """Hold failures instead of dead-lettering them until the lease ends; its holder may extend it."""

    def change() -> models.Routing:
        _offered(parts).pause(pause.holder, pause.seconds)
        return _routing(parts)

    return parts.idempotency.once(key, f"pause {pause.model_dump_json()}", models.Routing, change)


@contract.post("/v1/routing/resume", tags=["routing"], responses=documented(404, 409, 422))
def resume(resume: models.Resume, parts: WithParts, key: IdempotencyKey = None) -> models.Routing:
    """End the lease; what was held is dead-lettered at once. Nothing to do where routing is not paused."""

    def change() -> models.Routing:
        _offered(parts).resume(resume.holder)
        return _routing(parts)

    return parts.idempotency.once(key, f"resume {resume.model_dump_json()}", models.Routing, change)


@contract.get("/v1/quotas", tags=["quotas"], responses=documented())
def quotas(parts: WithParts) -> models.Quotas:
    """The quotas of plugins, tools and tenants, and what was asked of them."""
    return models.Quotas(quotas=[_quota(quota) for quota in parts.limiter.quotas()])


@contract.put("/v1/quotas/{plugin}", tags=["quotas"], responses=documented(404, 409, 422))
def set_quota(
    plugin: Annotated[str, Path(min_length=1, max_length=200)],
    new: models.NewLimit,
    parts: WithParts,
    key: IdempotencyKey = None,
) -> models.Quota:
    """Change a limit of a plugin, tool or tenant, within its ceiling, for the next call on."""
    return parts.idempotency.once(
        key,
        f"set_quota {plugin} {new.model_dump_json()}",
        models.Quota,
        lambda: _quota(parts.limiter.set_limit(plugin, new.limit, new.resource)),
    )


def _offered(parts: Parts) -> Routing:
    if parts.routing is None:
        raise HTTPException(404, "routing can't be paused here: /capabilities has no level `routing`")
    return parts.routing


def _routing(parts: Parts) -> models.Routing:
    state = _offered(parts).state()
    return models.Routing(
        mode="paused" if state.paused else "auto",
        holder=state.holder,
        until=state.until,
        held=state.held,
        undeliverable=state.undeliverable,
    )


def _quota(quota: PluginQuota) -> models.Quota:
    return models.Quota(
        plugin=quota.plugin,
        resource=quota.resource,
        limit=quota.limit,
        ceiling=quota.ceiling,
        peak_need=quota.peak_need,
        rejected=quota.rejected,
    )
