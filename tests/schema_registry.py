"""A schema registry's REST interface, as far as a client that reads schemas asks for it, on loopback.

Ids and references as every registry has them; GUIDs as only Confluent's (since 8.0) has, which can't be had here. The
codecs meet a real registry in the integration tests.
"""

from __future__ import annotations

import json
import threading
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from dlq.codecs.registry import SchemaRegistry
from dlq.ports import Connection


class RegistryDouble:
    """``add`` schemas, then ask it. ``broken`` is the status it answers with instead, ``asked`` what was asked for."""

    def __init__(self) -> None:
        self.broken: int | None = None
        self.asked: list[str] = []
        self._schemas: list[dict[str, Any]] = []
        double = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                double.asked.append(self.path)
                status, said = double._answer(self.path.partition("?")[0].strip("/").split("/"))
                body = json.dumps(said).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/vnd.schemaregistry.v1+json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                """Tests need no access log."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def connection(self) -> Connection:
        extra = {"max.retries": 0, "timeout": 5}
        return Connection("registry", "http", "127.0.0.1", self._server.server_port, extra=extra)

    def client(self) -> SchemaRegistry:
        return SchemaRegistry.connect(self.connection)

    def add(
        self, schema: Any, kind: str = "AVRO", references: dict[str, int] | None = None, subject: str = "s"
    ) -> int:
        """Returns its id; ``references`` are names and the ids they stand for."""
        number = len(self._schemas) + 1
        known = [
            {"name": name, "subject": self._schemas[other - 1]["subject"], "version": other}
            for name, other in (references or {}).items()
        ]
        text = schema if isinstance(schema, str) else json.dumps(schema)
        self._schemas.append(
            {
                **({} if kind == "AVRO" else {"schemaType": kind}),
                **({"references": known} if known else {}),
                "schema": text,
                "id": number,
                "version": number,
                "subject": f"{subject}-{number}",
                "guid": str(uuid.uuid5(uuid.NAMESPACE_OID, text)),
            }
        )
        return number

    def guid(self, number: int) -> uuid.UUID:
        return uuid.UUID(self._schemas[number - 1]["guid"])

    def _answer(self, path: list[str]) -> tuple[int, Any]:
        if self.broken is not None:
            return self.broken, {"error_code": self.broken, "message": "broken"}
        match path:
            case ["schemas", "ids", number]:
                found = [s for s in self._schemas if str(s["id"]) == number]
            case ["schemas", "guids", guid]:
                found = [s for s in self._schemas if s["guid"] == guid]
            case ["subjects", subject, "versions", version]:
                found = [s for s in self._schemas if (s["subject"], str(s["version"])) == (subject, version)]
            case _:
                found = []
        return (200, found[0]) if found else (404, {"error_code": 40403, "message": "Schema not found"})
