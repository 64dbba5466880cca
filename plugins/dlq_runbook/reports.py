"""The app that shows a drain's report to whoever may see its Dag's runs."""

from __future__ import annotations

import re
from typing import Literal

from airflow.api_fastapi.core_api.security import DagAccessEntity, requires_access_dag
from fastapi import Depends, FastAPI, HTTPException, Response
from upath import UPath

from dlq.config import load_queue
from dlq.errors import ConfigError

HEADERS = {
    # The report has no script and loads nothing; this holds even if a dead letter got past its escaping.
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; img-src data:; sandbox",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "private, no-store",
}
MEDIA = {"html": "text/html; charset=utf-8", "json": "application/json"}
DAG = re.compile(r"dlq_(?:drain|review|chaos)__([a-z0-9_]{1,40})")
DRAIN = re.compile(r"([a-z0-9_]{1,40})-[0-9a-f]{12}")

# Airflow mounts it as it is: it inherits no authentication, so each route asks for its own.
app = FastAPI(title="DLQ reports", docs_url=None, redoc_url=None, openapi_url=None)


@app.get(
    "/report/{dag_id}/{drain}.{form}", dependencies=[Depends(requires_access_dag("GET", DagAccessEntity.RUN))]
)
def report(dag_id: str, drain: str, form: Literal["html", "json"]) -> Response:
    """A drain's report. What is asked for names a file only if both ids are of this bundle's making."""
    of_dag, of_drain = DAG.fullmatch(dag_id), DRAIN.fullmatch(drain)
    if of_dag is None or of_drain is None or of_dag[1] != of_drain[1]:
        raise HTTPException(404, "No such drain", headers=HEADERS)
    try:
        path = UPath(load_queue(of_dag[1]).report) / f"{drain}.{form}"
        content = path.read_bytes()
    except (ConfigError, FileNotFoundError):
        raise HTTPException(
            404, "No report yet: it is written when the drain is closed", headers=HEADERS
        ) from None
    return Response(content, media_type=MEDIA[form], headers=HEADERS)
