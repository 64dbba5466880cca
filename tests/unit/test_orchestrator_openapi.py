"""The committed contract is the one the reference orchestrator keeps."""

from __future__ import annotations

from pathlib import Path

from dlq_orchestrator.http.app import create_app
from dlq_orchestrator.openapi import openapi_json

COMMITTED = Path(__file__).parents[2] / "docs" / "openapi.json"


def test_the_committed_openapi_is_what_the_orchestrator_serves():
    assert COMMITTED.read_text() == openapi_json(), (
        "run: python -m dlq_orchestrator.openapi docs/openapi.json"
    )


def test_every_path_but_the_health_check_asks_for_the_token():
    paths = create_app().openapi()["paths"]
    for path, operations in paths.items():
        for operation in operations.values():
            assert bool(operation.get("security")) == (path != "/healthz"), path


# queries; keys of their own; the same whenever it is repeated
NO_KEY = ("/v1/outcomes", "/v1/failures", "/v1/replays", "/v1/faults/{name}")


def test_every_error_is_a_problem_and_every_change_takes_an_idempotency_key():
    for path, operations in create_app().openapi()["paths"].items():
        for method, operation in operations.items():
            for status, response in operation["responses"].items():
                if status >= "400":
                    assert list(response["content"]) == ["application/problem+json"], (path, status)
            names = [parameter["name"] for parameter in operation.get("parameters", [])]
            changes = method in ("post", "put", "patch") and path not in NO_KEY
            assert ("Idempotency-Key" in names) == changes, path
