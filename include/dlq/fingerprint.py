"""What failures have in common: a message without its values, and the fingerprint of the whole signature.

Every pattern is bounded or possessive, so that the time is linear whatever the message holds.
"""

from __future__ import annotations

import re
from hashlib import sha256

VERSION = "v1"
_READ = 2_000  # characters of a message that are looked at
_KEPT = 300  # characters of it that a signature keeps

_WORD = r"[A-Za-z0-9_]"

# In order: a later pattern sees what the earlier ones left. Each replaces a kind of value, never prose.
_VALUES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern, re.ASCII), put)
    for pattern, put in (
        (r"\b[A-Za-z][A-Za-z0-9+.-]{1,15}://[^\s\"'<>\\)\]]++", "<url>"),
        (r'"(?:[^"\\\n]|\\.){0,500}"', "<value>"),
        (r"`[^`\n]{0,500}`", "<value>"),
        (r"(?<!\w)'(?:[^'\n]|(?<=\w)'(?=\w)){0,500}'(?!\w)", "<value>"),
        (r"\b[0-9A-Fa-f]{8}-[0-9A-Fa-f]{4}-[0-9A-Fa-f]{4}-[0-9A-Fa-f]{4}-[0-9A-Fa-f]{12}\b", "<id>"),
        (
            r"\b\d{4}[-/]\d\d[-/]\d\d(?:[T ]\d\d:\d\d(?::\d\d(?:[.,:]\d{1,9})?)?)?"
            r"(?:\s?(?:Z|UTC|GMT|[+-]\d\d:?\d\d))?(?!\w)",
            "<time>",
        ),
        (
            r"\b(?:(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun)[a-z]{0,6},? )?(?:\d{1,2} )?"
            r"(?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec)[a-z]{0,6}"
            r" \d{1,4}(?: \d\d:\d\d:\d\d)?(?: (?:\d{4}|UTC|GMT|[+-]\d{4})){0,2}\b",
            "<time>",
        ),
        (r"\b\d\d:\d\d:\d\d(?:[.,]\d{1,9})?\b", "<time>"),
        (r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?::\d{1,5})?(?![\w.]\d)", "<addr>"),
        (
            r"(?<![\w:])\[?(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?:%\w{1,16})?\]?(?::\d{1,5})?(?![\w:])",
            "<addr>",
        ),
        (r"(?<![\w@.+-])[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){1,8}", "<addr>"),
        (r"(?<![\w/.])(?:[A-Za-z]:)?(?:[\\/][\w.@%+=,~-]{1,255}){2,64}[\\/]?", "<path>"),
        (r"@[0-9a-f]{4,16}\b", "@<hash>"),
        (r"\b0[xX][0-9A-Fa-f]{1,64}\b", "<hex>"),
        (rf"\b(?=[a-fA-F]{{0,63}}\d)[0-9A-Fa-f]{{8,}}+(?!{_WORD})", "<hex>"),
        # A long word with letters and digits in turns is an id (a ULID, a base64 key).
        (r"\b(?=\w{10})[A-Za-z_]{0,32}\d{1,16}[A-Za-z_]{1,16}\d\w*+", "<id>"),
    )
)
_QUICK = re.compile(r"[\d\"'`/\\@]|::")  # without any of these no value pattern can match
_NUMBER = re.compile(
    r"(?P<status>\b(?:HTTP(?:/\d(?:\.\d)?)?|[Ss]tatus(?:[ _-]?[Cc]ode)?)[\s:=]{1,3}[1-5]\d\d\b)"
    r"|(?:(?<![\w)])[-+])?\d(?:[\d_]|[.,](?=\d))*+",
    re.ASCII,
)
_LIST = re.compile(r"(<[a-z]{1,5}>)(?:\s?[,;]\s?\1|\s\1)++")
_SPACE = re.compile(r"\s+")


def _number(found: re.Match[str]) -> str:
    return found["status"] or "<n>"


def normalise(message: str) -> str:
    """``message`` with its numbers, ids, times, addresses, paths and quoted values replaced by their kind.

    An HTTP status that is named as one stays: 429 and 503 are different failures.
    """
    text = message[:_READ]
    if _QUICK.search(text):
        for pattern, put in _VALUES:
            text = pattern.sub(put, text)
        text = _NUMBER.sub(_number, text)
        text = _LIST.sub(r"\1 …", text)
    return _SPACE.sub(" ", text).strip()[:_KEPT]


def signature(error_type: str | None, cause: str | None, message: str | None, component: str | None) -> str:
    """The failure in one line: ``type < cause: message without its values @ component``."""
    text = error_type or "unknown error"
    if cause and cause != error_type:
        text += f" < {cause}"
    if message:
        text += f": {normalise(message)}"
    return f"{text} @ {component}" if component else text


def fingerprint(signature: str) -> str:
    """The name of a signature: the version of the rules above and 16 hex digits."""
    return f"{VERSION}:{sha256(signature.encode('utf-8', 'replace')).hexdigest()[:16]}"
