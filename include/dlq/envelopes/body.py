"""JSON bodies opened without trusting them: a broken field costs itself, a broken body nothing but what it held."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from dlq.envelopes.untrusted import encoded

Fields = Mapping[str, msgspec.Raw]

_FIELDS = msgspec.json.Decoder(dict[str, msgspec.Raw])
_VALUE = msgspec.json.Decoder()


def fields(raw: bytes | msgspec.Raw | None) -> Fields:
    """The fields of a JSON object, each unread; none where it isn't one."""
    if not raw:
        return {}
    try:
        return _FIELDS.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return {}


def value(raw: bytes | msgspec.Raw | None) -> Any:
    """A JSON value; None where it isn't one, or null."""
    if not raw:
        return None
    try:
        return _VALUE.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def text(raw: msgspec.Raw | None) -> bytes | None:
    """A JSON string, or a whole number in decimal, as a header would have held it; else None."""
    return encoded(value(raw))
