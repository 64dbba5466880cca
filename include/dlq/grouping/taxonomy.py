"""Ordered rules that say, from what a dead letter tells, what kind of failure it is and what helps.

The first rule whose every condition holds decides (:mod:`dlq.grouping.conditions`). A file that can't be used is
refused with file, rule, field and fix; rules that can never decide are findings, since an incident shouldn't wait for
tidiness.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from upath import UPath

from dlq.config import HoldPolicy, config_root
from dlq.entry import Understood
from dlq.errors import ConfigError
from dlq.grouping.conditions import Case, Test, When, matched, name_test, named, tests
from dlq.grouping.findings import findings
from dlq.grouping.phrases import Phrases
from dlq.memo import Memo

Category = Literal["transient", "permanent", "manual", "unknown"]
Remedy = Literal["retry", "hold", "raise_quota", "patch_plugin", "repair", "edit", "discard", "manual"]

UNMATCHED = "no rule"
"""The ``rule`` of a failure that no rule knows: category ``unknown``, remedy ``manual``."""

REMEDIES: dict[str, tuple[str, ...]] = {
    "transient": ("retry", "hold"),
    "permanent": ("raise_quota", "patch_plugin", "hold", "discard", "manual"),
    "manual": ("repair", "edit", "discard", "manual"),
    "unknown": ("manual",),
}

# libyaml's, where it is there: seven times as fast.
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_NO_HEADERS: Mapping[str, str] = {}


class Rule(BaseModel):
    """One line of the taxonomy.

    ``owner`` takes its open work instead of the queue's for the category. ``fingerprint`` makes one group of all it
    decides, whatever their messages say. ``hold`` says how long what has this remedy waits, instead of the queue's.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1, max_length=80)
    when: When
    category: Category
    remedy: Remedy
    owner: str | None = Field(None, min_length=1)
    fingerprint: str | None = Field(None, pattern=r"^[a-z0-9][a-z0-9._-]{0,59}$")
    hold: HoldPolicy | None = None

    @model_validator(mode="after")
    def _remedy_fits(self) -> Rule:
        if self.remedy not in REMEDIES[self.category]:
            fits = ", ".join(REMEDIES[self.category])
            raise ValueError(
                f"remedy {self.remedy} does not go with category {self.category}; write one of: {fits}"
            )
        if self.hold is not None and self.remedy != "hold":
            raise ValueError(f"hold does not go with remedy {self.remedy}; write remedy: hold, or remove it")
        return self

    @property
    def outcome(self) -> str:
        return "/".join(filter(None, (self.category, self.remedy, self.owner, self.fingerprint)))


@dataclass(frozen=True, slots=True)
class Decision:
    """What the taxonomy says of a failure, and by which rule."""

    category: Category
    remedy: Remedy
    rule: str
    owner: str | None = None
    fingerprint: str | None = None


_NO_DECISION = Decision("unknown", "manual", UNMATCHED)


class Taxonomy:
    """The rules of one file, in order.

    :param wrappers: classes that only carry another: ``exception`` looks through them.

    ``findings`` names rules, or parts of one, that can never decide. ``headers`` are the names of those that a rule
    looks at, in lower case; ``retries`` is the highest retry count that one asks for; ``holds`` says how long what a
    rule decides is held.
    """

    def __init__(self, rules: tuple[Rule, ...], wrappers: tuple[str, ...] = ()) -> None:
        self.rules = rules
        self._wrappers = wrappers
        self.headers = frozenset(name.lower() for rule in rules for name in rule.when.header or ())
        self.retries = max((rule.when.retry_count_at_least or 0 for rule in rules), default=0)
        self._decisions = {
            rule.name: Decision(rule.category, rule.remedy, rule.name, rule.owner, rule.fingerprint)
            for rule in rules
        }
        self._tests: list[tuple[tuple[Test, ...], Decision]] = [
            (tuple(tests(rule.when).values()), self._decisions[rule.name]) for rule in rules
        ]
        self._phrases = Phrases(part.lower() for rule in rules for part in rule.when.message or ())
        self._is_wrapper = name_test(wrappers)
        self.holds = {rule.name: rule.hold for rule in rules if rule.hold is not None}
        self._is_known = name_test(pattern for rule in rules for pattern in rule.when.exception or ())
        self._telling: Memo[tuple[str | None, ...], tuple[str, ...]] = Memo(self._tell, 4096)

    @cached_property
    def findings(self) -> tuple[str, ...]:
        return tuple(findings(self.rules, self._wrappers))

    def decide(self, understood: Understood, headers: Mapping[str, str] = _NO_HEADERS) -> Decision:
        """The first rule that holds, else ``unknown`` and ``manual``.

        :param headers: those that rules look at, as :func:`dlq.grouping.conditions.texts` gives them.
        """
        case = self._case(understood, headers)
        for conditions, decision in self._tests:
            for test in conditions:
                if not test(case):
                    break
            else:
                return decision
        return _NO_DECISION

    def telling(self, understood: Understood) -> str | None:
        """The outermost class of a failure that is no wrapper; where all are, the outermost."""
        chain = (understood.error_type, *understood.causes, understood.cause_type)
        return next(iter(self._telling[chain]), next(filter(None, chain), None))

    def why(self, understood: Understood, headers: Mapping[str, str] = _NO_HEADERS) -> str:
        """Which rule decides and by what, in words that quote nothing of the dead letter but its error's name."""
        decision = self.decide(understood, headers)
        if decision is _NO_DECISION:
            return "no rule matched"
        rule = next(rule for rule in self.rules if rule.name == decision.rule)
        by = matched(rule.when, self._case(understood, headers))
        said = " and ".join(f"{name} ({value})" for name, value in by.items())
        return f"rule {rule.name!r} matched {said}"

    def _case(self, understood: Understood, headers: Mapping[str, str]) -> Case:
        names = self._telling[(understood.error_type, *understood.causes, understood.cause_type)]
        if not any(map(self._is_known, names)):
            names = named(understood.message)
        return Case(understood, names, headers, self._phrases)

    def _tell(self, chain: tuple[str | None, ...]) -> tuple[str, ...]:
        return tuple(name for name in dict.fromkeys(chain) if name and not self._is_wrapper(name))


