"""Lambda's on-failure destinations: a JSON body with the event, the answer and why it was given up.

Source: messages recorded against the service. Of a stream (Kinesis, DynamoDB) it holds only which batch failed: a
pointer. Of an asynchronous invocation ``requestPayload`` is the event.
"""

from __future__ import annotations

from typing import Any

from dlq.entry import Understood
from dlq.envelopes import body, pointer, trace
from dlq.envelopes.untrusted import INT32, encoded, identifier, iso, label, message, number

INVOCATION = "lambda-destination"
STREAM = "lambda-stream"

_STREAMS = (("KinesisBatchInfo", "kinesis"), ("DDBStreamBatchInfo", "dynamodb"))
_DEEPEST = 32


def read(raw: bytes) -> Understood | None:
    """What the record of an invocation says; None where the body is none."""
    if b'"requestContext"' not in raw or b'"condition"' not in raw:
        return None
    record = body.fields(raw)
    context = body.fields(record.get("requestContext"))
    function, condition = body.text(context.get("functionArn")), body.text(context.get("condition"))
    if function is None or condition is None:
        return None
    answer = body.fields(record.get("responsePayload"))
    status = number(body.text(body.fields(record.get("responseContext")).get("statusCode")), 599)
    chain = _causes(answer)
    found = Understood(
        INVOCATION,
        label(body.text(answer.get("errorType"))),
        trace.telling(chain),
        message(body.text(answer.get("errorMessage"))),
        label(function),
        label(condition),
        number(body.text(context.get("approximateInvokeCount")), INT32),
        iso(body.text(record.get("timestamp"))),
        correlation_id=identifier(body.text(context.get("requestId"))),
        causes=chain,
        http_status=status if status is not None and status >= 400 else None,
    )
    for key, scheme in _STREAMS:
        if key in record:
            _batch(body.fields(record[key]), scheme, found)
    return found


def _batch(info: body.Fields, scheme: str, into: Understood) -> None:
    """Where the batch lies, and when its first record came."""
    into.format = STREAM
    stream, shard, first, last = (
        label(body.text(info.get(each)))
        for each in ("streamArn", "shardId", "startSequenceNumber", "endSequenceNumber")
    )
    into.pointer = (
        f"{scheme}:"
        if stream is None or shard is None or first is None or last is None
        else pointer.batch(scheme, stream, shard, first, last)
    )
    into.origin_timestamp_ms = iso(body.text(info.get("approximateArrivalOfFirstRecord")))


def _causes(answer: body.Fields) -> tuple[str, ...]:
    """The classes of the causes that Java's runtime nests: ``cause: {errorType, cause}``."""
    found: list[str] = []
    cause: Any = body.value(answer.get("cause"))
    while isinstance(cause, dict) and len(found) < _DEEPEST:
        if (named := label(encoded(cause.get("errorType")))) is not None:
            found.append(named)
        cause = cause.get("cause")
    return tuple(found)
