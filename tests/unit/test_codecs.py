"""Payload codecs: any value becomes a document and comes back, or says why not, without its payload."""

from __future__ import annotations

import copy
import gzip
import json
from base64 import b64encode
from collections.abc import Callable, Iterator
from io import BytesIO
from typing import Any

import fastavro
import pytest
from google.api import field_info_pb2
from google.protobuf import type_pb2
from google.type import latlng_pb2
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tests.schema_registry import RegistryDouble

from dlq.codecs import CodecError, RegistryError, compressed, decode, json_text
from dlq.codecs.frame import HEADER as HEADERS
from dlq.codecs.frame import message_path
from dlq.codecs.payload import framed
from dlq.codecs.registry import SchemaRegistry
from dlq.entry import Headers
from dlq.errors import ConfigError
from dlq.ports import Connection

ORDER = {
    "type": "record",
    "name": "Order",
    "namespace": "shop",
    "fields": [
        {"name": "id", "type": "string"},
        {"name": "amount", "type": ["null", "double"], "default": None},
        {"name": "count", "type": "int"},
        {"name": "weight", "type": "float"},
        {"name": "token", "type": "bytes"},
        {"name": "code", "type": {"type": "fixed", "name": "Code", "size": 2}},
        {"name": "kind", "type": {"type": "enum", "name": "Kind", "symbols": ["A", "B"]}},
        {"name": "at", "type": {"type": "long", "logicalType": "timestamp-millis"}},
        {"name": "stock", "type": {"type": "map", "values": "long"}},
        {"name": "kinds", "type": {"type": "array", "items": ["null", "Kind"]}},
        {"name": "next", "type": ["null", "Order"]},
    ],
}
AN_ORDER = {
    "id": "é1",
    "amount": 1.5,
    "count": 5,
    "weight": 0.5,
    "token": b"\x00\xff",
    "code": b"ab",
    "kind": "B",
    "at": 9_000_000_000_000_000,  # behind the last year a Python date has
    "stock": {"z": 1, "a": 2},
    "kinds": [None, "A"],
    "next": {
        "id": "2",
        "amount": None,
        "count": 0,
        "weight": 0.0,
        "token": b"",
        "code": b"cd",
        "kind": "A",
        "at": 0,
        "stock": {},
        "kinds": [],
        "next": None,
    },
}
ORDER_JSON = {
    "$schema": "http://json-schema.org/draft-07/schema#",
    "type": "object",
    "properties": {"amount": {"type": "number", "multipleOf": 0.5}, "who": {"$ref": "who.json"}},
    "required": ["amount"],
}
ORDER_PROTO = """
syntax = "proto3";
package shop;
import "google/protobuf/timestamp.proto";
import "shop/money.proto";
message Ignored { string x = 1; }
message Order {
  message Line { int64 count = 1; string name = 2; }
  string id = 1;
  Money amount = 2;
  map<string, int32> stock = 3;
  repeated Line lines = 4;
  google.protobuf.Timestamp at = 5;
  float weight = 6;
  bytes token = 7;
}
"""
MONEY_PROTO = 'syntax = "proto3"; package shop; message Money { string currency = 1; double value = 2; }'

HEADER = HEADERS["value"]
SECRET = "4111-1111-secret"


@pytest.fixture(scope="module")
def double() -> Iterator[RegistryDouble]:
    with RegistryDouble() as running:
        yield running


@pytest.fixture(scope="module")
def registry(double: RegistryDouble) -> Iterator[SchemaRegistry]:
    client = double.client()
    yield client
    client.close()


@pytest.fixture(scope="module")
def avro(double: RegistryDouble) -> int:
    return double.add(ORDER)


@pytest.fixture(scope="module")
def proto(double: RegistryDouble) -> int:
    money = double.add(MONEY_PROTO, "PROTOBUF")
    return double.add(ORDER_PROTO, "PROTOBUF", {"shop/money.proto": money})


