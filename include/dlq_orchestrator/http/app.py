"""The HTTP application."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from dlq_orchestrator.http import models, problems
from dlq_orchestrator.http.faults import faults
from dlq_orchestrator.http.parts import Parts
from dlq_orchestrator.http.plugins import plugins
from dlq_orchestrator.http.replays import replays
from dlq_orchestrator.http.routes import CONTRACT_VERSION, contract, public


class _Application(FastAPI):
    def openapi(self) -> dict[str, Any]:
        """FastAPI's description, the body of problems, which its routes name by reference only, and the status of
        what can't be read.
        """
        schema = super().openapi()
        schema["components"]["schemas"]["Problem"] = models.Problem.model_json_schema()
        for operations in schema["paths"].values():
            for operation in operations.values():
                if "requestBody" in operation:
                    operation["responses"]["400"] = problems.documented(400)[400]
        return schema


def create_app(parts: Parts | None = None) -> FastAPI:
    """The application; without parts it can only describe itself."""
    app = _Application(
        title="Workflow orchestrator",
        version=CONTRACT_VERSION,
        description="What the dead-letter drain needs of an orchestrator. Prose: docs/orchestrator.md.",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        generate_unique_id_function=lambda route: route.name,
    )
    app.state.parts = parts
    app.include_router(public)
    # before the workflow's own route, whose id takes any path
    app.include_router(replays)
    app.include_router(contract)
    app.include_router(plugins)
    app.include_router(faults)
    problems.install(app)
    return app
