"""What a rule of the taxonomy can look at, and when its conditions hold."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from fnmatch import translate
from functools import cached_property, lru_cache
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from dlq.entry import Headers, Understood
from dlq.grouping.phrases import Phrases
from dlq.memo import Memo

# A status beside its own reason: "order 503 not found" names none.
_REASONED = "|".join(
    rf"{code}[\s:(-]{{1,3}}(?:{reason})\b"
    for code, reason in {
        "400": "Bad Request",
        "401": "Unauthori[sz]ed",
        "402": "Payment Required",
        "403": "Forbidden",
        "404": "Not Found",
        "405": "Method Not Allowed",
        "408": "Request Time-?out",
        "409": "Conflict",
        "410": "Gone",
        "412": "Precondition Failed",
        "413": "(?:Payload|Content|Request Entity) Too Large",
        "422": "Unprocessable (?:Entity|Content)",
        "429": "Too Many Requests",
        "4\\d\\d": "Client Error",
        "500": "Internal Server Error",
        "501": "Not Implemented",
        "502": "(?:Bad Gateway|Proxy Error)",
        "503": "(?:Service (?:Temporarily )?Unavailable|Slow Down)",
        "504": "Gateway Time-?out",
        "5\\d\\d": "Server Error",
    }.items()
)
_STATUS = re.compile(
    r"\b(?:HTTP(?:/\d(?:\.\d)?)?(?: error)?(?: code)?"
    r"|(?:HTTP )?(?:response )?status(?:[ _-]?code)?(?: is| was| of)?|(?:error|response|reply)[ _-]?code)"
    r"(?: does not indicate success)?[\"']?[\s:=(]{1,3}([1-5]\d\d)\b"
    rf"|\b(?=([1-5]\d\d))(?:{_REASONED})"
    r"|\b(?:returned|responded(?: with)?|answered(?: with)?|replied(?: with)?|received|got|failed with|error)(?: an?)?"
    r" ([45]\d\d)(?=\Z|[.,;:)\]\"']| (?:from|for|on|when|while|after|error|response)\b)"
    r"|\A\[([45]\d\d)\] during \[|\AAn error occurred \(([45]\d\d)\)",  # Feign, botocore
    re.IGNORECASE | re.ASCII,
)

_THREE_DIGITS = re.compile(r"(?<!\d)[1-5]\d\d(?!\d)", re.ASCII)

# Where messages name an error: a class, a name in brackets, a code after its name, an errno, a status of gRPC, a type
# of Elasticsearch, a name and nothing else.
_CLASS = re.compile(
    r"(?<![\w.$/\"'`])[A-Za-z_][\w.$]{2,200}+"
    r"(?:(?<=\w\wException)|(?<=\w\wError)|(?<=\w\wFault)|(?<=\w\wTimeout))(?![\w$/\"'`<])"
)
_CLASSES = ("Exception", "Error", "Timeout", "Fault")
_BRACKETED = re.compile(r"\(((?:[a-z_]\w{0,40}\.){0,6}[A-Z][A-Za-z]{3,80}(?:\.[A-Za-z]{1,80})?)\)")
_CODED = re.compile(
    r"(?:\bcode|(?:error|fault|exception|status)[ _]?(?:code|type)|\b__type)[\"']?\s?[:=]\s?[\"']?([a-z][\w.#]{2,80})",
    re.IGNORECASE,
)
_ERRNO = re.compile(r"\b(?:E[A-Z]{3,15}|EAI_[A-Z]{2,10})\b")
_GRPC = re.compile(r"([A-Z]{3,20}(?:_[A-Z]{2,20}){0,4}): ")
_STATUS_CODE = re.compile(r"\bStatusCode\.([A-Z_]{2,24})\b")
_SNAKE = re.compile(r"\b[a-z]{2,24}(?:_[a-z]{2,24}){0,5}_(?:exception|error)(?![\w.])")
_ALONE = re.compile(r"[A-Z][A-Za-z]{2,40}+")
_MOST_NAMED = 8


def http_status(message: str | None) -> int | None:
    """The HTTP status a message names as one: ``HTTP 503``, ``status=429``, ``502 Bad Gateway``; or None."""
    if not message or not _THREE_DIGITS.search(message):
        return None
    found = _STATUS.search(message)
    return int(found[found.lastindex or 0]) if found else None


def named(message: str | None) -> tuple[str, ...]:
    """The error names that a message mentions outside of quotes, eight at most."""
    if not message:
        return ()
    found = _ERRNO.findall(message)
    if any(name in message for name in _CLASSES):
        found += _CLASS.findall(message)
    if "(" in message:
        found += _BRACKETED.findall(message)
    if "ode" in message or "ype" in message:
        found += _CODED.findall(message)
        found += _STATUS_CODE.findall(message)
    if "_e" in message:
        found += _SNAKE.findall(message)
    if _ALONE.fullmatch(message):
        found.append(message)
    if (status := _GRPC.match(message)) is not None:
        found.append(status[1])
    return tuple(dict.fromkeys(found))[:_MOST_NAMED]


_PACKAGE = re.compile(r".*[.$:#/*\s]", re.DOTALL)
_SUFFIX = re.compile(r"(?<=.)(?:exception|error|fault)\Z")


def plain(name: str) -> str:
    """An error's name as rules compare it: without its package, case, ``_`` and ``-``, and the ``Exception``,
    ``Error`` or ``Fault`` at its end. ``java.net.SocketTimeoutException`` is ``sockettimeout``.
    """
    return folded(_PACKAGE.sub("", name.rstrip(" .:")))


@lru_cache(4096)
def folded(name: str) -> str:
    """The same of a pattern, which names no package."""
    return _SUFFIX.sub("", name.lower().replace("_", "").replace("-", ""))


def _some(value: Any) -> Any:
    return value if value is None or isinstance(value, (list, tuple)) else [value]


def _texts(value: Any) -> Any:
    return [str(v) if isinstance(v, int) and not isinstance(v, bool) else v for v in _some(value)]


_Patterns = tuple[Annotated[str, Field(min_length=1)], ...]
_Some = Annotated[_Patterns | None, BeforeValidator(_some)]
_Statuses = Annotated[
    tuple[Annotated[str, Field(pattern=r"^[1-5](\d\d|xx)$")], ...] | None, BeforeValidator(_texts)
]


class When(BaseModel):
    """A rule's conditions: all must hold; of a list, one.

    ``exception`` looks at the error type and its causes, but for wrappers; where no rule knows any of them, at the
    error names in the message. ``error_type`` and ``cause_type`` look at that field only. All three are compared as
    :func:`plain` says; with a dot in it a pattern means the whole name. ``component``, ``stage`` and each
    ``header`` are compared without case. In all of them ``*`` and ``?`` match. ``message`` is part of the message,
    without case; ``message_matches`` a regular expression found in it. ``status`` is an HTTP status (503, 5xx): the
    envelope's own, or one that the message names as such. ``retry_count_at_least`` counts earlier tries.
    ``headerless: true`` holds where nothing is said about the failure.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    exception: _Some = None
    error_type: _Some = None
    cause_type: _Some = None
    component: _Some = None
    stage: _Some = None
    status: _Statuses = None
    header: dict[str, Annotated[_Patterns, BeforeValidator(_some), Field(min_length=1)]] | None = None
    retry_count_at_least: Annotated[int, Field(ge=1, le=1000)] | None = None
    message: _Some = None
    message_matches: _Some = None
    headerless: Literal[True] | None = None

    @field_validator("message_matches")
    @classmethod
    def _compiles(cls, patterns: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for pattern in patterns or ():
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"{pattern!r} is not a regular expression ({error}); fix it, or use message"
                ) from None
        return patterns

    @model_validator(mode="after")
    def _says_something(self) -> When:
        if not any(value for _, value in self):
            raise ValueError(
                "no condition: name at least one field with a value; what no rule matches is unknown anyway"
            )
        return self


