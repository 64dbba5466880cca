"""Ordered rules that say, from what a dead letter tells, what kind of failure it is and what helps.

The first rule whose every condition holds decides. A file that can't be used is refused with file, rule,
field and fix; rules that can never decide are findings, since an incident shouldn't wait for tidiness.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase, translate
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from upath import UPath

from dlq.config import config_root
from dlq.entry import Understood
from dlq.errors import ConfigError

Category = Literal["transient", "permanent", "manual", "unknown"]
Remedy = Literal["retry", "hold", "raise_quota", "patch_plugin", "edit", "manual"]

UNMATCHED = "no rule"
"""The ``rule`` of a failure that no rule knows: category ``unknown``, remedy ``manual``."""

REMEDIES: dict[str, tuple[str, ...]] = {
    "transient": ("retry", "hold"),
    "permanent": ("raise_quota", "patch_plugin", "hold", "manual"),
    "manual": ("edit", "manual"),
    "unknown": ("manual",),
}

_STATUS = re.compile(
    r"\b(?:HTTP(?:/\d(?:\.\d)?)?|status(?:[ _-]?code)?|response code)[\s:=(]{1,3}([1-5]\d\d)\b"
    r"|\b([1-5]\d\d)[\s:-]{1,3}(?:Bad Request|Unauthorized|Forbidden|Not Found|Request Time-?out|Conflict"
    r"|Too Many Requests|Client Error|(?:Internal )?Server Error|Not Implemented|Bad Gateway"
    r"|Service (?:Temporarily )?Unavailable|Gateway Time-?out)\b",
    re.IGNORECASE | re.ASCII,
)


def http_status(message: str | None) -> int | None:
    """The HTTP status a message names as one: ``HTTP 503``, ``status=429``, ``502 Bad Gateway``; or None."""
    found = _STATUS.search(message) if message else None
    return int(found[1] or found[2]) if found else None


def _some(value: Any) -> Any:
    return value if value is None or isinstance(value, (list, tuple)) else [value]


def _texts(value: Any) -> Any:
    return [str(v) if isinstance(v, int) and not isinstance(v, bool) else v for v in _some(value)]


_Some = Annotated[tuple[Annotated[str, Field(min_length=1)], ...] | None, BeforeValidator(_some)]
_Statuses = Annotated[
    tuple[Annotated[str, Field(pattern=r"^[1-5](\d\d|xx)$")], ...] | None, BeforeValidator(_texts)
]


class When(BaseModel):
    """A rule's conditions: all must hold; of a list, one.

    Names (``error_type``, ``cause_type``, ``component``, ``stage``) are patterns with ``*`` and ``?``,
    compared without case; an error type also matches by its last dotted part. ``message`` is part of the
    message, without case; ``message_matches`` a regular expression found in it. ``status`` is an HTTP status
    (503, 5xx) that the message names. ``headerless: true`` holds where nothing is said about the failure.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    error_type: _Some = None
    cause_type: _Some = None
    component: _Some = None
    stage: _Some = None
    message: _Some = None
    message_matches: _Some = None
    status: _Statuses = None
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


