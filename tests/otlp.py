"""An OpenTelemetry collector for tests: a real HTTP server that reads OTLP (protobuf) and keeps what came."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

_KINDS: dict[str, Any] = {
    "/v1/traces": ExportTraceServiceRequest,
    "/v1/metrics": ExportMetricsServiceRequest,
    "/v1/logs": ExportLogsServiceRequest,
}


@dataclass(frozen=True)
class Span:
    """A span as it came; ids in hex, ``parent`` empty for a root."""

    service: str
    name: str
    trace: str
    id: str
    parent: str
    attributes: Mapping[str, Any]
    error: str | None
    events: tuple[Mapping[str, Any], ...]
    links: tuple[str, ...]


@dataclass(frozen=True)
class Line:
    """A log record as it came."""

    body: str
    trace: str
    attributes: Mapping[str, Any]


class Collector:
    """Keeps all that is sent to it; a context manager."""

    def __init__(self) -> None:
        self.raw = b""
        self._lock = threading.Lock()
        self._got: dict[str, list[Any]] = {path: [] for path in _KINDS}
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                with collector._lock:
                    collector.raw += body
                    collector._got[self.path].append(_KINDS[self.path].FromString(body))
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    @property
    def environment(self) -> dict[str, str]:
        """What a program needs to send its telemetry here, soon."""
        return {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{self._server.server_address[1]}",
            "OTEL_BSP_SCHEDULE_DELAY": "100",
            "OTEL_BLRP_SCHEDULE_DELAY": "100",
            "OTEL_METRIC_EXPORT_INTERVAL": "500",
        }

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def spans(self) -> list[Span]:
        return [
            Span(
                str(_attributes(resource.resource.attributes).get("service.name")),
                span.name,
                span.trace_id.hex(),
                span.span_id.hex(),
                span.parent_span_id.hex(),
                _attributes(span.attributes),
                (span.status.message or "error")
                if span.status.code == span.status.STATUS_CODE_ERROR
                else None,
                tuple(_attributes(event.attributes) for event in span.events),
                tuple(link.trace_id.hex() for link in span.links),
            )
            for request in self._of("/v1/traces")
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]

    def lines(self) -> list[Line]:
        return [
            Line(record.body.string_value, record.trace_id.hex(), _attributes(record.attributes))
            for request in self._of("/v1/logs")
            for resource in request.resource_logs
            for scope in resource.scope_logs
            for record in scope.log_records
        ]

    def points(self, metric: str) -> list[tuple[Mapping[str, Any], float]]:
        """The newest points of a metric: attributes, and the value (a histogram's count)."""
        found: dict[tuple[tuple[str, Any], ...], float] = {}
        for request in self._of("/v1/metrics"):
            for resource in request.resource_metrics:
                for scope in resource.scope_metrics:
                    for one in scope.metrics:
                        if one.name == metric:
                            for point in _points(one):
                                value = getattr(point, "count", None) or point.as_int
                                found[tuple(sorted(_attributes(point.attributes).items()))] = value
        return [(dict(attributes), value) for attributes, value in found.items()]

    def _of(self, path: str) -> list[Any]:
        with self._lock:
            return list(self._got[path])


def _points(metric: Any) -> Iterator[Any]:
    yield from getattr(metric, metric.WhichOneof("data")).data_points


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in pairs}