@pytest.fixture(scope="module")
def strict(double: RegistryDouble) -> int:
    who = double.add({"type": "string", "minLength": 2}, "JSON")
    return double.add(ORDER_JSON, "JSON", {"who.json": who})


def prefixed(schema: int, body: bytes) -> bytes:
    return b"\0" + schema.to_bytes(4, "big") + body


def avro_bytes(datum: Any, schema: Any = ORDER) -> bytes:
    stream = BytesIO()
    bare = json.loads(json.dumps(schema).replace(', "logicalType": "timestamp-millis"', ""))
    fastavro.schemaless_writer(stream, fastavro.parse_schema(bare), datum)
    return stream.getvalue()


def zigzag(number: int) -> bytes:
    number, out = number << 1 if number >= 0 else (-number << 1) - 1, b""
    while number > 0x7F:
        out, number = out + bytes([number & 0x7F | 0x80]), number >> 7
    return out + bytes([number])


def proto_value(schema: int, body: bytes, path: bytes = zigzag(1) + zigzag(1)) -> bytes:
    return prefixed(schema, path + body)


def edited(
    value: bytes, edit: Callable[[Any], Any], registry: SchemaRegistry | None, headers: Headers = ()
) -> Any:
    """The value after ``edit`` of its document, read again."""
    found = decode(value, headers, registry)
    document = copy.deepcopy(found.document)
    changed = edit(document)
    new = found.encode(document if changed is None else changed)
    assert new is not None
    return decode(new, headers, registry).document


# What a value carries


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "null"),
        (b"", "text"),
        (b'{"a": 1}', "json"),
        (b"[]", "json"),
        (b"12", "json"),
        (b"order 12", "text"),
        (b'{"a": 1, "a": 2}', "text"),
        (b"NaN", "text"),
        (b'"\\ud800"', "text"),
        (b"[" * 100_000, "text"),
        (b"9" * 5_000, "text"),
        ("order 12".encode("utf-16"), "bytes"),
        (b"\xff\x00", "bytes"),
        (b"\0\0\0", "text"),  # too short for a frame
        (gzip.compress(b'{"a": 1}', mtime=0), "gzip, json"),
        (compressed.pack("zstd", b"\xff"), "zstd, bytes"),
        (compressed.pack("zstd", gzip.compress(b"x", mtime=0)), "zstd, gzip, text"),
    ],
)
def test_a_codec_is_chosen_by_what_the_value_carries(value: bytes | None, said: str) -> None:
    found = decode(value, (), None)
    assert str(found.encoding) == said
    assert found.encode(found.document) == value


@pytest.mark.parametrize("convention", ["prefix", "header with id", "header with guid"])
@pytest.mark.parametrize("compression", ["", "gzip", "zstd"])
def test_both_places_of_a_schema_id_are_read_under_any_compression(
    convention: str, compression: str, double: RegistryDouble, registry: SchemaRegistry, avro: int
) -> None:
    body, headers = avro_bytes(AN_ORDER), [("other", b"x")]
    if convention == "prefix":
        body = prefixed(avro, body)
    elif convention == "header with id":
        headers.append((HEADER, prefixed(avro, b"")))
    else:
        headers.append((HEADER, b"\x01" + double.guid(avro).bytes))
    value = compressed.pack(compression, body) if compression else body
    found = decode(value, tuple(headers), registry)
    named = str(double.guid(avro)) if convention == "header with guid" else str(avro)
    assert str(found.encoding) == f"{compression + ', ' if compression else ''}avro (schema {named})"
    assert found.document["id"] == "é1"

    def edit(document: Any) -> None:
        document["id"] = "other"

    assert edited(value, edit, registry, tuple(headers)) == {**found.document, "id": "other"}


