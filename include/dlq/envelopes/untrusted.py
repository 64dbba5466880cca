"""Header bytes made safe to keep, compare and show: nothing here raises, whatever a producer wrote.

Postgres text holds no NUL, and what a dead letter says is shown in terminals and pages: control,
bidirectional and other invisible characters go.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from struct import Struct
from typing import Any

from dlq.memo import Memo

MESSAGE = 2_000
IDENTIFIER = 200
LAST_MS = 253_402_300_799_999
"""The last millisecond of the year 9999, beyond which no calendar here goes."""
INT32 = 2**31 - 1
INT64 = 2**63 - 1

_TOPIC = re.compile(rb"[A-Za-z0-9._-]{1,249}")  # the names a broker accepts
_DIGEST_AFTER = IDENTIFIER - 65
_INT, _LONG = Struct(">i").unpack, Struct(">q").unpack
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MS = timedelta(milliseconds=1)


def _clean(raw: bytes, limit: int) -> str:
    text = raw[: 4 * limit + 4].decode("utf-8", "replace")[:limit]
    if not text.isprintable():
        text = "".join(c if c.isprintable() else " " if c.isspace() else "" for c in text)
    return text


def _short(key: bytes) -> bool:
    return len(key) <= 512


_messages: Memo[bytes, str] = Memo(lambda raw: _clean(raw, MESSAGE), 4096, _short)
_labels: Memo[bytes, str | None] = Memo(lambda raw: _clean(raw, IDENTIFIER).strip() or None, 4096, _short)
_topics: Memo[bytes, str | None] = Memo(
    lambda raw: raw.decode() if _TOPIC.fullmatch(raw) else None, 1024, _short
)


def message(raw: bytes | None) -> str | None:
    """Prose, at most 2,000 characters; an empty message stays empty, a null one is None."""
    return None if raw is None else _messages[raw]


def label(raw: bytes | None) -> str | None:
    """A name (error type, component, stage), at most 200 characters; None where it says nothing."""
    return None if raw is None else _labels[raw]


def topic(raw: bytes | None) -> str | None:
    """A topic's name, or None where no broker would accept it."""
    return None if raw is None else _topics[raw]


def identifier(raw: bytes | None) -> str | None:
    """An id, at most 200 characters, of which two never become one by being cleaned or cut.

    Bytes that aren't UTF-8 (a binary UUID) become hex; what had to be cut or cleaned ends in their sha256.
    """
    if raw is None:
        return None
    if len(raw) <= IDENTIFIER:
        try:
            text = raw.decode()
        except UnicodeDecodeError:
            if len(raw) <= IDENTIFIER // 2:
                return raw.hex()
        else:
            text = text.strip()
            if text.isprintable():
                return text or None
    return f"{_clean(raw, _DIGEST_AFTER).strip()}:{sha256(raw).hexdigest()}"


def number(raw: bytes | None, most: int) -> int | None:
    """A decimal number from 0 to ``most``, or None."""
    if raw is None or len(raw) > 19 or not raw.isdigit():
        return None
    value = int(raw)
    return value if value <= most else None


def moment(raw: bytes | None) -> int | None:
    """A time in epoch milliseconds, or None."""
    return number(raw, LAST_MS)


def int32(raw: bytes | None) -> int | None:
    """A big-endian signed integer of 4 bytes, not negative, or None: Java's ``ByteBuffer.putInt``."""
    if raw is None or len(raw) != 4:
        return None
    value: int = _INT(raw)[0]
    return value if value >= 0 else None


def int64(raw: bytes | None, most: int = INT64) -> int | None:
    """The same of 8 bytes, at most ``most``: ``putLong``."""
    if raw is None or len(raw) != 8:
        return None
    value: int = _LONG(raw)[0]
    return value if 0 <= value <= most else None


def variable(raw: bytes | None, most: int) -> int | None:
    """The same of 1 to 8 bytes: ``BigInteger.toByteArray``."""
    if not raw or len(raw) > 8:
        return None
    value = int.from_bytes(raw, "big", signed=True)
    return value if 0 <= value <= most else None


def iso(raw: bytes | None) -> int | None:
    """A time in ISO 8601, in epoch milliseconds, or None; without a zone it is UTC."""
    if raw is None or len(raw) > 40:
        return None
    try:
        return epoch_ms(datetime.fromisoformat(raw.decode().strip()))
    except ValueError:
        return None


def epoch_ms(when: datetime) -> int | None:
    """A time in epoch milliseconds, or None before 1970."""
    if when.tzinfo is None:
        when = when.replace(tzinfo=UTC)
    ms = (when - _EPOCH) // _MS
    return ms if 0 <= ms <= LAST_MS else None


def encoded(value: Any) -> bytes | None:
    """A value out of JSON or a system attribute as a header would have held it: text, or a whole number in decimal."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace")
    return b"%d" % value if isinstance(value, int) and not isinstance(value, bool) else None
