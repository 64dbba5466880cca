"""Where a value says which schema of a registry it was written with.

Two conventions, as confluent-kafka's ``SchemaId`` and ``dual_schema_id_deserializer`` read them: a prefix of the value,
``0x00`` and the id as 4 bytes, big endian; or the header ``__value_schema_id`` (of a key: ``__key_schema_id``), of a
repeated one the first, which comes before the prefix and holds the same, or ``0x01`` and a GUID of 16 bytes. Behind
either, Protobuf writes the path of the message in its file: a count and as many indexes, zigzag varints; a lone 0 is
the file's first.
"""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO
from typing import Literal
from uuid import UUID

from dlq.codecs.errors import CodecError
from dlq.entry import Headers

HEADER = {"value": "__value_schema_id", "key": "__key_schema_id"}

Field = Literal["value", "key"]

_ID, _GUID = 0, 1
_DEEPEST = 100  # of nested messages, as Protobuf's own limit


@dataclass(frozen=True)
class SchemaId:
    """A schema's name in its registry: an id, or a GUID."""

    id: int | None = None
    guid: str | None = None

    def __str__(self) -> str:
        return f"schema {self.guid or self.id}"


@dataclass(frozen=True)
class Frame:
    """``schema`` says what the rest is, ``after`` is what follows the id where it stands: the payload, or, in a
    header, at most the path of a Protobuf message."""

    schema: SchemaId
    after: bytes
    in_header: bool


def recognised(value: bytes, headers: Headers, field: Field = "value") -> Frame | None:
    """The frame ``value`` or ``headers`` carry, None where they carry none.

    :raises CodecError: when a header is there and broken.
    """
    said = next((content for name, content in headers if name == HEADER[field]), None)
    if said is not None:
        found = _parsed(said, in_header=True)
        if found is None:
            raise CodecError(f"header {HEADER[field]} holds no schema id")
        return found
    return _parsed(value, in_header=False)


def _parsed(said: bytes, *, in_header: bool) -> Frame | None:
    if said[:1] == bytes([_ID]) and len(said) >= 5:
        return Frame(SchemaId(id=int.from_bytes(said[1:5], "big")), said[5:], in_header)
    if in_header and said[:1] == bytes([_GUID]) and len(said) >= 17:
        return Frame(SchemaId(guid=str(UUID(bytes=said[1:17]))), said[17:], in_header)
    return None


def message_path(said: bytes) -> tuple[tuple[int, ...], int]:
    """The indexes that lead to a Protobuf message, and how many bytes say so.

    :raises CodecError: when they are broken.
    """
    stream = BytesIO(said)
    count = _zigzag(stream)
    if not 0 <= count <= _DEEPEST:
        raise CodecError("the path of the Protobuf message is broken")
    indexes = tuple(_zigzag(stream) for _ in range(count)) or (0,)
    return indexes, stream.tell()


def _zigzag(stream: BytesIO) -> int:
    value = shift = 0
    while True:
        byte = stream.read(1)
        if not byte or shift > 63:
            raise CodecError("the path of the Protobuf message is broken")
        value |= (byte[0] & 0x7F) << shift
        shift += 7
        if not byte[0] & 0x80:
            return (value >> 1) ^ -(value & 1)
