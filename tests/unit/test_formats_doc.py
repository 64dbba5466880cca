"""docs/formats.md says what the decoders do: its examples are run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tests.letters import kafka
from upath import UPath

from dlq.config import Owners
from dlq.entry import Understood
from dlq.envelopes import Envelopes, decode
from dlq.envelopes.registry import SHIPPED
from dlq.explain import explained
from dlq.export import imported
from dlq.grouping.classify import Classifier
from dlq.grouping.taxonomy import load_taxonomy

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "formats.md").read_text()
SECTIONS = {
    name: section
    for section in TEXT.split("\n### ")[1:]
    for name in re.findall(r"^.*: `([a-z-]+)`\n", section)[:1]
}
BODIES = {
    "cloudevents",
    "lambda-destination",
    "lambda-stream",
    "sns",
    "eventbridge-bus",
    "sqs-redrive",
    "sqs-extended-client",
    "unknown",
}
TAXONOMYS = ("category", "remedy", "rule", "why", "fingerprint")


def example(name: str) -> tuple[str, dict[str, Any]]:
    found = re.search(r"```json\n(.*)\n(.*)\n```", SECTIONS[name])
    assert found is not None
    return found[1], json.loads(found[2])


def known(answer: dict[str, Any]) -> dict[str, Any]:
    """Without what is null, and what the taxonomy makes of it."""
    inner = {k: known(v) if isinstance(v, dict) else v for k, v in answer.items() if k not in TAXONOMYS}
    return {k: v for k, v in inner.items() if v not in (None, {})}


def test_every_format_has_its_section() -> None:
    assert set(SECTIONS) == {form.name for form in SHIPPED} | BODIES


@pytest.mark.parametrize("name", SECTIONS)
def test_an_example_is_explained_as_it_says(name: str) -> None:
    line, answer = example(name)
    classifier = Classifier(load_taxonomy(UPath(ROOT / "include" / "config" / "taxonomy.yaml")), Owners())
    (said,) = explained([line.encode()], classifier)
    assert isinstance(said, dict)
    assert known(said) == answer
    assert answer["format"] == name


@pytest.mark.parametrize("name", SECTIONS)
def test_a_pointer_is_named_where_there_is_one(name: str) -> None:
    pointer = decode(imported(example(name)[0].encode())).pointer
    if pointer is not None:
        assert f"{pointer.partition(':')[0]}:" in SECTIONS[name]


@pytest.mark.parametrize("name", [form.name for form in SHIPPED])
def test_each_header_of_a_table_is_in_its_example(name: str) -> None:
    line, _ = example(name)
    for header in re.findall(r"^\| `([^`]+)` \|", SECTIONS[name], re.MULTILINE):
        assert f'"{header}"' in line


def test_the_class_of_the_guide_reads_letters() -> None:
    source = re.search(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert source is not None
    namespace: dict[str, Any] = {}
    exec(source[1], namespace)
    envelopes = Envelopes([namespace["Envelope"]()])
    u = envelopes.decode(kafka(("x-our-error", "E"), ("x-our-topic", "orders"), ("x-our-topic", "later")))
    assert (u.format, u.error_type, u.origin_topic) == ("ours", "E", "orders")
    assert not envelopes.survives("x-our-error")
    assert isinstance(u, Understood)