def test_of_a_repeated_header_the_first_counts_and_it_comes_before_the_prefix(
    registry: SchemaRegistry, avro: int
) -> None:
    headers = ((HEADER, prefixed(avro, b"")), (HEADER, b"\x07"))
    assert decode(avro_bytes(AN_ORDER), headers, registry).document["count"] == 5
    with pytest.raises(CodecError, match="no Avro"):  # the value is all Avro, then: its own prefix is none
        decode(prefixed(avro, avro_bytes(AN_ORDER)), headers, registry)


def test_a_key_has_a_header_of_its_own(registry: SchemaRegistry, avro: int) -> None:
    headers = ((HEADERS["key"], prefixed(avro, b"")),)
    key = avro_bytes(AN_ORDER)
    assert str(decode(key, headers, registry, "key").encoding) == f"avro (schema {avro})"
    assert decode(key, headers, registry).encoding.codec == "bytes", "it says nothing of the value"


def test_a_frame_is_known_without_the_registry(avro: int) -> None:
    layers, found = framed(gzip.compress(prefixed(avro, b"x")), ())
    assert (layers, str(found and found.schema)) == (("gzip",), f"schema {avro}")
    assert framed(b'{"a": 1}', ()) == ((), None)
    with pytest.raises(CodecError, match="schema_registry"):
        decode(prefixed(avro, b"x"), (), None)


# JSON


@pytest.mark.parametrize(
    "text",
    [
        b'{"amount":1.10,"big":1e400,"id":123456789012345678901234567890,"neg":-0.0,"e":1E5}',
        b'{"a": 1.5, "b": [1, 2], "c": "\xc3\xa9"}',
        b'{\n  "a": 1,\n  "b": [\n    1.00,\n    2\n  ]\n}',
        b'{\n    "a": {\n        "b": 1\n    }\n}',
        b'{"a": "\\u00e9\\ud83d\\ude00"}',
    ],
)
def test_an_edit_of_json_changes_nothing_else_in_a_usual_layout(text: bytes) -> None:
    found = decode(text, (), None)
    document = copy.deepcopy(found.document)
    document["zz"] = "\u00e9" if b"\\u" in text else 1
    new = found.encode(document)
    assert new is not None
    del document["zz"]
    assert decode(new, (), None).encode(document) == text, "taken back, the edit leaves the very bytes"


def test_json_in_another_layout_keeps_its_values_and_numbers() -> None:
    text = b'{ "b" :1.10,\t"a":[ 1e2 ] }\n'
    found = decode(text, (), None)
    assert found.encode(copy.deepcopy(found.document)) == text
    assert found.encode({**found.document, "c": 1}) == b'{"b":1.10,"a":[1e2],"c":1}'


@pytest.mark.parametrize(("before", "after"), [(b'{"a":true}', {"a": 1}), (b"[1]", [1.0]), (b"[0]", [False])])
def test_what_python_takes_for_equal_is_an_edit_all_the_same(before: bytes, after: Any) -> None:
    new = decode(before, (), None).encode(after)
    assert new == json.dumps(after, separators=(",", ":")).encode()


def test_text_stays_text_and_bytes_stay_bytes() -> None:
    assert edited(b"order 1", lambda _: "order 2", None) == "order 2"
    assert edited(b"\xff", lambda _: "/wD/", None) == "/wD/"
    with pytest.raises(CodecError, match="stay a string"):
        decode(b"order 1", (), None).encode({"a": 1})
    with pytest.raises(CodecError, match="base64"):
        decode(b"\xff", (), None).encode("not base64!")
    with pytest.raises(CodecError, match="nothing to edit"):
        decode(None, (), None).encode({})


# Avro


def test_avro_is_shown_as_it_is_carried_and_comes_back(registry: SchemaRegistry, avro: int) -> None:
    value = prefixed(avro, avro_bytes(AN_ORDER))
    found = decode(value, (), registry)
    shown = {**AN_ORDER, "token": "\x00ÿ", "code": "ab"}
    shown["next"] = {**AN_ORDER["next"], "token": "", "code": "cd"}  # type: ignore[dict-item]
    assert found.document == shown

    def edit(document: Any) -> None:
        document["next"]["amount"] = 3
        document["kinds"].append("B")
        document["token"] = "þ"

    new = edited(value, edit, registry)
    assert new == {**shown, "token": "þ", "kinds": [None, "A", "B"], "next": {**shown["next"], "amount": 3.0}}


