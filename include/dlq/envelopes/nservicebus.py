"""NServiceBus' error queue (.NET).

Sources: ``FaultMetadataExtractor``, ``FaultsHeaderKeys``, ``Headers`` and ``DateTimeOffsetHelper`` of NServiceBus. All
text; times are ``yyyy-MM-dd HH:mm:ss:ffffff Z``, with a colon before the microseconds.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from datetime import UTC, datetime

from dlq.entry import Understood
from dlq.envelopes import trace
from dlq.envelopes.letter import Letter
from dlq.envelopes.untrusted import INT32, epoch_ms, identifier, label, message, number

name = "nservicebus"

_FAILURE = ("NServiceBus.FailedQ", "NServiceBus.TimeOfFailure", "NServiceBus.ExceptionInfo.")
_OWNS = (*_FAILURE, "NServiceBus.Retries")  # what its own tools strip on a retry


def owns(header: str) -> bool:
    """What a replay must not carry, by prefix."""
    return header.startswith(_OWNS)


def recognises(names: AbstractSet[str]) -> bool:
    """One header of the failure is enough; others are on every message."""
    return any(each.startswith(_FAILURE) for each in names)


def read(letter: Letter) -> Understood:
    """The endpoint is the failing component; where it doesn't say so, the exception's source."""
    get = letter.last.get
    chain = trace.inner(get("NServiceBus.ExceptionInfo.StackTrace"))
    cause = label(get("NServiceBus.ExceptionInfo.InnerExceptionType"))
    return Understood(
        name,
        label(get("NServiceBus.ExceptionInfo.ExceptionType")),
        cause or trace.telling(chain),
        message(get("NServiceBus.ExceptionInfo.Message")),
        label(get("NServiceBus.ProcessingEndpoint")) or label(get("NServiceBus.ExceptionInfo.Source")),
        None,
        None,
        _moment(get("NServiceBus.TimeOfFailure")),
        None,
        None,
        None,
        _moment(get("NServiceBus.TimeSent")),
        causes=chain or ((cause,) if cause is not None else ()),
        origin_queue=identifier(get("NServiceBus.FailedQ")),
        retries=number(get("NServiceBus.Retries"), INT32),
    )


def _moment(raw: bytes | None) -> int | None:
    if raw is None or len(raw) != len("yyyy-MM-dd HH:mm:ss:ffffff Z"):
        return None
    try:
        return epoch_ms(datetime.strptime(raw.decode(), "%Y-%m-%d %H:%M:%S:%f Z").replace(tzinfo=UTC))
    except ValueError:
        return None
