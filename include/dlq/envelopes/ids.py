"""The ids a record carries whatever its envelope: workflow, trace, dedupe key, earlier replays."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import msgspec

from dlq.entry import Understood
from dlq.envelopes.untrusted import identifier, number

_CORRELATION = (
    "correlationid",
    "xcorrelationid",
    "kafkacorrelationid",
    "nservicebus.correlationid",
    "xrequestid",
    "ceid",
)
_DEDUPE = ("dedupekey", "idempotencykey")
_TRACE = ("traceparent",)
_RETRIES = ("dlq-retry-count", "retry-count")
_MOST_RETRIES = 1_000_000

# https://www.w3.org/TR/trace-context/#traceparent-header: lower-case hex, no id all zeros, version ff is
# invalid; only a version after 00 may go on, after another dash.
_TRACEPARENT = re.compile(
    rb"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?"
)


class Where(msgspec.Struct, frozen=True):
    """Which of a record's headers hold which id, best first."""

    correlation: tuple[str, ...]
    trace: tuple[str, ...]
    dedupe: tuple[str, ...]
    retries: tuple[str, ...]


def where(names: Iterable[str]) -> Where:
    """Find the id headers among ``names``; but for the retries, case, ``-`` and ``_`` don't count."""
    names = tuple(names)
    spelled = [(name, name.lower().replace("-", "").replace("_", "")) for name in names]

    def ranked(known: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(name for wanted in known for name, plain in spelled if plain == wanted)

    return Where(
        ranked(_CORRELATION), ranked(_TRACE), ranked(_DEDUPE), tuple(n for n in _RETRIES if n in names)
    )


def read(headers: Mapping[str, bytes | None], at: Where, into: Understood) -> None:
    """Fill ``into``'s ids from ``headers``; a broken header costs that spelling of that id only."""
    for name in at.correlation:
        if (text := identifier(headers[name])) is not None:
            into.correlation_id = text
            break
    for name in at.trace:
        if (text := trace_id(headers[name])) is not None:
            into.trace_id = text
            break
    for name in at.dedupe:
        if (text := identifier(headers[name])) is not None:
            into.dedupe_key = text
            break
    for name in at.retries:
        if (count := number(headers[name], _MOST_RETRIES)) is not None:
            into.retry_count = count
            break


def trace_id(raw: bytes | None) -> str | None:
    """The trace id (32 hex digits) of a W3C ``traceparent``, or None where it isn't one."""
    if raw is None or (found := _TRACEPARENT.fullmatch(raw)) is None:
        return None
    return None if found[2] and raw.startswith(b"00") else found[1].decode()