def load_taxonomy(path: UPath | None = None) -> Taxonomy:
    """The taxonomy in ``path``, by default ``taxonomy.yaml`` of the configuration folder.

    :raises ConfigError: naming the file, the rule, the field and the fix.
    """
    path = path or config_root() / "taxonomy.yaml"
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(
            f"{path} does not exist; put taxonomy.yaml into the folder DLQ_CONFIG names, beside queues/"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    return _taxonomy(str(path), text)


@lru_cache(8)  # every drain, stage and sample of a process asks for it
def _taxonomy(path: str, text: str) -> Taxonomy:
    try:
        data = yaml.load(text, Loader=_Loader)  # noqa: S506 (a safe one)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {error}") from error
    if (
        not isinstance(data, dict)
        or not isinstance(data.get("rules"), list)
        or set(data) - {"rules", "wrappers"}
    ):
        raise ConfigError(
            f"{path}: expected the key rules, holding a list, each with name, when, category and remedy; and "
            "perhaps wrappers, a list of error names"
        )
    wrappers = data.get("wrappers") or []
    if not isinstance(wrappers, list) or not all(isinstance(name, str) and name for name in wrappers):
        raise ConfigError(f"{path}: wrappers: is not a list of error names")
    return Taxonomy(_rules(path, data["rules"]), tuple(wrappers))


def _rules(path: str, listed: list[Any]) -> tuple[Rule, ...]:
    rules: list[Rule] = []
    wrong: list[str] = []
    for position, item in enumerate(listed, 1):
        try:
            rules.append(Rule.model_validate(item))
        except ValidationError as error:
            called = item.get("name") if isinstance(item, dict) else None
            where = f"rule {called!r}" if called else f"rule {position}"
            wrong += [f"{where}: {_field(e['loc'])}: {_fix(e)}" for e in error.errors()]
    seen: set[str] = set()
    for rule in rules:
        if rule.name in seen:
            wrong.append(f"rule {rule.name!r}: name: is used twice; rename one")
        seen.add(rule.name)
    if wrong:
        raise ConfigError(f"{path}: " + "; ".join(wrong))
    return tuple(rules)


def _field(loc: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in loc) or "(rule)"


def _fix(error: Any) -> str:
    if error["type"] == "extra_forbidden":
        if error["loc"][0] == "hold":
            return "is not a field here; docs/taxonomy.md lists them (hold)"
        known = When.model_fields if error["loc"][0] == "when" else Rule.model_fields
        return f"is not a field here; known: {', '.join(known)}"
    if error["type"] == "missing":
        return "is missing; add it"
    if error["type"] == "string_pattern_mismatch" and error["loc"][0] != "hold":
        if error["loc"][0] == "fingerprint":
            return (
                f"{error['input']!r} is not a name: write small letters, digits, dots and dashes, 60 at most"
            )
        return f"{error['input']!r} is not an HTTP status; write 503 or 5xx"
    return str(error["msg"]).removeprefix("Value error, ")


__all__ = ["REMEDIES", "UNMATCHED", "Decision", "Rule", "Taxonomy", "load_taxonomy"]
