"""Avro's binary encoding, with the schema it was written with. https://avro.apache.org/docs/1.12.0/specification/

In the document bytes and fixed are strings of code points up to U+00FF, as in Avro's own JSON encoding; a union holds
the bare value; logical types (times, decimals) are shown as the number or bytes that carry them, so nothing is rounded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from io import BytesIO
from typing import Any

import fastavro

# Not fastavro's compiled reader: a value nested deeper than the C stack ends the process.
from fastavro._read_py import schemaless_reader

from dlq.codecs.errors import CodecError

_RANGES = {"int": 2**31, "long": 2**63}


class Avro:
    """:param schema: parsed JSON of the schema; ``references`` those it names, each after those it names itself.

    :raises CodecError: when they are no schemas.
    """

    name = "avro"

    def __init__(self, schema: Any, references: Iterable[Any] = ()) -> None:
        self._named: dict[str, Any] = {}
        try:
            for each in references:
                fastavro.parse_schema(_physical(each), named_schemas=self._named)
            self._schema = fastavro.parse_schema(_physical(schema), named_schemas=self._named)
        except Exception as error:  # noqa: BLE001 (a schema of anybody's: fastavro raises what it comes upon)
            raise CodecError(f"its Avro schema can't be used: {type(error).__name__}") from None

    def read(self, body: bytes) -> Any:
        stream = BytesIO(body)
        try:
            datum = schemaless_reader(stream, self._schema, None)
            document = _shown(datum)
        except Exception:  # noqa: BLE001 (any bytes: the decoder raises what it comes upon)
            raise CodecError("the value is no Avro of its schema") from None
        if stream.tell() != len(body):
            raise CodecError("the value goes on behind its Avro")
        return document

    def write(self, document: Any, was: bytes) -> bytes:
        if self._written(self.read(was)) != was:
            raise CodecError(
                "the value can't be written back as it was (which branch of a union it took is not in its document)"
            )
        return self._written(document)

    def _written(self, document: Any) -> bytes:
        stream = BytesIO()
        try:
            datum = self._datum(self._schema, document, "")
            fastavro.schemaless_writer(stream, self._schema, datum)
        except CodecError:
            raise
        except Exception:  # noqa: BLE001 (as above; its text quotes values)
            raise CodecError("the Avro schema refuses the document") from None
        return stream.getvalue()

    def _datum(self, schema: Any, document: Any, where: str) -> Any:
        """What fastavro is to write for ``document``; ``where`` is a pointer in the schema's words."""
        if isinstance(schema, list):
            return self._chosen(schema, document, where)
        kind = schema["type"] if isinstance(schema, Mapping) else schema
        if isinstance(kind, (list, Mapping)):
            return self._datum(kind, document, where)
        if kind in self._named and not isinstance(schema, Mapping):
            return self._datum(self._named[kind], document, where)
        if kind in ("record", "error"):
            return self._record(schema, document, where)
        if kind == "array" and isinstance(document, list):
            return [self._datum(schema["items"], each, f"{where}/*") for each in document]
        if kind == "map" and isinstance(document, dict):
            return {key: self._datum(schema["values"], each, f"{where}/*") for key, each in document.items()}
        if not _fits(kind, schema, document):
            raise CodecError(f"the Avro schema refuses {where or 'the document'}: it wants {kind}")
        if kind in ("bytes", "fixed"):
            return document.encode("latin-1")
        return float(document) if kind in ("float", "double") else document

    def _record(self, schema: Any, document: Any, where: str) -> dict[str, Any]:
        if not isinstance(document, dict):
            raise CodecError(f"the Avro schema refuses {where or 'the document'}: it wants {schema['name']}")
        fields = {field["name"]: field["type"] for field in schema["fields"]}
        if missing := sorted(fields.keys() - document.keys()):
            raise CodecError(f"the Avro schema refuses {where or 'the document'}: {missing[0]} is missing")
        if document.keys() - fields.keys():
            raise CodecError(f"the Avro schema refuses {where or 'the document'}: it has no such member")
        return {name: self._datum(kind, document[name], f"{where}/{name}") for name, kind in fields.items()}

    def _chosen(self, branches: list[Any], document: Any, where: str) -> Any:
        """The first branch that takes the document, as fastavro then chooses again."""
        for branch in branches:
            try:
                return self._datum(branch, document, where)
            except CodecError:
                continue
        raise CodecError(
            f"the Avro schema refuses {where or 'the document'}: no branch of its union takes it"
        )


def _fits(kind: str, schema: Any, document: Any) -> bool:
    if kind == "null":
        return document is None
    if kind == "boolean":
        return isinstance(document, bool)
    if kind in _RANGES:
        whole = isinstance(document, int) and not isinstance(document, bool)
        return whole and -_RANGES[kind] <= document < _RANGES[kind]
    if kind in ("float", "double"):
        number = isinstance(document, (int, float)) and not isinstance(document, bool)
        return number and (isinstance(document, float) or int(float(document)) == document)
    if not isinstance(document, str):
        return False
    if kind == "enum":
        return document in schema["symbols"]
    if kind in ("bytes", "fixed"):
        small = all(ord(c) < 256 for c in document)
        return small and (kind == "bytes" or len(document) == schema["size"])
    return kind == "string"


def _shown(datum: Any) -> Any:
    if isinstance(datum, bytes):
        return datum.decode("latin-1")
    if isinstance(datum, dict):
        return {key: _shown(value) for key, value in datum.items()}
    return [_shown(value) for value in datum] if isinstance(datum, list) else datum


def _physical(schema: Any) -> Any:
    """``schema`` without logical types."""
    if isinstance(schema, list):
        return [_physical(branch) for branch in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {key: value for key, value in schema.items() if key != "logicalType"}
    for inside in ("type", "items", "values", "fields"):
        if isinstance(kept.get(inside), (list, dict)):
            kept[inside] = _physical(kept[inside])
    return kept