class Case:
    """A failure as rules see it.

    :param names: what ``exception`` looks at.
    :param headers: as :func:`texts` gives them.
    :param phrases: all that rules look for in messages, in lower case.
    """

    def __init__(
        self, understood: Understood, names: tuple[str, ...], headers: Mapping[str, str], phrases: Phrases
    ) -> None:
        self.understood = understood
        self.names = names
        self.headers = headers
        self._phrases = phrases

    @cached_property
    def status(self) -> int | None:
        u = self.understood
        if u.http_status is not None:
            return u.http_status
        if u.error_type is not None and u.error_type.isascii() and u.error_type.isdigit():
            return int(u.error_type) if len(u.error_type) == 3 else None
        return http_status(u.error_type) or http_status(u.message)

    @cached_property
    def said(self) -> frozenset[str]:
        """Of the phrases that rules look for, those in the message."""
        message = self.understood.message
        return self._phrases.found(message.lower()) if message else frozenset()

    @property
    def retries(self) -> int:
        found = self.understood.retries
        return self.understood.retry_count if found is None else found

    @property
    def says_nothing(self) -> bool:
        u = self.understood
        return u.error_type is None and u.cause_type is None and u.message is None and u.http_status is None


def texts(headers: Headers) -> dict[str, str]:
    """Headers as rules compare them; of a repeated one the last."""
    return {name.lower(): (value or b"").decode("utf-8", "replace") for name, value in headers}


