"""Header bytes made safe to keep, compare and show: nothing here raises, whatever a producer wrote.

Postgres text holds no NUL, and what a dead letter says is shown in terminals and pages: control,
bidirectional and other invisible characters go.
"""

from __future__ import annotations

import re
from hashlib import sha256

from dlq.memo import Memo

MESSAGE = 2_000
IDENTIFIER = 200
LAST_MS = 253_402_300_799_999
"""The last millisecond of the year 9999, beyond which no calendar here goes."""

_TOPIC = re.compile(rb"[A-Za-z0-9._-]{1,249}")  # the names a broker accepts
_DIGEST_AFTER = IDENTIFIER - 65


def _clean(raw: bytes, limit: int) -> str:
    text = raw[: 4 * limit + 4].decode("utf-8", "replace")[:limit]
    if not text.isprintable():
        text = "".join(c if c.isprintable() else " " if c.isspace() else "" for c in text)
    return text.strip()


def _short(key: bytes) -> bool:
    return len(key) <= 512


_messages: Memo[bytes, str] = Memo(lambda raw: _clean(raw, MESSAGE), 4096, _short)
_labels: Memo[bytes, str | None] = Memo(lambda raw: _clean(raw, IDENTIFIER) or None, 4096, _short)
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
    return f"{_clean(raw, _DIGEST_AFTER)}:{sha256(raw).hexdigest()}"


def number(raw: bytes | None, most: int) -> int | None:
    """A decimal number from 0 to ``most``, or None."""
    if raw is None or len(raw) > 19 or not raw.isdigit():
        return None
    value = int(raw)
    return value if value <= most else None


def moment(raw: bytes | None) -> int | None:
    """A time in epoch milliseconds, or None."""
    return number(raw, LAST_MS)
