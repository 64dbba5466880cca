"""A dedupe key in a value that is no plain JSON: read through the codecs, at intake, on a rebuild, and by explain."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from io import BytesIO
from typing import Any

import fastavro
import pytest
from tests.memory_rig import MemoryRig, failure
from tests.schema_registry import RegistryDouble

from dlq.cli.look import explained
from dlq.dedupe import DedupeKeys
from dlq.drain import Drain
from dlq.entry import Record, Understood
from dlq.export import Stored, exported
from dlq.grouping.classify import Classifier
from dlq.opening import open_drain
from dlq.ports import Connection

SCHEMA = {
    "type": "record",
    "name": "Order",
    "fields": [{"name": "order", "type": {"type": "map", "values": "string"}}],
}
DOCUMENT = {"order": {"id": "o-1"}}


@pytest.fixture(scope="module")
def registry() -> Iterator[RegistryDouble]:
    with RegistryDouble() as running:
        running.add(SCHEMA)
        yield running


@pytest.fixture
def keyed(make_queue: Callable[..., MemoryRig]) -> MemoryRig:
    return make_queue(dedupe_key="$.order.id", schema_registry={"connection": "registry"})


@pytest.fixture
def known(registry: RegistryDouble) -> Callable[[str], Connection]:
    return lambda name: registry.connection if name == "registry" else Connection(name)


def avro() -> bytes:
    out = BytesIO()
    fastavro.schemaless_writer(out, SCHEMA, DOCUMENT)
    return b"\x00" + (1).to_bytes(4, "big") + out.getvalue()


VALUES = {
    "json": json.dumps(DOCUMENT).encode(),
    "gzip": gzip.compress(json.dumps(DOCUMENT).encode()),
    "avro": avro(),
    "gzip around avro": gzip.compress(avro()),
}
WITHOUT = {
    "no such place": gzip.compress(b'{"order": {}}'),
    "broken gzip": VALUES["gzip"][:-6],
    "text": b"order o-1",
    "bytes": b"\xff\xfe",
    "a schema nobody knows": b"\x00\x00\x00\x00\x09abc",
    "empty": b"",
}


def opened(queue: MemoryRig, connections: Any, run: str = "r1") -> Drain:
    drain = open_drain(queue.config, run_id=run, connections=connections)
    queue._drains.append(drain)
    return drain


def keys_of(queue: MemoryRig) -> list[str | None]:
    return [key for (key,) in queue.rows("SELECT dedupe_key FROM entry ORDER BY pos")]


def put(queue: MemoryRig, *values: bytes) -> None:
    for number, value in enumerate(values):
        queue.put(part=0, value=value, headers=failure(number))


def test_an_intake_reads_it_whatever_is_around_it(keyed: MemoryRig, known: Any) -> None:
    put(keyed, *VALUES.values())
    keyed.take(opened(keyed, known))
    assert keys_of(keyed) == ["o-1"] * len(VALUES)


def test_what_has_none_or_is_broken_is_taken_without(keyed: MemoryRig, known: Any) -> None:
    put(keyed, *WITHOUT.values())
    assert keyed.take(opened(keyed, known)).taken == len(WITHOUT)
    assert keys_of(keyed) == [None] * len(WITHOUT)


def test_a_header_s_key_comes_first(keyed: MemoryRig, known: Any) -> None:
    keyed.put(part=0, value=VALUES["gzip"], headers=failure(0, dedupe="d-1"))
    keyed.take(opened(keyed, known))
    assert keys_of(keyed) == ["d-1"]


def test_a_registry_that_is_down_costs_the_keys_and_is_asked_once(keyed: MemoryRig) -> None:
    with RegistryDouble() as broken:
        broken.broken = 500
        put(keyed, *[VALUES["avro"]] * 5, VALUES["gzip"])
        drain = opened(keyed, lambda name: broken.connection if name == "registry" else Connection(name))
        assert keyed.take(drain).taken == 6
        assert keys_of(keyed)[:5] == [None] * 5
        assert len(broken.asked) == 1


def test_a_queue_without_a_path_decodes_nothing(make_queue: Callable[..., MemoryRig]) -> None:
    queue = make_queue()
    put(queue, *VALUES.values())
    queue.take(queue.open())
    assert keys_of(queue) == [None] * len(VALUES)


def test_explain_reads_it_too(keyed: MemoryRig, known: Any) -> None:
    keys = DedupeKeys(keyed.config, known)
    lines = [exported(Stored(0, 7, None, value, (), None), "orders.dlq") for value in VALUES.values()]
    found = list(explained(lines, Classifier.load(keyed.config), keys))
    keys.close()
    assert [each["dedupe_key"] for each in found] == ["o-1"] * len(VALUES)  # type: ignore[index]


def test_a_schema_id_in_a_header_says_that_a_brace_is_no_json(
    keyed: MemoryRig, known: Any, registry: RegistryDouble
) -> None:
    schema = {**SCHEMA, "fields": [{"name": "first", "type": "int"}, *SCHEMA["fields"]]}  # type: ignore[misc]
    number = registry.add(schema)
    out = BytesIO()
    fastavro.schemaless_writer(out, schema, {"first": -62, **DOCUMENT})
    assert out.getvalue().startswith(b"{")
    keys, what = DedupeKeys(keyed.config, known), Understood()
    header = ("__value_schema_id", b"\x00" + number.to_bytes(4, "big"))
    keys.fill(Record(0, "1", 1, None, out.getvalue(), (header,), None), what)
    keys.close()
    assert what.dedupe_key == "o-1"
