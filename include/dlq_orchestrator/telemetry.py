"""OpenTelemetry: spans, metrics and logs of the orchestrator, sent over OTLP where the standard environment says so.

Names, attributes and variables: docs/telemetry.md. Nothing here carries a payload: no arguments, no outputs.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any

from opentelemetry import _logs, metrics, trace
from opentelemetry._logs import SeverityNumber
from opentelemetry.context import Context
from opentelemetry.metrics import CallbackOptions, Observation
from opentelemetry.trace import INVALID_SPAN, Span, SpanKind, Status, StatusCode, TraceFlags
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from dlq_orchestrator.failures import StepError
from dlq_orchestrator.workflow import Record, Run, Step

SERVICE = "dlq-orchestrator"
_SIGNALS = ("TRACES", "METRICS", "LOGS")
_END_S = 5.0
_W3C = TraceContextTextMapPropagator()
_on = False
"""Whether anybody is told: spans that nobody sees would cost a tenth of the throughput."""

_tracer = trace.get_tracer(SERVICE)
_meter = metrics.get_meter(SERVICE)
_logger = _logs.get_logger(SERVICE)

_workflows = _meter.create_counter("workflow.runs", "{run}", "Runs of workflows, by how they ended")
_calls = _meter.create_histogram("workflow.tool_call.duration", "s", "Calls of plugins, by tool and error")
_retries = _meter.create_counter("workflow.retries", "{retry}", "Tries of a step after its first")

Attributes = dict[str, str | int | bool]


def wanted(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the environment names where telemetry goes (OpenTelemetry's own variables)."""
    if environment.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return False
    names = ("OTEL_EXPORTER_OTLP_ENDPOINT", *(f"OTEL_EXPORTER_OTLP_{each}_ENDPOINT" for each in _SIGNALS))
    return any(environment.get(name) for name in names)


@contextmanager
def exported() -> Iterator[None]:
    """While it lasts what is told goes out, in the background; at its end what is left has five seconds.

    A collector that is away costs what it would have got, and nothing else: queues are bounded.
    """
    if not wanted():
        yield
        return
    from opentelemetry.exporter.otlp.proto.http._log_exporter import OTLPLogExporter
    from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk._logs import LoggerProvider
    from opentelemetry.sdk._logs.export import BatchLogRecordProcessor
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    named = {} if os.environ.get("OTEL_SERVICE_NAME") else {"service.name": SERVICE}
    resource = Resource.create(named)
    spans = TracerProvider(resource=resource, shutdown_on_exit=False)
    spans.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    figures = MeterProvider(
        [PeriodicExportingMetricReader(OTLPMetricExporter())], resource=resource, shutdown_on_exit=False
    )
    lines = LoggerProvider(resource=resource, shutdown_on_exit=False)
    lines.add_log_record_processor(BatchLogRecordProcessor(OTLPLogExporter()))
    trace.set_tracer_provider(spans)
    metrics.set_meter_provider(figures)
    _logs.set_logger_provider(lines)
    global _on
    _on = True
    try:
        yield
    finally:
        ending = [
            threading.Thread(target=provider.shutdown, daemon=True) for provider in (spans, figures, lines)
        ]
        for thread in ending:
            thread.start()
        for thread in ending:
            thread.join(_END_S)


# What is measured when it is asked for

Reading = Callable[[], Iterable[tuple[int, Attributes]]]
"""The values of now, each with its attributes."""


def observe(circuits_open: Reading, quota_refusals: Reading, held: Reading) -> None:
    """Have plugins' open circuits, refusals by quota, and failures held by a routing lease measured."""

    def answering(reading: Reading) -> Callable[[CallbackOptions], Iterable[Observation]]:
        return lambda _: [Observation(value, attributes) for value, attributes in reading()]

    _meter.create_observable_gauge(
        "plugin.circuit.open", [answering(circuits_open)], "1", "1: the plugin's circuit is open or half-open"
    )
    _meter.create_observable_counter(
        "plugin.quota.refusals", [answering(quota_refusals)], "{call}", "Calls refused by a quota"
    )
    _meter.create_observable_gauge(
        "routing.held", [answering(held)], "{failure}", "Failures that a routing lease holds back"
    )


# Spans


