"""What is odd in a taxonomy that can be used: rules, or single values of rules, that can never decide."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Protocol

from dlq.grouping.conditions import When, folded, name_test, plain


class Ruled(Protocol):
    """As much of a rule as can make it odd."""

    @property
    def name(self) -> str: ...
    @property
    def when(self) -> When: ...
    @property
    def outcome(self) -> str: ...


_Conditions = Mapping[str, Any]
_Earlier = Sequence[tuple[Ruled, _Conditions]]


def findings(rules: Sequence[Ruled], wrappers: Sequence[str]) -> Iterator[str]:
    """In words: which rule, what it can't do, why, and the fix."""
    is_wrapper = name_test(wrappers)
    earlier: list[tuple[Ruled, _Conditions]] = []
    for rule in rules:
        conditions = {name: value for name, value in rule.when if value is not None}
        if (taker := _taker(earlier, conditions)) is None:
            yield from _taken_values(earlier, rule, conditions)
        else:
            does = "repeats" if taker.outcome == rule.outcome else "contradicts"
            yield (
                f"rule {rule.name!r} can never decide: {taker.name!r} before it takes all it would and {does} it "
                f"({taker.outcome}, {rule.outcome}); remove it or move it up"
            )
        for value in rule.when.exception or ():
            if not _is_open(value) and is_wrapper(value):
                yield (
                    f"rule {rule.name!r}: exception {value!r} can never decide, it is among the wrappers; remove it "
                    "from one of them"
                )
        earlier.append((rule, conditions))


def _taker(earlier: _Earlier, later: _Conditions) -> Ruled | None:
    """The first rule that matches whatever ``later`` matches, as far as can be told without guessing."""
    return next((rule for rule, conditions in earlier if _covers(conditions, later)), None)


def _taken_values(earlier: _Earlier, rule: Ruled, conditions: _Conditions) -> Iterator[str]:
    for name, values in conditions.items():
        if not isinstance(values, tuple) or len(values) < 2:
            continue
        for value in values:
            if (taker := _taker(earlier, {**conditions, name: (value,)})) is not None:
                yield (
                    f"rule {rule.name!r}: {name} {value!r} can never decide, {taker.name!r} before it takes it; "
                    "remove it from one of them"
                )


def _covers(earlier: _Conditions, later: _Conditions) -> bool:
    return all(name in later and _field_covers(name, value, later[name]) for name, value in earlier.items())


def _field_covers(name: str, value: Any, wanted: Any) -> bool:
    if name == "header":
        return all(
            header in wanted and all(any(_takes(name, a, b) for a in values) for b in wanted[header])
            for header, values in value.items()
        )
    if name == "retry_count_at_least":
        return bool(value <= wanted)
    return not isinstance(value, tuple) or all(any(_takes(name, a, b) for a in value) for b in wanted)


_WILD = frozenset("*?[")


def _is_open(pattern: str) -> bool:
    return not _WILD.isdisjoint(pattern)


def _takes(name: str, earlier: str, later: str) -> bool:
    if name == "message_matches":
        return earlier == later
    if name == "status":
        return earlier == later or (earlier[1:] == "xx" and earlier[0] == later[0])
    if name == "message":
        return earlier.lower() in later.lower()
    if name in ("exception", "error_type", "cause_type"):
        if "." not in earlier:
            # A pattern without a package takes one with it, too.
            earlier, later = folded(earlier), plain(later) if "." in later else folded(later)
        elif "." not in later:
            return False
    a, b = earlier.lower(), later.lower()
    if a == b:
        return True
    if _is_open(b):
        return a == "*"
    return _is_open(a) and fnmatchcase(b, a)
