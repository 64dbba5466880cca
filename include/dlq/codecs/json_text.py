"""JSON as text: read so that writing it again changes no value, and, for the usual layouts, no byte.

A number keeps the literal it was written with (``1.10``, ``1e400``), an object the order of its members. Text that
would not come back (a member named twice, NaN, half a surrogate pair) is no JSON here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, Self

import msgspec

from dlq.codecs.errors import CodecError

name = "json"


class Number(float):
    """A number with a fraction or exponent, and the literal it was written with."""

    __slots__ = ("literal",)
    literal: str

    def __new__(cls, literal: str) -> Self:
        number = super().__new__(cls, literal)
        number.literal = literal
        return number

    def __deepcopy__(self, _memo: dict[int, Any]) -> Self:
        return self


def loads(text: bytes) -> Any:
    """The document of ``text``.

    :raises ValueError: when it is no JSON, or would not come back as it is; the message doesn't quote it.
    """
    try:
        found = json.loads(
            text.decode(), parse_float=Number, parse_constant=_no_number, object_pairs_hook=_members
        )
        _encoder.encode(found)  # half a surrogate pair can be read, and not be written
    except UnicodeError:
        raise ValueError("not UTF-8 text") from None
    except RecursionError:
        raise ValueError("nested too deep") from None
    return found


def dumps(document: Any) -> bytes:
    """``document`` as compact JSON, each number as it was written.

    :raises CodecError: when something in it has no place in JSON.
    """
    try:
        return _encoder.encode(document)
    except (TypeError, ValueError, OverflowError, RecursionError):
        raise CodecError("the document can't be written as JSON") from None


def read(body: bytes) -> Any:
    return loads(body)


def write(document: Any, was: bytes) -> bytes:
    """``document`` in the layout of ``was``, where that is one of the usual; else compact."""
    before, after = dumps(loads(was)), dumps(document)
    for layout in _LAYOUTS:
        if layout(before) == was:
            return layout(after)
    return after


def _literal(value: Any) -> msgspec.Raw:
    if isinstance(value, Number):
        return msgspec.Raw(value.literal.encode())
    raise TypeError


_encoder = msgspec.json.Encoder(enc_hook=_literal)


def _no_number(_constant: str) -> Any:
    raise ValueError("NaN and Infinity are no JSON")


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object names a member twice")
    return found


def _indented(indent: int) -> Callable[[bytes], bytes]:
    """``indent`` spaces a level, a line a member; 0: one line, a space after each comma and colon."""
    return lambda text: msgspec.json.format(text, indent=indent)


def _in_ascii(layout: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
    """Characters beyond ASCII stand only in strings: each becomes its escape."""
    return lambda text: _BEYOND_ASCII.sub(_escape, layout(text).decode()).encode()


def _escape(match: re.Match[str]) -> str:
    units = match[0].encode("utf-16-be")
    return "".join(f"\\u{units[n]:02x}{units[n + 1]:02x}" for n in range(0, len(units), 2))


_BEYOND_ASCII = re.compile(r"[^\x00-\x7f]")
_PLAIN: tuple[Callable[[bytes], bytes], ...] = (bytes, _indented(0), _indented(2), _indented(4))
_LAYOUTS = (*_PLAIN, *map(_in_ascii, _PLAIN))