@pytest.mark.parametrize(
    ("edit", "where"),
    [
        (lambda d: d.update(id=SECRET.encode().hex(), extra=SECRET), "no such member"),
        (lambda d: d.pop("id"), "id is missing"),
        (lambda d: d.update(id=5), "/id: it wants string"),
        (lambda d: d.update(count=2**31), "/count: it wants int"),
        (lambda d: d.update(count=True), "/count: it wants int"),
        (lambda d: d.update(count=1.0), "/count: it wants int"),
        (lambda d: d.update(amount=SECRET), "/amount: no branch"),
        (lambda d: d.update(weight=None), "/weight: it wants float"),
        (lambda d: d.update(kind=SECRET), "/kind: it wants enum"),
        (lambda d: d.update(code="abc"), "/code: it wants fixed"),
        (lambda d: d.update(token="Ā"), "/token: it wants bytes"),
        (lambda d: d.update(stock=[]), "/stock: it wants map"),
        (lambda d: d["stock"].update({SECRET: "x"}), r"/stock/\*: it wants long"),
        (lambda d: d.update(kinds={}), "/kinds: it wants array"),
        (lambda d: d["kinds"].append(SECRET), r"/kinds/\*: no branch"),
        (lambda d: d["next"].pop("id"), "/next: no branch"),
        (lambda d: d.update(amount=2**53 + 1), "/amount: no branch"),
        (lambda d: d.update(id="\ud800"), "JSON|refuses the document"),
    ],
)
def test_what_the_avro_schema_refuses_is_named_in_its_words(
    edit: Callable[[Any], Any], where: str, registry: SchemaRegistry, avro: int
) -> None:
    found = decode(prefixed(avro, avro_bytes(AN_ORDER)), (), registry)
    document = copy.deepcopy(found.document)
    edit(document)
    with pytest.raises(CodecError, match=where) as error:
        found.encode(document)
    assert SECRET not in str(error.value)


def test_avro_whose_union_hides_its_branch_is_shown_and_not_edited(
    double: RegistryDouble, registry: SchemaRegistry
) -> None:
    schema = {"type": "record", "name": "U", "fields": [{"name": "n", "type": ["int", "long"]}]}
    number = double.add(schema)
    as_long = prefixed(number, b"\x02\x0a")  # the second branch, for a number that fits the first
    found = decode(as_long, (), registry)
    assert found.document == {"n": 5}
    assert found.encode({"n": 5}) == as_long
    with pytest.raises(CodecError, match="written back"):
        found.encode({"n": 6})
    assert edited(prefixed(number, b"\x00\x0a"), lambda _: {"n": 2**40}, registry) == {"n": 2**40}


def test_avro_by_reference_and_without_a_record(double: RegistryDouble, registry: SchemaRegistry) -> None:
    inner = double.add({"type": "record", "name": "a.In", "fields": [{"name": "x", "type": "int"}]})
    middle = double.add(
        {"type": "record", "name": "a.Mid", "fields": [{"name": "in", "type": "a.In"}]},
        references={"a.In": inner},
    )
    outer = {
        "type": "record",
        "name": "Out",
        "fields": [{"name": n, "type": t} for n, t in (("m", "a.Mid"), ("i", "a.In"))],
    }
    number = double.add(outer, references={"a.Mid": middle, "a.In": inner})
    value = prefixed(number, b"\x02\x04")
    assert decode(value, (), registry).document == {"m": {"in": {"x": 1}}, "i": {"x": 2}}
    assert edited(value, lambda d: d["m"]["in"].update(x=3), registry)["m"] == {"in": {"x": 3}}
    assert decode(prefixed(double.add('"string"'), b"\x04ab"), (), registry).document == "ab"
    assert edited(prefixed(double.add('{"type": "bytes"}'), b"\x04ab"), lambda _: "c", registry) == "c"


