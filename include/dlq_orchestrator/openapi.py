"""Writes the contract as OpenAPI: `python -m dlq_orchestrator.openapi docs/openapi.json`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from dlq_orchestrator.http.app import create_app


def openapi_json() -> str:
    """The OpenAPI document as it is committed."""
    return json.dumps(create_app().openapi(), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(openapi_json())
