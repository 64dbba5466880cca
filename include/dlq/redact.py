"""What must not be shown of untrusted text: credentials, addresses of people, long numbers and keys.

For messages and signatures on their way to a log, a page, a report or a notification. Payloads are never
shown at all; this is for the prose beside them.
"""

from __future__ import annotations

import re

_KEPT = 2_000
_HIDDEN: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern, re.IGNORECASE | re.ASCII), put)
    for pattern, put in (
        (r"\b([a-z][a-z0-9+.-]{1,15}://)[^\s/@]{1,256}@", r"\1<hidden>@"),
        (r"\b(bearer|basic)\s{1,4}[\w.~+/=-]{6,}+", r"\1 <hidden>"),
        (
            r"([\w.-]{0,40}(?:passw(?:or)?d|passwd|pwd|secret|token|credential|authorization|cookie|sessionid"
            r"|(?:api|access|private)[_-]?key)[\w.-]{0,40}[\"']?\s{0,4}[=:]\s{0,4})"
            r"(?!<hidden>|(?:bearer|basic) <hidden>)(?:\"[^\"\n]{0,500}\"|'[^'\n]{0,500}'|[^\s,;&)\]}]++)",
            r"\1<hidden>",
        ),
        (r"(?<![\w.+-])[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){1,8}", "<hidden>"),
        (r"\beyJ[\w-]{8,}+(?:\.[\w-]++){0,2}", "<hidden>"),  # a JSON web token
        (r"\bAKIA[0-9A-Z]{16}\b", "<hidden>"),
        (r"(?<!\w)\d(?:[ -]?\d){13,18}(?!\w)", "<hidden>"),  # as long as a card number
        (r"(?<![\w/+])(?=[\w/+-]{0,200}\d)[\w/+-]{40,}+=*", "<hidden>"),
    )
)


def redact(text: str) -> str:
    """``text`` without what looks like a secret or a person's address, at most 2,000 characters of it."""
    shown = text[:_KEPT]
    for pattern, put in _HIDDEN:
        shown = pattern.sub(put, shown)
    return shown