@contextmanager
def workflow_span(record: Record, name: str | None, correlation_id: str, dedupe_key: str) -> Iterator[Span]:
    """The span of one run of a record; it continues the trace in the record's headers."""
    if not _on:
        yield INVALID_SPAN
        return
    attributes: Attributes = {
        "messaging.operation.type": "process",
        "messaging.message.id": record.place,
        "workflow.correlation_id": correlation_id,
        "workflow.dedupe_key": dedupe_key,
        "workflow.retry_count": record.retry_count,
    }
    if record.replay_key:
        attributes["dlq.key"] = record.replay_key
    with _tracer.start_as_current_span(
        f"workflow {name or 'unreadable'}",
        context=_carried(record),
        kind=SpanKind.CONSUMER,
        attributes=attributes,
    ) as span:
        yield span


@contextmanager
def step_span(step: Step, correlation_id: str) -> Iterator[Span]:
    if not _on:
        yield INVALID_SPAN
        return
    attributes: Attributes = {"workflow.step": step.name, "workflow.correlation_id": correlation_id}
    with _tracer.start_as_current_span(f"step {step.name}", attributes=attributes) as span:
        yield span


@contextmanager
def tool_call(step: Step, correlation_id: str, attempt: int) -> Iterator[None]:
    """One try of a step: its span and its duration; a `StepError` that passes is the span's error."""
    if not _on:
        yield
        return
    attributes: Attributes = {
        "plugin": step.plugin,
        "tool": step.tool,
        "attempt": attempt,
        "workflow.correlation_id": correlation_id,
    }
    told: Attributes = {"plugin": step.plugin, "tool": step.tool}
    if attempt > 1:
        _retries.add(1, told)
    with (
        _tracer.start_as_current_span(
            f"tool_call {step.component}",
            kind=SpanKind.CLIENT,
            attributes=attributes,
            record_exception=False,
            set_status_on_exception=False,
        ) as span,
        _timed(told),
    ):
        try:
            yield
        except StepError as error:
            told["error.type"] = error.error_type
            failed(span, error.error_type, str(error))
            raise


@contextmanager
def _timed(told: Attributes) -> Iterator[None]:
    began = time.monotonic()
    try:
        yield
    finally:
        _calls.record(time.monotonic() - began, told)


def failed(span: Span, error_type: str, message: str) -> None:
    """Say why a span failed: the failure's own type and message, which hold no payload."""
    if span.is_recording():
        span.set_status(Status(StatusCode.ERROR, error_type))
        span.set_attribute("error.type", error_type)
        span.add_event("exception", {"exception.type": error_type, "exception.message": message})


def ended(span: Span, run: Run) -> None:
    """A workflow's run is over."""
    if not _on:
        return
    _workflows.add(1, {"workflow": run.workflow or "unreadable", "state": run.state})
    if run.duplicate_of is not None:
        span.set_attribute("workflow.duplicate_of", run.duplicate_of)
    if run.failure is not None:
        failed(span, run.failure.error_type, run.failure.message)


def traceparent(span: Span) -> str | None:
    """A span's context as the W3C header; None where nothing is traced."""
    context = span.get_span_context()
    if not context.is_valid:
        return None
    flags = context.trace_flags & TraceFlags.SAMPLED
    return f"00-{trace.format_trace_id(context.trace_id)}-{trace.format_span_id(context.span_id)}-{flags:02x}"


def _carried(record: Record) -> Context:
    """The context in a record's headers; an empty one where it has none, or a broken one."""
    carrier = {name: text for name in ("traceparent", "tracestate") if (text := record.text(name))}
    return _W3C.extract(carrier, context=Context())


# Logs


def correlated(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """A processor for structlog: the current trace, beside what is said."""
    context = trace.get_current_span().get_span_context()
    if context.is_valid:
        event["trace_id"] = trace.format_trace_id(context.trace_id)
        event["span_id"] = trace.format_span_id(context.span_id)
    return event


_SEVERITIES = {
    "debug": SeverityNumber.DEBUG,
    "info": SeverityNumber.INFO,
    "warning": SeverityNumber.WARN,
    "error": SeverityNumber.ERROR,
    "critical": SeverityNumber.FATAL,
}


def sent(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """A processor for structlog: the line goes out as a log record, too."""
    level = str(event.get("level", "info"))
    attributes = {
        name: value if isinstance(value, str | bool | int | float) else str(value)
        for name, value in event.items()
        if name not in ("event", "level", "timestamp", "trace_id", "span_id")
    }
    _logger.emit(
        body=str(event.get("event")),
        severity_text=level,
        severity_number=_SEVERITIES.get(level, SeverityNumber.UNSPECIFIED),
        attributes=attributes,
    )
    return event
