from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from upath import UPath

from dlq.classify import Classifier
from dlq.config import Owners
from dlq.entry import Record
from dlq.taxonomy import load_taxonomy

SHIPPED = load_taxonomy(UPath(Path(__file__).parents[2] / "include" / "config" / "taxonomy.yaml"))
OWNERS = Owners(default="on-call", permanent="platform")


def letter(ordinal: int, **failure: str) -> Record:
    named = {
        "error_type": "RateLimit",
        "error_message": "429 after 3 tries",
        "component": "crm.sync",
        "stage": "sync",
        **failure,
    }
    headers = [
        ("content-type", b"application/json"),
        ("correlation-id", b"wf-%d" % ordinal),
        ("traceparent", b"00-%032x-%016x-01" % (ordinal + 1, ordinal + 1)),
        ("dedupe-key", b"order-%d" % ordinal),
        *((f"wf-{name.replace('_', '-')}", value.encode()) for name, value in named.items() if value),
        ("wf-attempts", b"3"),
        ("wf-failed-at", b"%d" % (1764015660000 + ordinal)),
        ("wf-origin-topic", b"orders"),
        ("wf-origin-partition", b"%d" % (ordinal % 6)),
        ("wf-origin-offset", b"%d" % ordinal),
        ("wf-origin-timestamp", b"%d" % (1764015650000 + ordinal)),
        ("wf-consumer-group", b"orders-workers"),
        ("wf-stack-trace", b"Traceback (most recent call last)\n" * 20),
    ]
    return Record(ordinal % 6, str(ordinal), ordinal, b"key", b"value", tuple(headers), 0)


@pytest.fixture
def classifier() -> Classifier:
    return Classifier(SHIPPED, OWNERS)


def test_a_dead_letter_is_understood_and_grouped(classifier: Classifier):
    understood, group = classifier.classify(letter(7))
    assert understood.correlation_id == "wf-7"
    assert (group.category, group.remedy, group.rule, group.owner) == (
        "transient",
        "retry",
        "rate limit",
        "on-call",
    )
    assert (group.component, group.error_type, group.format) == ("crm.sync", "RateLimit", "orchestrator")
    assert group.signature == "RateLimit: <n> after <n> tries @ crm.sync"


def test_letters_that_differ_in_values_share_one_group_object(classifier: Classifier):
    groups = [classifier.classify(letter(n, error_message=f"429 after {n} tries"))[1] for n in range(5)]
    assert all(group is groups[0] for group in groups)


@pytest.mark.parametrize(
    "failure", [{"error_type": "DataCorruption"}, {"component": "crm.read"}, {"error_message": "other words"}]
)
def test_what_differs_in_kind_does_not(classifier: Classifier, failure: dict[str, str]):
    assert classifier.classify(letter(1))[1] != classifier.classify(letter(1, **failure))[1]


def test_where_no_component_is_named_the_consumer_group_is_it(classifier: Classifier):
    assert classifier.classify(letter(1, component=""))[1].component == "orders-workers"


def test_a_letter_that_says_nothing_is_unknown_and_somebodys(classifier: Classifier):
    understood, group = classifier.classify(
        Record(0, "1", 1, None, None, (), None, "unrepresentable_headers")
    )
    assert understood.format == "unknown"
    assert (group.category, group.remedy, group.owner) == ("unknown", "manual", "on-call")
    assert (group.component, group.error_type) == ("unknown", "unknown")


def test_the_owner_is_the_rules_then_the_categorys(tmp_path: Path):
    path = tmp_path / "taxonomy.yaml"
    path.write_text(
        "rules: [{name: r, when: {error_type: A}, category: permanent, remedy: manual, owner: crm}]"
    )
    classifier = Classifier(load_taxonomy(UPath(path)), OWNERS)
    assert classifier.classify(letter(1, error_type="A"))[1].owner == "crm"
    assert classifier.owner("permanent", "r") == "crm"
    assert classifier.owner("permanent") == "platform"
    assert classifier.owner("manual", "another") == "on-call"


def test_its_memory_is_bounded(classifier: Classifier):
    for n in range(10_000):
        classifier.classify(letter(n, error_message=f"row {n}", stage=f"s{n}"))
    assert len(classifier._groups) <= 4096
    assert len(classifier._same) == 1


@given(st.text(max_size=40), st.text(max_size=40), st.text(max_size=300))
def test_the_memo_never_changes_the_answer(error_type: str, component: str, message: str):
    fresh, warm = Classifier(SHIPPED, OWNERS), Classifier(SHIPPED, OWNERS)
    record = letter(1, error_type=error_type, component=component, error_message=message)
    warm.classify(record)
    warm.classify(letter(2))
    assert warm.classify(record) == fresh.classify(record)