def test_avro_nested_deeper_than_the_stack_is_refused_and_ends_nothing(
    double: RegistryDouble, registry: SchemaRegistry
) -> None:
    number = double.add({"type": "record", "name": "N", "fields": [{"name": "n", "type": ["null", "N"]}]})
    assert decode(prefixed(number, b"\x02" * 9 + b"\0"), (), registry).document["n"]["n"] is not None
    with pytest.raises(CodecError, match="no Avro"):
        decode(prefixed(number, b"\x02" * 500_000 + b"\0"), (), registry)


def test_bytes_behind_the_avro_are_not_lost(registry: SchemaRegistry, avro: int) -> None:
    with pytest.raises(CodecError, match="goes on"):
        decode(prefixed(avro, avro_bytes(AN_ORDER) + b"x"), (), registry)


# Protobuf

LINE = b"\x08\x07\x12\x04name"
AN_ORDER_PROTO = (
    b"\x0a\x01a\x12\x0e\x0a\x03EUR\x11\x00\x00\x00\x00\x00\x00\xf8\x3f\x22" + bytes([len(LINE)]) + LINE
)


def test_protobuf_is_its_json_mapping_defaults_included_and_comes_back(
    registry: SchemaRegistry, proto: int
) -> None:
    value = proto_value(proto, AN_ORDER_PROTO)
    found = decode(value, (), registry)
    assert str(found.encoding) == f"protobuf (schema {proto})"
    assert found.document == {
        "id": "a",
        "amount": {"currency": "EUR", "value": 1.5},
        "stock": {},
        "lines": [{"count": "7", "name": "name"}],
        "weight": 0.0,
        "token": "",
    }

    def edit(document: Any) -> None:
        document["amount"]["value"] = 2
        document["at"] = "2026-01-31T06:00:00Z"
        document["stock"] = {"a": 1, "b": 2}

    assert edited(value, edit, registry) == {
        **found.document,
        "amount": {"currency": "EUR", "value": 2.0},
        "at": "2026-01-31T06:00:00Z",
        "stock": {"a": 1, "b": 2},
    }


@pytest.mark.parametrize(
    ("path", "shown"),
    [(b"\0", {"x": "a"}), (zigzag(1) + zigzag(0), {"x": "a"}), (zigzag(2) + zigzag(1) + zigzag(0), None)],
)
def test_the_path_leads_to_the_message(path: bytes, shown: Any, registry: SchemaRegistry, proto: int) -> None:
    body = b"\x0a\x01a" if shown else LINE
    found = decode(proto_value(proto, body, path), (), registry)
    assert found.document == (shown or {"count": "7", "name": "name"})
    new = found.encode({**found.document, **({"x": "b"} if shown else {"name": "b"})})
    assert new is not None
    assert new.startswith(prefixed(proto, path)), "the frame stays byte for byte"


def test_the_path_may_stand_in_the_header(
    double: RegistryDouble, registry: SchemaRegistry, proto: int
) -> None:
    headers = ((HEADER, b"\x01" + double.guid(proto).bytes + zigzag(1) + zigzag(1)),)
    assert decode(AN_ORDER_PROTO, headers, registry).document["id"] == "a"


@pytest.mark.parametrize(
    "path", [b"", zigzag(1), zigzag(1) + zigzag(9), zigzag(-1), zigzag(200), b"\xff" * 12]
)
def test_a_broken_path_is_a_codec_error(path: bytes, registry: SchemaRegistry, proto: int) -> None:
    with pytest.raises(CodecError, match=r"path of the Protobuf|no such message"):
        decode(proto_value(proto, b"", path), (), registry)


