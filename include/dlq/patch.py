"""JSON Patch (RFC 6902) for payloads, and what changes by it, with or without the values."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Final

from jsonpath import JSONPatch, JSONPointer
from jsonpath.exceptions import JSONPatchError, JSONPatchTestFailure, JSONPointerError
from jsonpath.patch import OpTest

from dlq.codecs import CodecError, json_text
from dlq.errors import ConfigError
from dlq.redact import redact

_OPERATIONS = ("add", "remove", "replace", "move", "copy", "test")
_ROOT = "document"  # patched as a member of an object: jsonpath would parse a document that is a string


class Patch:
    """A patch as a person wrote it; ``sha`` is the hex sha256 of its text.

    :raises ConfigError: naming the operation and the fix.
    """

    def __init__(self, text: bytes) -> None:
        self.text = text
        self.sha = hashlib.sha256(text).hexdigest()
        try:
            operations = json_text.loads(text)
        except ValueError as error:
            raise ConfigError(f"patch: not JSON: {error}") from None
        if not isinstance(operations, list) or not operations:
            raise ConfigError('patch: write a list of operations, as in [{"op": "remove", "path": "/x"}]')
        self._operations = [_operation(number, each) for number, each in enumerate(operations, 1)]
        self.named = frozenset(
            part
            for each in self._operations
            for member in _ends(each["op"])
            for part in JSONPointer(each[member], unicode_escape=False).parts[1:]
        )
        """The members and indexes its pointers name: a person's words, no payload's."""

    def apply(self, document: Any) -> Any:
        """``document`` as the patch leaves it; the one given stays as it is.

        :raises CodecError: naming the operation that can't be done to it.
        """
        try:
            holder: Any = {_ROOT: copy.deepcopy(document)}
        except RecursionError:
            raise CodecError("the document is nested too deep to be patched") from None
        # Made anew each time: its operations put their own values into the document, for later ones to change.
        patch = JSONPatch(copy.deepcopy(self._operations), unicode_escape=False)
        for number, (operation, given) in enumerate(zip(patch.ops, self._operations, strict=True), 1):
            where = f"operation {number} ({_named(given)})"
            try:
                operation.apply(holder)
                if isinstance(operation, OpTest) and not _equal(
                    operation.path.resolve(holder), given["value"]
                ):
                    raise JSONPatchTestFailure
            except JSONPatchTestFailure:
                raise CodecError(f"{where}: another value is there") from None
            except (JSONPatchError, JSONPointerError, KeyError, IndexError, TypeError, ValueError):
                raise CodecError(f"{where}: there is no such place") from None
        if _ROOT not in holder:
            raise CodecError("the patch removes the whole document")
        return holder[_ROOT]


def _operation(number: int, given: Any) -> dict[str, Any]:
    """An operation as read, its pointers leading into the holder.

    :raises ConfigError: when RFC 6902 knows none like it.
    """
    if not isinstance(given, dict) or given.get("op") not in _OPERATIONS:
        raise ConfigError(f"patch: operation {number}: op must be one of {', '.join(_OPERATIONS)}")
    found = dict(given)
    for member in _ends(given["op"]):
        pointer = given.get(member)
        if not isinstance(pointer, str) or not (pointer == "" or pointer.startswith("/")):
            raise ConfigError(
                f"patch: operation {number}: {member} must be a JSON Pointer, such as /customer/id"
            )
        found[member] = f"/{_ROOT}{pointer}"
    if given["op"] in ("add", "replace", "test") and "value" not in given:
        raise ConfigError(f"patch: operation {number}: {given['op']} needs a value")
    return found


def _equal(one: Any, other: Any) -> bool:
    """As JSON compares: true is not 1, which Python takes for the same."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_equal(one[name], other[name]) for name in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_equal, one, other))
    return isinstance(one, bool) is isinstance(other, bool) and bool(one == other)


def _named(operation: dict[str, Any]) -> str:
    """An operation as it was written, without its value."""
    ends = [
        operation[member].removeprefix(f"/{_ROOT}") or "the document" for member in _ends(operation["op"])
    ]
    return f"{operation['op']} {' to '.join(ends)}"


def _ends(name: str) -> tuple[str, ...]:
    return ("from", "path") if name in ("move", "copy") else ("path",)


class _Nothing:
    """What is not there."""


NOTHING: Final = _Nothing()


@dataclass(frozen=True)
class Change:
    """One place of a document, and what is there before and after; :data:`NOTHING` where it isn't."""

    parts: tuple[str, ...]
    before: Any
    after: Any

    def redacted(self, named: frozenset[str]) -> tuple[str, str, str]:
        """Where, and what kinds of values; of the pointer only the parts in ``named``."""
        parts = (part if part in named else "*" for part in self.parts)
        return redact(_pointer(parts)), _kind(self.before), _kind(self.after)

    def plain(self) -> tuple[str, str, str]:
        """Where, and the values as JSON."""
        return _pointer(self.parts), _text(self.before), _text(self.after)


def changes(before: Any, after: Any, parts: tuple[str, ...] = ()) -> Iterator[Change]:
    """What differs between two documents, member by member."""
    if isinstance(before, dict) and isinstance(after, dict):
        for name in dict.fromkeys((*before, *after)):
            yield from changes(before.get(name, NOTHING), after.get(name, NOTHING), (*parts, name))
    elif isinstance(before, list) and isinstance(after, list):
        for number, (one, other) in enumerate(zip_longest(before, after, fillvalue=NOTHING)):
            yield from changes(one, other, (*parts, str(number)))
    elif _text(before) != _text(after):
        yield Change(parts, before, after)


def _pointer(parts: Any) -> str:
    return "".join(f"/{part.replace('~', '~0').replace('/', '~1')}" for part in parts) or "the document"


def _text(value: Any) -> str:
    return "nothing" if value is NOTHING else json_text.dumps(value).decode()


def _kind(value: Any) -> str:
    if value is NOTHING:
        return "nothing"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, (int, float)):
        return "a number"
    if isinstance(value, str):
        return f"text of {len(value)}"
    return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