Test = Callable[[Case], bool]


def tests(when: When) -> dict[str, Test]:
    """A test for each field that ``when`` names, cheapest first."""
    return {name: _test(name, value) for name, value in when if value}


def matched(when: When, case: Case) -> dict[str, str]:
    """Of each field that ``when`` names, which of its values holds."""
    found = {}
    for name, value in when:
        if isinstance(value, tuple):
            found[name] = next((one for one in value if _test(name, (one,))(case)), "")
        elif isinstance(value, dict):
            found[name] = ", ".join(value)
        elif value:
            found[name] = str(value)
    return found


def _test(name: str, value: Any) -> Test:
    if name == "exception":
        known = name_test(value)
        return lambda case: any(map(known, case.names))
    if name in ("error_type", "cause_type"):
        known = name_test(value)
        return lambda case: (said := getattr(case.understood, name)) is not None and known(said)
    if name in ("component", "stage"):
        fits = _pattern(value)
        return lambda case: (said := getattr(case.understood, name)) is not None and bool(fits(said))
    if name == "status":
        return _status_test(frozenset(value))
    if name == "header":
        wanted = [(header.lower(), _pattern(patterns)) for header, patterns in value.items()]
        return lambda case: all(h in case.headers and bool(fits(case.headers[h])) for h, fits in wanted)
    if name == "retry_count_at_least":
        return lambda case: case.retries >= value
    if name == "message":
        parts = frozenset(part.lower() for part in value)
        return lambda case: not parts.isdisjoint(case.said)
    if name == "message_matches":
        searches = tuple(re.compile(pattern).search for pattern in value)
        return lambda case: (said := case.understood.message) is not None and any(f(said) for f in searches)
    return lambda case: case.says_nothing  # headerless


def name_test(patterns: Iterable[str]) -> Callable[[str], bool]:
    """Whether an error's name fits one of ``patterns``."""
    patterns = tuple(patterns)
    whole = _pattern([p for p in patterns if "." in p])
    short = _pattern([folded(p) for p in patterns if "." not in p])
    fits: Memo[str, bool] = Memo(lambda name: bool(short(plain(name)) or whole(name)), 1024)
    return fits.__getitem__


def _pattern(patterns: Iterable[str]) -> Callable[[str], re.Match[str] | None]:
    return re.compile("|".join(map(translate, patterns)) or r"(?!)", re.IGNORECASE).match


def _status_test(wanted: frozenset[str]) -> Test:
    def test(case: Case) -> bool:
        code = case.status
        return code is not None and not wanted.isdisjoint((str(code), f"{code // 100}xx"))

    return test
