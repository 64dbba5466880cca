"""OpenTelemetry spans of a drain: they continue whatever is traced around them, an Airflow task or a TRACEPARENT.

Names and attributes: docs/telemetry.md. Figures only, never a payload.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Link, Span, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

_tracer = trace.get_tracer("dlq")
_W3C = TraceContextTextMapPropagator()
_END_MS = 5_000


class StageSpan:
    """The span of one stage; its error, if one passes, has the error's type, not its text."""

    def __init__(self, span: Span) -> None:
        self._span = span

    def of(self, queue: str, drain: str, *, dry_run: bool) -> None:
        """Say whose stage it is."""
        self._span.set_attributes({"dlq.queue": queue, "dlq.drain": drain, "dlq.dry_run": dry_run})

    def came_to(self, result: object) -> None:
        """The figures of a stage's result."""
        if self._span.is_recording() and isinstance(result, Mapping):
            for name, value in result.items():
                if isinstance(value, bool | int | float):
                    self._span.set_attribute(f"dlq.{name}", value)


@contextmanager
def stage(name: str) -> Iterator[StageSpan]:
    """The span of a stage of the runbook, below the one that is current."""
    with _tracer.start_as_current_span(name, record_exception=False, set_status_on_exception=False) as span:
        try:
            yield StageSpan(span)
        except Exception as error:
            span.set_status(Status(StatusCode.ERROR))
            span.set_attribute("error.type", type(error).__name__)
            raise


@contextmanager
def own_trace(name: str) -> Iterator[None]:
    """A span with a trace of its own, linked to the current one: what runs in it is told apart."""
    current = trace.get_current_span().get_span_context()
    links = [Link(current)] if current.is_valid else []
    with _tracer.start_as_current_span(name, context=Context(), links=links):
        yield


def headers() -> dict[str, str]:
    """The current context as HTTP headers; none where nothing is traced."""
    carrier: dict[str, str] = {}
    _W3C.inject(carrier)
    return carrier


@contextmanager
def exported(command: str) -> Iterator[None]:
    """The span of a command. It goes out over OTLP where the environment says so, below ``TRACEPARENT`` if that is set.

    Airflow has an exporter of its own: there this is not used.
    """
    names = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or not any(map(os.environ.get, names)):
        yield
        return
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    named: dict[str, Any] = {} if os.environ.get("OTEL_SERVICE_NAME") else {"service.name": "dlq"}
    provider = TracerProvider(resource=Resource.create(named), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    carried = _W3C.extract({"traceparent": os.environ.get("TRACEPARENT", "")}, context=Context())
    try:
        with _tracer.start_as_current_span(command, context=carried, record_exception=False):
            yield
    finally:
        provider.force_flush(_END_MS)
