"""A queue's own formats: one class named in its file."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from tests.letters import be32, kafka, sqs
from upath import UPath

from dlq.config import load_queue
from dlq.entry import Understood
from dlq.envelopes import Envelopes, Letter, decode
from dlq.envelopes.untrusted import label
from dlq.errors import ConfigError
from dlq.grouping.classify import Classifier

FORMATS = '''
"""What a team writes beside its queue files."""
from dlq.entry import Understood
from dlq.envelopes import body, untrusted
from dlq.envelopes.spring import Spring


class Wrapped:
    """The failure lies in the value, around the original."""

    name = "wrapped"

    def recognises(self, names):
        return "schema" in names

    def owns(self, name):
        return name == "schema"

    def read(self, letter):
        error = body.fields(body.fields(letter.record.value).get("error"))
        if not error:
            return None
        return Understood(self.name, untrusted.label(body.text(error.get("type"))))


class Renamed(Spring):
    name = "renamed"
    prefix = "acme-"


class Picky:
    def __init__(self, wanted):
        pass


class Half:
    name = "half"


def nothing():
    return None
'''


@pytest.fixture(autouse=True)
def _module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "ours_formats.py").write_text(FORMATS)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("ours_formats", None)


def queue(tmp_path: Path, **more: object) -> Path:
    (tmp_path / "queues").mkdir(exist_ok=True)
    data = {
        "source": {"kind": "memory"},
        "target": {"kind": "memory"},
        "ledger": "sqlite://",
        "archive": str(tmp_path),
        "report": str(tmp_path),
        **more,
    }
    (tmp_path / "queues" / "orders.yaml").write_text(yaml.safe_dump(data))
    (tmp_path / "taxonomy.yaml").write_text(
        "rules: [{name: all, when: {error_type: '*'}, category: transient, remedy: retry}]"
    )
    return tmp_path


def test_one_class_in_a_queues_file_reads_that_queues_letters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DLQ_CONFIG", str(queue(tmp_path, formats=["ours_formats.Wrapped"])))
    letter = kafka(
        ("schema", "1"), value=json.dumps({"error": {"type": "NoSuchSku"}, "payload": {}}).encode()
    )
    understood, group = Classifier.load(load_queue("orders")).classify(letter)
    assert (understood.format, group.error_type, group.rule) == ("wrapped", "NoSuchSku", "all")
    assert decode(letter).format == "unknown", "other queues don't know it"


def test_where_it_is_not_its_convention_after_all_the_shipped_ones_are_asked(tmp_path: Path) -> None:
    envelopes = load_queue("orders", UPath(queue(tmp_path, formats=["ours_formats.Wrapped"]))).envelopes
    assert envelopes.decode(kafka(("schema", "1"), ("wf-error-type", "E"))).format == "orchestrator"
    assert envelopes.decode(kafka(("schema", "1"))).format == "unknown"
    assert envelopes.decode(sqs({"error": {"type": "E"}}, {"schema": "1"})).format == "wrapped"


def test_renamed_headers_of_spring_are_one_subclass(tmp_path: Path) -> None:
    envelopes = load_queue("orders", UPath(queue(tmp_path, formats=["ours_formats.Renamed"]))).envelopes
    u = envelopes.decode(
        kafka(
            ("acme-original-topic", "orders"),
            ("acme-original-partition", be32(4)),
            ("acme-exception-fqcn", "E"),
        )
    )
    assert (u.format, u.origin_topic, u.origin_partition, u.error_type) == ("renamed", "orders", 4, "E")
    assert not envelopes.survives("acme-exception-fqcn")
    assert not envelopes.survives("wf-error-type")
    assert envelopes.survives("acme-tenant")


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("Wrapped", "write it as module.Class"),
        ("no_such_module.Wrapped", "PYTHONPATH"),
        ("ours_formats.Missing", "correct the name"),
        ("ours_formats.Picky", "it takes no arguments"),
        ("ours_formats.Half", "it needs name, recognises, read and owns"),
        ("ours_formats.nothing", "it needs name, recognises, read and owns"),
    ],
)
def test_a_wrong_one_is_named_with_file_field_and_fix(tmp_path: Path, name: str, fix: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_queue("orders", UPath(queue(tmp_path, formats=[name])))
    said = str(caught.value)
    assert "orders.yaml: formats: " in said
    assert repr(name) in said
    assert fix in said


def test_a_wrong_path_to_the_dedupe_key_is_named_too(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"orders\.yaml: dedupe_key: .*write it as \$\.order\.id"):
        load_queue("orders", UPath(queue(tmp_path, dedupe_key="order.id")))
    config = load_queue("orders", UPath(queue(tmp_path, dedupe_key="$.order.id")))
    assert config.envelopes.decode(kafka(value=b'{"order": {"id": "o-1"}}')).dedupe_key == "o-1"


class Raises:
    """A format of somebody's that raises wherever it is told to."""

    name = "raises"

    def __init__(self, where: str) -> None:
        self._where = where

    def recognises(self, names: object) -> bool:
        return self._answer("recognises") is None

    def owns(self, name: str) -> bool:
        return False

    def read(self, letter: Letter) -> Understood | None:
        self._answer("read")
        return Understood(self.name, label(b"E"))

    def _answer(self, where: str) -> None:
        if where == self._where:
            raise RuntimeError("on purpose")


@pytest.mark.parametrize("where", ["recognises", "read"])
def test_one_that_raises_costs_its_own_reading_and_is_named_once(
    where: str, caplog: pytest.LogCaptureFixture
) -> None:
    envelopes = Envelopes([Raises(where)])
    with caplog.at_level(logging.WARNING):
        for n in range(3):
            assert envelopes.decode(kafka(("wf-error-type", "E"), (f"x{n}", "1"))).format == "orchestrator"
    assert [r.message for r in caplog.records] == [
        "format raises raised RuntimeError: such letters are read without it"
    ]
    assert Envelopes([Raises("nowhere")]).decode(kafka()).format == "raises"