def test_a_schema_may_come_compiled_as_confluent_s_client_registers_it(
    double: RegistryDouble, registry: SchemaRegistry
) -> None:
    """Some registries give it back as it was registered, and not as text."""

    def compiled(file: Any) -> str:
        return b64encode(file.serialized_pb).decode()

    latlng = double.add(compiled(latlng_pb2.DESCRIPTOR), "PROTOBUF")
    number = double.add(
        compiled(field_info_pb2.DESCRIPTOR), "PROTOBUF", {"google/type/latlng.proto": latlng}
    )  # it imports google/protobuf/descriptor.proto, which no registry has
    assert decode(proto_value(number, b"", b"\0"), (), registry).encoding.codec == "protobuf"
    value = proto_value(latlng, b"", b"\0")
    assert edited(value, lambda d: d.update(latitude=1.5), registry) == {"latitude": 1.5, "longitude": 0.0}
    lonely = double.add(compiled(type_pb2.DESCRIPTOR)[:40], "PROTOBUF")
    with pytest.raises(CodecError, match="schema"):
        decode(proto_value(lonely, b"", b"\0"), (), registry)


def test_protobuf_fields_in_any_order_are_edited_and_unknown_ones_are_not_lost(
    registry: SchemaRegistry, proto: int
) -> None:
    amount_first = AN_ORDER_PROTO[3:] + AN_ORDER_PROTO[:3]
    assert edited(proto_value(proto, amount_first), lambda d: d.update(id="b"), registry)["id"] == "b"
    unknown = AN_ORDER_PROTO + b"\xf8\x06\x01"
    found = decode(proto_value(proto, unknown), (), registry)
    with pytest.raises(CodecError, match="does not know"):
        found.encode({**found.document, "id": "b"})


@pytest.mark.parametrize(
    "edit",
    [
        {"id": 5},
        {"extra": SECRET},
        {"amount": SECRET},
        {"at": SECRET},
        {"weight": 1e300},
        {"stock": {"a": SECRET}},
    ],
)
def test_what_the_protobuf_schema_refuses_does_not_show_the_payload(
    edit: dict[str, Any], registry: SchemaRegistry, proto: int
) -> None:
    found = decode(proto_value(proto, AN_ORDER_PROTO), (), registry)
    with pytest.raises(CodecError, match="refuses the document") as error:
        found.encode({**found.document, **edit})
    assert SECRET not in str(error.value)


# JSON Schema


def test_json_schema_lets_old_json_be_read_and_checks_what_is_written(
    registry: SchemaRegistry, strict: int
) -> None:
    value = prefixed(strict, b'{"amount": "%s", "n": 1.10}' % SECRET.encode())
    found = decode(value, (), registry)
    assert str(found.encoding) == f"json-schema (schema {strict})"
    assert found.encode({**found.document, "amount": 2.5}) == prefixed(strict, b'{"amount": 2.5, "n": 1.10}')
    for amount, where in ((SECRET + "x", "/properties/amount/type"), (0.3, "/properties/amount/multipleOf")):
        with pytest.raises(CodecError, match=where) as error:
            found.encode({**found.document, "amount": amount})
        assert SECRET not in str(error.value)
    with pytest.raises(CodecError, match="minLength"):
        found.encode({"amount": 1, "who": "x"})
    with pytest.raises(CodecError, match="no JSON"):
        decode(prefixed(strict, b"{"), (), registry)


def test_a_json_schema_fetches_nothing_from_elsewhere(
    double: RegistryDouble, registry: SchemaRegistry
) -> None:
    number = double.add({"properties": {"a": {"$ref": "http://127.0.0.1:9/x.json"}}}, "JSON")
    with pytest.raises(CodecError, match="can't be applied"):
        decode(prefixed(number, b'{"a": 1}'), (), registry).encode({"a": 2})


# The registry


