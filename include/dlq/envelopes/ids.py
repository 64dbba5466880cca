"""The ids a record carries whatever its envelope: workflow, trace, dedupe key, earlier replays.

Names are compared without regard to case, ``-`` and ``_``. A trace id is the 32 hex digits that OpenTelemetry knows it
by, whichever propagator wrote it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from hashlib import sha256

import msgspec

from dlq import mark
from dlq.entry import Record, Understood
from dlq.envelopes.untrusted import encoded, identifier, number

_CORRELATION = (
    "correlationid",
    "xcorrelationid",
    "kafkacorrelationid",
    "nservicebus.correlationid",
    "nservicebus.conversationid",
    "xrequestid",
    "ceid",
)
_DEDUPE = ("dedupekey", "idempotencykey", "messagededuplicationid")
_RETRIES = ("dlqretrycount", "retrycount")
_RETRIED = "xretrycount"  # an application's own retries: nobody replayed it
_MOST_RETRIES = 1_000_000

# https://www.w3.org/TR/trace-context/#traceparent-header: lower-case hex, no id all zeros, version ff is
# invalid; only a version after 00 may go on, after another dash.
_TRACEPARENT = re.compile(
    rb"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?"
)
# https://github.com/openzipkin/b3-propagation: 16 or 32 hex digits; in one header the span and more follow.
_B3 = re.compile(rb"([0-9a-f]{16}(?:[0-9a-f]{16})?)(-.*)?", re.IGNORECASE)
# https://docs.aws.amazon.com/xray/latest/devguide/xray-concepts.html: Root=1-<time, 8 hex>-<24 hex>;Parent=…;Sampled=1
_XRAY = re.compile(rb"(?:^|;)\s*Root=1-([0-9a-f]{8})-([0-9a-f]{24})(?:;|$)", re.IGNORECASE)
# Datadog: the lower 64 bits in decimal; the upper ones, if any, in hex among the tags.
_DATADOG_UPPER = re.compile(rb"(?:^|,)_dd\.p\.tid=([0-9a-f]{16})(?:,|$)")


class Where(msgspec.Struct, frozen=True):
    """Which of a record's headers hold which id, best first; traces with how each is read."""

    correlation: tuple[str, ...]
    trace: tuple[tuple[str, Callable[[bytes | None], str | None]], ...]
    dedupe: tuple[str, ...]
    retries: tuple[str, ...]
    retried: tuple[str, ...]
    datadog_tags: tuple[str, ...]


def where(names: Iterable[str]) -> Where:
    """Find the id headers among ``names``."""
    spelled = [(name, name.lower().replace("-", "").replace("_", "")) for name in names]

    def ranked(*known: str) -> tuple[str, ...]:
        return tuple(name for wanted in known for name, plain in spelled if plain == wanted)

    return Where(
        ranked(*_CORRELATION),
        tuple((name, read) for plain, read in _TRACES for name in ranked(plain)),
        ranked(*_DEDUPE),
        ranked(*_RETRIES),
        ranked(_RETRIED),
        ranked("xdatadogtags"),
    )


def read(headers: Mapping[str, bytes | None], at: Where, into: Understood) -> None:
    """Fill ``into``'s ids from ``headers``; a broken header costs that spelling of that id only."""
    for name in at.correlation:
        if (text := identifier(headers[name])) is not None:
            into.correlation_id = text
            break
    for name, reads in at.trace:
        if (text := reads(headers[name])) is not None:
            into.trace_id = _whole(text, headers, at) if reads is datadog else text
            break
    for name in at.dedupe:
        if (text := identifier(headers[name])) is not None:
            into.dedupe_key = text
            break
    for name in at.retries:
        if (count := number(headers[name], _MOST_RETRIES)) is not None:
            into.retry_count = into.retries = count
            break
    else:
        for name in at.retried:
            if (count := number(headers[name], _MOST_RETRIES)) is not None:
                into.retries = count
                break


def of_message(record: Record, system: Mapping[str, str], into: Understood) -> None:
    """Fill in what only an SQS message says: in system attributes the trace, and a deduplication id that its sender
    chose; in our mark how often it was replayed.

    That of a content-deduplicating queue is the body's sum, and that of a message moved to a FIFO dead-letter queue its
    MessageId: neither is a key of anybody's.
    """
    for name, value in record.headers:
        if name == mark.NAME and value is not None and (said := mark.read(value)) is not None:
            into.retry_count = into.retries = said.retry
    if into.trace_id is None:
        into.trace_id = xray(encoded(system.get("AWSTraceHeader")))
    if into.dedupe_key is not None or "DeadLetterQueueSourceArn" in system:
        return
    chosen = system.get("MessageDeduplicationId")
    if chosen and chosen not in (record.place, sha256(record.value or b"").hexdigest()):
        into.dedupe_key = identifier(encoded(chosen))


def traceparent(raw: bytes | None) -> str | None:
    """The trace id of a W3C ``traceparent``, or None where it isn't one."""
    if raw is None or (found := _TRACEPARENT.fullmatch(raw)) is None:
        return None
    return None if found[2] and raw.startswith(b"00") else found[1].decode()


def b3(raw: bytes | None) -> str | None:
    """The trace id of Zipkin's ``b3`` or ``X-B3-TraceId``; one of 64 bits has zeros before it."""
    if raw is None or (found := _B3.fullmatch(raw)) is None:
        return None
    return _nonzero(found[1].decode().lower().zfill(32))


def xray(raw: bytes | None) -> str | None:
    """The trace id of an X-Ray header's root: its time and its random part."""
    if raw is None or (found := _XRAY.search(raw)) is None:
        return None
    return _nonzero((found[1] + found[2]).decode().lower())


def datadog(raw: bytes | None) -> str | None:
    """The trace id of ``x-datadog-trace-id``, as far as it says it: 64 bits, in decimal."""
    if raw is None or len(raw) > 20 or not raw.isdigit() or int(raw) >= 2**64:
        return None
    return _nonzero(f"{int(raw):032x}")


def _whole(lower: str, headers: Mapping[str, bytes | None], at: Where) -> str:
    for name in at.datadog_tags:
        if (found := _DATADOG_UPPER.search(headers[name] or b"")) is not None:
            return found[1].decode() + lower[16:]
    return lower


def _nonzero(digits: str) -> str | None:
    return digits if digits.strip("0") else None


_TRACES = (
    ("traceparent", traceparent),
    ("cetraceparent", traceparent),  # CloudEvents' distributed tracing extension
    ("mtactivityid", traceparent),  # MassTransit
    ("b3", b3),
    ("xb3traceid", b3),
    ("xamzntraceid", xray),
    ("awstraceheader", xray),
    ("xdatadogtraceid", datadog),
)