class Rule(BaseModel):
    """One line of the taxonomy; ``owner`` takes its open work instead of the queue's for the category."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1, max_length=80)
    when: When
    category: Category
    remedy: Remedy
    owner: str | None = Field(None, min_length=1)

    @model_validator(mode="after")
    def _remedy_fits(self) -> Rule:
        if self.remedy not in REMEDIES[self.category]:
            fits = ", ".join(REMEDIES[self.category])
            raise ValueError(
                f"remedy {self.remedy} does not go with category {self.category}; write one of: {fits}"
            )
        return self


@dataclass(frozen=True, slots=True)
class Decision:
    """What the taxonomy says of a failure, by which rule, and the fields that rule looked at."""

    category: Category
    remedy: Remedy
    rule: str
    owner: str | None = None
    matched: tuple[str, ...] = ()


_Test = Callable[[Understood], bool]
_NO_DECISION = Decision("unknown", "manual", UNMATCHED)


class Taxonomy:
    """The rules of one file, in order. ``findings`` names rules, or parts of one, that can never decide."""

    def __init__(self, rules: tuple[Rule, ...]) -> None:
        self.rules = rules
        self.findings = tuple(_unreachable(rules))
        self._tests = tuple(_compiled(rule) for rule in rules)

    def decide(self, understood: Understood) -> Decision:
        """The first rule that holds, else ``unknown`` and ``manual``."""
        for tests, decision in self._tests:
            for test in tests:
                if not test(understood):
                    break
            else:
                return decision
        return _NO_DECISION


def load_taxonomy(path: UPath | None = None) -> Taxonomy:
    """The taxonomy in ``path``, by default ``taxonomy.yaml`` of the configuration folder.

    :raises ConfigError: naming the file, the rule, the field and the fix.
    """
    path = path or config_root() / "taxonomy.yaml"
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"{path} does not exist; put taxonomy.yaml into the folder DLQ_CONFIG names, beside queues/"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {error}") from error
    listed = data.get("rules") if isinstance(data, dict) else None
    if not isinstance(listed, list) or set(data) != {"rules"}:
        raise ConfigError(
            f"{path}: expected one key, rules, holding a list; each with name, when, category and remedy"
        )
    rules: list[Rule] = []
    wrong: list[str] = []
    for position, item in enumerate(listed, 1):
        try:
            rules.append(Rule.model_validate(item))
        except ValidationError as error:
            named = item.get("name") if isinstance(item, dict) else None
            where = f"rule {named!r}" if named else f"rule {position}"
            wrong += [f"{where}: {_field(e['loc'])}: {_fix(e)}" for e in error.errors()]
    seen: set[str] = set()
    for rule in rules:
        if rule.name in seen:
            wrong.append(f"rule {rule.name!r}: name: is used twice; rename one")
        seen.add(rule.name)
    if wrong:
        raise ConfigError(f"{path}: " + "; ".join(wrong))
    return Taxonomy(tuple(rules))


def _field(loc: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in loc) or "(rule)"


def _fix(error: Any) -> str:
    if error["type"] == "extra_forbidden":
        known = When.model_fields if error["loc"][0] == "when" else Rule.model_fields
        return f"is not a field here; known: {', '.join(known)}"
    if error["type"] == "missing":
        return "is missing; add it"
    if error["type"] == "string_pattern_mismatch":
        return f"{error['input']!r} is not an HTTP status; write 503 or 5xx"
    return str(error["msg"]).removeprefix("Value error, ")


def _compiled(rule: Rule) -> tuple[tuple[_Test, ...], Decision]:
    tests = _tests(rule.when)
    decision = Decision(rule.category, rule.remedy, rule.name, rule.owner, tuple(name for name, _ in tests))
    return tuple(test for _, test in tests), decision


def _tests(when: When) -> list[tuple[str, _Test]]:
    """A condition a field, cheapest first."""
    tests: list[tuple[str, _Test]] = []
    if when.headerless:
        tests.append(
            ("headerless", lambda u: u.error_type is None and u.cause_type is None and u.message is None)
        )
    for name in ("error_type", "cause_type", "component", "stage"):
        if patterns := getattr(when, name):
            tests.append((name, _name_test(name, patterns)))
    if when.message:
        parts = tuple(part.lower() for part in when.message)
        tests.append(
            ("message", lambda u: u.message is not None and any(part in u.message.lower() for part in parts))
        )
    if when.status:
        wanted = frozenset(when.status)
        tests.append(
            (
                "status",
                lambda u: (
                    (code := http_status(u.message)) is not None
                    and not wanted.isdisjoint({str(code), f"{code // 100}xx"})
                ),
            )
        )
    if when.message_matches:
        regexes = tuple(re.compile(pattern) for pattern in when.message_matches)
        tests.append(
            ("message_matches", lambda u: u.message is not None and any(r.search(u.message) for r in regexes))
        )
    return tests


def _name_test(name: str, patterns: tuple[str, ...]) -> _Test:
    # An error type is also found by its last dotted part: java.net.ConnectException as ConnectException.
    package = r"(?:.*\.)?" if name.endswith("_type") else ""
    found = re.compile("|".join(package + translate(pattern) for pattern in patterns), re.IGNORECASE).match

    def test(understood: Understood) -> bool:
        value = getattr(understood, name)
        return value is not None and found(value) is not None

    return test


def _unreachable(rules: tuple[Rule, ...]) -> list[str]:
    """Rules, and single values of rules, that an earlier rule always takes first."""
    findings = []
    for position, later in enumerate(rules):
        taker = next((r for r in rules[:position] if _covers(r.when, later.when)), None)
        if taker is None:
            findings += _taken_values(rules[:position], later)
            continue
        does = "repeats" if _outcome(taker) == _outcome(later) else "contradicts"
        findings.append(
            f"rule {later.name!r} can never decide: {taker.name!r} before it takes all it would and {does} "
            f"it ({_outcome(taker)}, {_outcome(later)}); remove it or move it up"
        )
    return findings


def _outcome(rule: Rule) -> str:
    return "/".join(filter(None, (rule.category, rule.remedy, rule.owner)))


def _taken_values(earlier: tuple[Rule, ...], later: Rule) -> list[str]:
    findings = []
    for name, values in later.when:
        if not isinstance(values, tuple) or len(values) < 2:
            continue
        for value in values:
            narrowed = later.when.model_copy(update={name: (value,)})
            taker = next((r for r in earlier if _covers(r.when, narrowed)), None)
            if taker is not None:
                findings.append(
                    f"rule {later.name!r}: {name} {value!r} can never decide, {taker.name!r} before it "
                    "takes it; remove it from one of them"
                )
    return findings


def _covers(earlier: When, later: When) -> bool:
    """Whether whatever ``later`` matches, ``earlier`` matches too, as far as can be told without guessing."""
    for name, values in earlier:
        if values is None:
            continue
        wanted = getattr(later, name)
        if wanted is None:
            return False
        if isinstance(values, tuple) and not all(any(_takes(name, a, b) for a in values) for b in wanted):
            return False
    return True


def _takes(name: str, earlier: str, later: str) -> bool:
    if name == "message_matches":
        return earlier == later
    if name == "status":
        return earlier == later or (earlier[1:] == "xx" and earlier[0] == later[0])
    a, b = earlier.lower(), later.lower()
    if name == "message":
        return a in b
    if a == b:
        return True
    if any(c in b for c in "*?["):
        return a == "*"
    return fnmatchcase(b, a) or (name.endswith("_type") and fnmatchcase(b.rpartition(".")[2], a))
