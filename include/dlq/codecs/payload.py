"""A value as a document that can be looked into and edited, and back."""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import field as hidden
from typing import TYPE_CHECKING, Any

from dlq.codecs import compressed, frame, json_text, raw
from dlq.codecs.codec import Codec
from dlq.codecs.errors import CodecError
from dlq.codecs.frame import Field, Frame, SchemaId
from dlq.entry import Headers

if TYPE_CHECKING:  # its client takes a second to import, and few queues have one
    from dlq.codecs.registry import SchemaRegistry

_LAYERS = 3
"""Compressions around one value, at most."""


@dataclass(frozen=True)
class Encoding:
    """How a value was encoded: compressions from the outside in, then the codec with its schema, if it has one."""

    codec: str
    schema: SchemaId | None = None
    compressions: tuple[str, ...] = ()

    @property
    def is_bare(self) -> bool:
        """Whether the value is its content: nothing is around it."""
        return self.schema is None and not self.compressions

    def __str__(self) -> str:
        said = self.codec if self.schema is None else f"{self.codec} ({self.schema})"
        return ", ".join((*self.compressions, said))


@dataclass(frozen=True)
class Decoded:
    """A value's document, which is to be copied before it is changed, and how the value was encoded."""

    document: Any = hidden(repr=False)
    encoding: Encoding
    _value: bytes | None = hidden(repr=False)
    _codec: Codec | None = hidden(repr=False)
    _prefix: bytes = hidden(repr=False, default=b"")
    _body: bytes = hidden(repr=False, default=b"")

    def encode(self, document: Any) -> bytes | None:
        """The value with ``document`` in place of its own: same compression, same schema, checked against it.

        The same document gives the same bytes.

        :raises CodecError: when the document can't be written so, or more would change than was edited.
        """
        if json_text.dumps(document) == json_text.dumps(self.document):
            return self._value
        if self._codec is None:
            raise CodecError("the value is null: there is nothing to edit")
        value = self._prefix + self._codec.write(document, self._body)
        for name in reversed(self.encoding.compressions):
            value = compressed.pack(name, value)
        return value

    def check(self) -> None:
        """See that the schema takes the document as it is: what is only read may be why it failed.

        :raises CodecError: where it doesn't.
        """
        if self._codec is not None:
            self._codec.write(self.document, self._body)


def decode(
    value: bytes | None, headers: Headers, registry: SchemaRegistry | None, field: Field = "value"
) -> Decoded:
    """What ``value`` says, by what it and its ``headers`` carry: compressed, framed for a registry, JSON, or raw.

    :param registry: of the queue, None where its file names none.
    :param field: which of a record's two fields it is.
    :raises CodecError: when it is not what it says it is.
    :raises RegistryError: when the registry did not answer.
    """
    if value is None:
        return Decoded(None, Encoding("null"), None, None)
    body, compressions = _unpacked(value)
    found = frame.recognised(body, headers, field)
    if found is None:
        document, codec = _plain(body)
        return Decoded(document, Encoding(codec.name, None, compressions), value, codec, b"", body)
    if registry is None:
        raise CodecError(
            f"it is written with {found.schema} of a schema registry: name its Connection as schema_registry in the "
            "queue's file"
        )
    codec, path = registry.codec(found)
    start = 0 if found.in_header else len(body) - len(found.after) + path
    encoding = Encoding(codec.name, found.schema, compressions)
    return Decoded(codec.read(body[start:]), encoding, value, codec, body[:start], body[start:])


def framed(value: bytes | None, headers: Headers) -> tuple[tuple[str, ...], Frame | None]:
    """What ``value`` carries around its content, without a look inside: compressions, and the frame of a schema.

    :raises CodecError: when one of them is broken.
    """
    if value is None:
        return (), None
    body, compressions = _unpacked(value)
    return compressions, frame.recognised(body, headers)


def _unpacked(value: bytes) -> tuple[bytes, tuple[str, ...]]:
    compressions: list[str] = []
    while (name := compressed.recognised(value)) is not None:
        if len(compressions) == _LAYERS:
            raise CodecError(f"the value is compressed more than {_LAYERS} times")
        value = compressed.unpack(name, value)
        compressions.append(name)
    return value, tuple(compressions)


def _plain(body: bytes) -> tuple[Any, Codec]:
    """JSON where it is JSON, else text, else bytes: one of them always is."""
    try:
        return json_text.loads(body), json_text
    except ValueError:
        pass
    codec: Codec
    for codec in (raw.Text(), raw.Bytes()):
        try:
            return codec.read(body), codec
        except UnicodeError:
            continue
    raise AssertionError("any bytes have a base64")