@pytest.mark.parametrize(
    ("schema", "kind", "why"),
    [
        ('{"type": "nothing"}', "AVRO", "Avro schema can't be used"),
        ("{", "AVRO", "no AVRO schema"),
        ('{"type": 5}', "JSON", "can't be used: .* at /type"),
        ("message {", "PROTOBUF", "does not compile: schema.proto"),
        ('syntax = "proto3"; import "gone.proto";', "PROTOBUF", "does not compile"),
        ("{}", "SOAP", "SOAP is no kind"),
    ],
)
def test_a_schema_that_can_not_be_used_says_so_and_is_asked_for_once(
    schema: str, kind: str, why: str, double: RegistryDouble
) -> None:
    number, registry = double.add(schema, kind), double.client()
    double.asked.clear()
    for _ in range(3):
        with pytest.raises(CodecError, match=f"schema {number}: .*{why}"):
            decode(prefixed(number, b"\0"), (), registry)
    assert len(double.asked) == 1
    registry.close()


def test_a_reference_never_leads_out_of_its_folder(double: RegistryDouble, registry: SchemaRegistry) -> None:
    other = double.add(MONEY_PROTO, "PROTOBUF")
    for name in ("../../x.proto", "/tmp/x.proto"):
        number = double.add('syntax = "proto3";', "PROTOBUF", {name: other})
        with pytest.raises(CodecError, match="from outside"):
            decode(prefixed(number, b"\0"), (), registry)


def test_an_id_nobody_knows_is_the_entry_s_fault_and_a_registry_that_is_down_is_not(
    double: RegistryDouble,
) -> None:
    registry = double.client()
    number = double.add('"string"')
    with pytest.raises(
        CodecError, match=r"schema 99999: the schema registry .Connection registry. does not have"
    ):
        decode(prefixed(99999, b"x"), (), registry)
    with pytest.raises(CodecError, match="does not have schema 00000000"):
        decode(b"x", ((HEADER, b"\x01" + bytes(16)),), registry)
    double.broken = 401
    try:
        with pytest.raises(RegistryError, match="answered 401"):
            decode(prefixed(number, b"\x02a"), (), registry)
    finally:
        double.broken = None
    assert decode(prefixed(number, b"\x02a"), (), registry).document == "a", "it is asked again"
    registry.close()
    nobody = SchemaRegistry.connect(Connection("x", "http", "127.0.0.1", 9, extra={"max.retries": 0}))
    with pytest.raises(RegistryError, match="did not answer"):
        decode(prefixed(number, b"\x02a"), (), nobody)


@pytest.mark.parametrize(
    ("connection", "what"),
    [
        (Connection("x"), "host is not set"),
        (Connection("x", host="h", extra={"timeuot": 1}), "timeuot"),
        (Connection("x", host="h", extra={"ssl.ca.location": "/nowhere/ca.pem"}), "Connection x"),
        (Connection("x", host="https://h", extra={"ssl.key.location": "k"}), "ssl.certificate.location"),
    ],
)
def test_a_wrong_connection_is_named(connection: Connection, what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        SchemaRegistry.connect(connection)


def test_a_connection_becomes_an_address_with_who_asks(double: RegistryDouble) -> None:
    made = SchemaRegistry.connect(
        Connection("x", "http", "https://host/apis/ccompat/v7", 8443, login="me", password="not:shown")
    )
    settings_ = made._client.config()
    assert settings_["url"] == "https://host:8443/apis/ccompat/v7"
    assert settings_["basic.auth.user.info"] == "me:not:shown"


# Compression


def test_a_bomb_a_lie_and_an_endless_nesting_are_refused() -> None:
    bomb = compressed.pack("zstd", bytes(compressed.MAX_BYTES + 1))
    whole = gzip.compress(b"x" * 100)
    for value in (bomb, whole[:-4], whole + b"more", whole[:12] + b"\xff\xff" + whole[14:]):
        with pytest.raises(CodecError, match=r"more than|broken"):
            decode(value, (), None)
    for _ in range(3):
        whole = gzip.compress(whole)
    with pytest.raises(CodecError, match="more than 3 times"):
        decode(whole, (), None)


# Any bytes

_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)
_HEADERS = st.lists(
    st.tuples(st.sampled_from([HEADER, "__key_schema_id", "x"]), st.none() | st.binary(max_size=24)),
    max_size=3,
).map(tuple)
_MAGIC = (
    b"",
    b"\0",
    b"\x1f\x8b\x08",
    b"\x28\xb5\x2f\xfd",
    b"{",
    b"\0\0\0\0\x01",
    b"\0\0\0\0\x03",
    b"\0\0\0\0\x05",
)


