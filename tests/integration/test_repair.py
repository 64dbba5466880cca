"""Repair on a real broker: the consumer got stricter, and what is stored no longer parses; with a real registry too."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka.schema_registry import Schema, SchemaRegistryClient
from confluent_kafka.schema_registry.avro import AvroDeserializer, AvroSerializer
from confluent_kafka.schema_registry.json_schema import JSONDeserializer, JSONSerializer
from confluent_kafka.schema_registry.protobuf import ProtobufDeserializer, ProtobufSerializer
from confluent_kafka.serialization import MessageField, SerializationContext
from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from tests.conftest import _skip
from tests.integration.command import Commands
from tests.integration.registry import Registry
from tests.integration.rig import Rig, Seen, failure

from dlq_demo.process import Unavailable

PATCH = b'[{"op": "add", "path": "/currency", "value": "EUR"}]'


@pytest.fixture
def patch(tmp_path: Path) -> str:
    path = tmp_path / "patch.json"
    path.write_bytes(PATCH)
    return str(path)


def group(rig: Rig) -> str:
    ((number,),) = rig.sql("SELECT DISTINCT grp FROM entry")
    return str(number)


@pytest.mark.parametrize("many", [2_300, pytest.param(23_000, marks=pytest.mark.slow)])
def test_messages_that_no_longer_parse_are_mended_with_one_change(
    make_rig: Callable[..., Rig], patch: str, many: int
) -> None:
    rig = make_rig(parts=3)
    dlq = Commands(rig)
    rig.begin()
    rig.letters(many, kinds=("DataCorruption",))
    lame = [(b"lame", b"[%d]" % n, failure(many + n, "DataCorruption", topic=rig.origin)) for n in range(5)]
    rig.produce(rig.dlq, lame)
    dlq.run("take", rig.queue)
    assert rig.states() == {"open:waiting_for_person": many + 5}

    began = time.monotonic()
    looked = dlq.json("repair", rig.queue, "--group", group(rig), "--patch", patch, "--dry-run")
    assert (looked["drafted"], looked["hash"], len(looked["sample"])) == (many, None, 10)
    assert looked["failed"] == {"operation 1 (add /currency): there is no such place": 5}
    assert all(each["changes"] == [["/currency", "nothing", "text of 3"]] for each in looked["sample"][:9])
    assert rig.sql("SELECT id FROM repair") == []

    drafted = dlq.json("repair", rig.queue, "--group", group(rig), "--patch", patch, "--who", "ada")
    print(f"{many} drafted, twice, in {time.monotonic() - began:.1f} s")
    assert drafted["drafted"] == many
    assert "has the hash" in dlq.refusal("repair", rig.queue, "--approve", "0" * 12, exits=3)
    assert rig.log(rig.origin) == []

    def fails(seen: Seen) -> bool:
        """The stricter consumer: each order has a number and a currency."""
        order = json.loads(seen.value or b"")
        return not isinstance(order["order"], int) or order.get("currency") != "EUR"

    consumer = rig.consumer(fails=fails)
    began = time.monotonic()
    sent = dlq.json("repair", rig.queue, "--approve", drafted["hash"][:12], "--who", "bob", seconds=300)
    print(f"{many} sent, with their outcomes and the proof, in {time.monotonic() - began:.1f} s")
    assert (sent["replayed"], sent["confirmed"], sent["returned"], sent["refused"]) == (many, many, 0, [])
    assert (sent["proven"], sent["verdict"]) == (True, "green")
    assert rig.states() == {"confirmed": many, "open:repair_failed": 5}
    assert consumer.failed == []
    assert len(consumer.effects) == many
    assert max(consumer.effects.values()) == 1

    letters = {(s.part, s.offset): s for s in rig.log(rig.dlq)}
    for seen in rig.effects():
        part, offset = (seen.header("dlq-entry") or "").rsplit("/", 2)[1:]
        letter = letters[int(part), int(offset)]
        assert json.loads(seen.value or b"") == {**json.loads(letter.value or b""), "currency": "EUR"}
        assert seen.key == letter.key
    rig.check_nothing_pending()

    told = dlq.json("explain", "--entry", rig.queue, "0/0")
    assert told["encoding"] == "json"
    assert "sent in job" in dlq.run("explain", "--entry", rig.queue, "0/0").stdout
    (draft,) = told["drafts"]
    assert (draft["patch_sha"], draft["job"]) == (drafted["patch_sha"], told["jobs"][0]["id"])
    assert [(d["who"], d["kind"]) for d in told["decisions"]][:2] == [
        ("ada", "repair"),
        ("bob", "review:replay"),
    ]
    assert "Repairs sent" in Path(sent["report"]).read_text()


def test_a_repair_the_consumer_does_not_take_ends_after_one_entry(
    make_rig: Callable[..., Rig], patch: str
) -> None:
    rig = make_rig(parts=2)
    dlq = Commands(rig)
    rig.begin()
    rig.letters(400, kinds=("DataCorruption",))
    dlq.run("take", rig.queue)
    rig.consumer(fails=lambda _: True)
    made = dlq.json("repair", rig.queue, "--group", group(rig), "--patch", patch)
    sent = dlq.json("repair", rig.queue, "--approve", made["hash"], exits=1)
    assert (sent["replayed"], sent["returned"], sent["verdict"]) == (1, 1, "red")
    assert rig.states() == {"returned": 1, "open:returned": 1, "open:waiting_for_person": 399}
    (line,) = rig.sql(
        "SELECT b.payload_sha, d.payload_sha FROM entry b JOIN draft d ON d.entry = b.return_of"
    )
    assert line[0] == line[1], "what came back is the revision, linked to the original"


# Through a real registry

AVRO = """{"type": "record", "name": "Order", "fields": [
  {"name": "order", "type": "int"}, {"name": "currency", "type": ["null", "string"], "default": null},
  {"name": "at", "type": {"type": "long", "logicalType": "timestamp-millis"}, "default": 0}]}"""
JSON_SCHEMA = """{"title": "Order", "type": "object", "required": ["order"], "properties": {
  "order": {"type": "integer"}, "currency": {"enum": ["EUR", "USD"]}}}"""
PROTO = (
    'syntax = "proto3"; message Order { int32 order = 1; string currency = 2; map<string, int32> stock = 3; }'
)


@pytest.fixture(scope="module")
def registry() -> Iterator[Registry]:
    try:
        with Registry() as running:
            yield running
    except Unavailable as error:
        _skip(error)


def order_class() -> Any:
    file = FileDescriptorProto(name="order.proto", package="shop", syntax="proto3")
    message = file.message_type.add(name="Order")
    for number, (name, kind) in enumerate(
        (("order", FieldDescriptorProto.TYPE_INT32), ("currency", FieldDescriptorProto.TYPE_STRING)), 1
    ):
        message.field.add(name=name, number=number, type=kind, label=FieldDescriptorProto.LABEL_OPTIONAL)
    pool = DescriptorPool()
    pool.Add(file)
    return GetMessageClass(pool.FindMessageTypeByName("shop.Order"))


def test_values_framed_for_a_real_registry_are_mended_and_read_by_its_own_deserializers(
    make_rig: Callable[..., Rig], registry: Registry, patch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written and read by confluent-kafka's serializers: a repaired value is one of theirs."""
    client = SchemaRegistryClient({"url": registry.url})
    order = order_class()
    context = SerializationContext("orders", MessageField.VALUE)
    avro = AvroSerializer(client, AVRO)
    # Each under a subject of its own: a subject holds one kind of schema.
    as_json = JSONSerializer(JSON_SCHEMA, client)
    as_proto = ProtobufSerializer(order, client)
    text = client.register_schema("text-value", Schema(PROTO, "PROTOBUF"))

    def value(n: int) -> bytes:
        match n % 4:
            case 0:
                made = avro(
                    {"order": n, "currency": None, "at": 0}, SerializationContext("avro", MessageField.VALUE)
                )
            case 1:
                made = as_json({"order": n}, SerializationContext("json", MessageField.VALUE))
            case 2:
                made = as_proto(order(order=n), SerializationContext("proto", MessageField.VALUE))
            case _:
                made = b"\0" + text.to_bytes(4, "big") + b"\0" + order(order=n).SerializeToString()
        assert isinstance(made, bytes)
        return made

    rig = make_rig(parts=2)
    dlq = Commands(rig)
    dlq.configure(schema_registry={"connection": "registry"})
    monkeypatch.setenv("AIRFLOW_CONN_REGISTRY", json.dumps(registry.connection))
    rig.begin()
    letters = [(b"k%d" % n, value(n), failure(n, "DataCorruption", topic=rig.origin)) for n in range(80)]
    letters.append(
        (b"nobody", b"\0" + bytes([0, 0, 99, 99]) + b"x", failure(80, "DataCorruption", topic=rig.origin))
    )
    rig.produce(rig.dlq, letters)
    dlq.run("take", rig.queue)

    wrong = dlq.json(
        "repair",
        rig.queue,
        "--group",
        group(rig),
        "--patch",
        "-",
        "--dry-run",
        stdin=b'[{"op": "add", "path": "/currency", "value": 5}]',
    )
    assert wrong["drafted"] == 0
    assert any("/currency: no branch of its union" in why for why in wrong["failed"])
    assert any("/properties/currency/enum" in why for why in wrong["failed"])
    assert any("Protobuf schema refuses" in why for why in wrong["failed"])

    made = dlq.json("repair", rig.queue, "--group", group(rig), "--patch", patch)
    assert made["drafted"] == 80
    assert [why for why in made["failed"] if "does not have schema 25443" in why]
    assert {each["encoding"].split()[0] for each in made["sample"]} >= {"avro", "protobuf"}

    readers: dict[int, Any] = {
        0: AvroDeserializer(client),
        1: JSONDeserializer(None, schema_registry_client=client),
        2: ProtobufDeserializer(order, {"use.deprecated.format": False}),
        3: ProtobufDeserializer(order, {"use.deprecated.format": False}),
    }

    def fails(seen: Seen) -> bool:
        number = int((seen.key or b"k")[1:])
        found = readers[number % 4](seen.value, context)
        if number % 4 >= 2:
            found = {"order": found.order, "currency": found.currency}
        return (found["order"], found["currency"]) != (number, "EUR")

    rig.consumer(fails=fails)
    sent = dlq.json("repair", rig.queue, "--approve", made["hash"])
    assert (sent["confirmed"], sent["returned"], sent["verdict"]) == (80, 0, "green")
    by_key = {seen.key: seen.value for seen in rig.effects()}
    for n in range(80):
        assert (by_key[b"k%d" % n] or b"")[:5] == value(n)[:5], "the schema's id stays"
