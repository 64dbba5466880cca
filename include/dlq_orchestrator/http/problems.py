"""Errors as problem+json (RFC 9457)."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from dlq_orchestrator.core.rate_limiter import AboveCeiling, UnknownPlugin
from dlq_orchestrator.core.registry import NoSuchPlugin, NotGrantable, StaleRevision
from dlq_orchestrator.failures import DataCorruption
from dlq_orchestrator.http.idempotency import KeyInUse, KeyReused
from dlq_orchestrator.http.models import Problem
from dlq_orchestrator.origin import NotSubmitted
from dlq_orchestrator.replays import NeverSeen, NoSuchStep, NotDebuggable
from dlq_orchestrator.routing import LeaseHeld

_STATUS: dict[type[Exception], int] = {
    AboveCeiling: 422,
    DataCorruption: 422,
    KeyInUse: 409,
    KeyReused: 422,
    LeaseHeld: 409,
    NoSuchPlugin: 404,
    NoSuchStep: 422,
    NotGrantable: 422,
    NeverSeen: 404,
    NotDebuggable: 409,
    NotSubmitted: 503,
    StaleRevision: 409,
    UnknownPlugin: 404,
}


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The responses of a route that are problems, for its OpenAPI."""
    return {
        status: {
            "description": HTTPStatus(status).phrase,
            "content": {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}},
        }
        for status in sorted({401, *statuses})
    }


def install(app: FastAPI) -> None:
    """Answer every error, the framework's too, as a problem."""

    @app.exception_handler(HTTPException)
    def http_error(_: Request, error: HTTPException) -> JSONResponse:
        return _problem(error.status_code, error.detail, error.headers)

    @app.exception_handler(RequestValidationError)
    def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        # without the input, which may be a payload
        errors = [{"at": ".".join(map(str, e["loc"])), "message": e["msg"]} for e in error.errors()]
        return _problem(422, "; ".join(f"{e['at']}: {e['message']}" for e in errors), errors=errors)

    def refused(_: Request, error: Exception) -> JSONResponse:
        more = {"ceiling": error.ceiling} if isinstance(error, AboveCeiling) else {}
        return _problem(_STATUS[type(error)], str(error), **more)

    @app.exception_handler(Exception)
    def broken(_: Request, __: Exception) -> JSONResponse:
        return _problem(500, "the orchestrator failed to answer; its log says why")

    for kind in _STATUS:
        app.add_exception_handler(kind, refused)


def _problem(status: int, detail: str, headers: Any = None, **more: Any) -> JSONResponse:
    problem = Problem(title=HTTPStatus(status).phrase, status=status, detail=detail, **more)
    return JSONResponse(problem.model_dump(), status, headers, "application/problem+json")