@given(st.sampled_from(_MAGIC), st.binary(max_size=200), _HEADERS)
@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(b"\0\0\0\0\x01", b"\xff" * 9, ())
def test_any_bytes_come_back_or_are_refused_with_the_codec_s_own_error(
    avro: int, proto: int, strict: int, registry: SchemaRegistry, magic: bytes, rest: bytes, headers: Headers
) -> None:
    value = magic + rest
    for known in (registry, None):
        try:
            found = decode(value, headers, known)
        except CodecError:
            continue
        json_text.dumps(found.document)
        assert found.encode(copy.deepcopy(found.document)) == value


@given(st.binary(max_size=60))
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_edit_of_any_bytes_is_made_or_refused(
    avro: int, proto: int, strict: int, registry: SchemaRegistry, body: bytes
) -> None:
    for number in (None, avro, proto, strict):
        value = (
            body
            if number is None
            else prefixed(number, (zigzag(1) + zigzag(1) if number == proto else b"") + body)
        )
        try:
            found = decode(value, (), registry)
            new = found.encode({"amount": 1})
            assert new is not None
            assert decode(new, (), registry).document == {"amount": 1}
        except CodecError:
            pass


@given(_JSON, st.sampled_from([None, 0, 2, 4, 7]), st.booleans())
def test_json_comes_back_and_takes_an_edit(document: Any, indent: int | None, ascii_: bool) -> None:
    layout: dict[str, Any] = {"separators": (",", ":")} if indent is None else {"indent": indent or None}
    text = json.dumps(document, ensure_ascii=ascii_, **layout)
    try:
        text.encode()
    except UnicodeEncodeError:
        return
    found = decode(text.encode(), (), None)
    if found.encoding.codec != "json":
        return
    assert found.encode(copy.deepcopy(found.document)) == text.encode()
    new = found.encode([document])
    assert new is not None
    assert json.loads(new) == [document]


@given(
    st.fixed_dictionaries(
        {
            "id": st.text(),
            "amount": st.none() | st.floats(),
            "count": st.integers(-(2**31), 2**31 - 1),
            "weight": st.floats(width=32),
            "token": st.binary(),
            "code": st.binary(min_size=2, max_size=2),
            "kind": st.sampled_from("AB"),
            "at": st.integers(-(2**63), 2**63 - 1),
            "stock": st.dictionaries(st.text(), st.integers(-(2**63), 2**63 - 1), max_size=3),
            "kinds": st.lists(st.none() | st.sampled_from("AB"), max_size=3),
            "next": st.none(),
        }
    )
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_avro_takes_an_edit_that_can_be_taken_back(
    registry: SchemaRegistry, avro: int, datum: dict[str, Any]
) -> None:
    value = prefixed(avro, avro_bytes(datum))
    found = decode(value, (), registry)
    new = found.encode({**found.document, "id": found.document["id"] + "x"})
    assert new not in (None, value)
    back = decode(new, (), registry)
    assert back.encode({**back.document, "id": found.document["id"]}) == value


@pytest.mark.parametrize(
    ("said", "indexes"), [(b"\0", (0,)), (b"\x02\x00", (0,)), (b"\x04\x02\x04", (1, 2)), (b"\x00\x99", (0,))]
)
def test_message_paths_are_zigzag(said: bytes, indexes: tuple[int, ...]) -> None:
    assert message_path(said)[0] == indexes
