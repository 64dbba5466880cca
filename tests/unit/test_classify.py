from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from upath import UPath

from dlq.config import Owners
from dlq.entry import Record
from dlq.grouping.classify import Classifier
from dlq.grouping.regrouping import NONE, Regrouping
from dlq.grouping.taxonomy import load_taxonomy

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
    assert group.signature == "RateLimit: <*> after <*> tries @ crm.sync"


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


def spring(*causes: str, message: str = "Listener failed") -> Record:
    trace = "x: y\n" + "".join(f"Caused by: {cause}: said\n" for cause in causes)
    headers = (
        ("kafka_dlt-original-topic", b"orders"),
        ("kafka_dlt-exception-fqcn", b"org.springframework.kafka.listener.ListenerExecutionFailedException"),
        ("kafka_dlt-exception-cause-fqcn", causes[0].encode()),
        ("kafka_dlt-exception-message", message.encode()),
        ("kafka_dlt-exception-stacktrace", trace.encode()),
    )
    return Record(0, "1", 1, None, b"{}", headers, 0)


def test_the_cause_decides_and_names_the_group(classifier: Classifier):
    _, group = classifier.classify(
        spring("org.springframework.web.client.ResourceAccessException", "java.net.SocketTimeoutException")
    )
    assert (group.category, group.remedy) == ("transient", "retry")
    assert group.error_type == "org.springframework.web.client.ResourceAccessException"


def test_faults_that_differ_in_their_causes_alone_are_two_groups(classifier: Classifier):
    io = "org.springframework.web.client.ResourceAccessException"
    _, late = classifier.classify(spring(io, "java.net.SocketTimeoutException"))
    _, tls = classifier.classify(spring(io, "javax.net.ssl.SSLHandshakeException"))
    assert late.fingerprint != tls.fingerprint
    assert (late.category, tls.category) == ("transient", "permanent")


def own(tmp_path: Path, rules: str, regrouping: Regrouping = NONE) -> Classifier:
    path = tmp_path / "taxonomy.yaml"
    path.write_text(f"rules: [{rules}]")
    return Classifier(load_taxonomy(UPath(path)), OWNERS, regrouping=regrouping)


def test_a_rule_names_the_fingerprint_of_all_it_decides(tmp_path: Path):
    classifier = own(
        tmp_path,
        "{name: r, when: {error_type: A}, category: transient, remedy: retry, fingerprint: psp-down}",
    )
    one, other = (classifier.classify(letter(1, error_type="A", error_message=m))[1] for m in ("x", "y"))
    assert one is other
    assert (one.fingerprint, one.signature) == ("rule:psp-down", "psp-down, by rule 'r' @ crm.sync")


def test_a_rule_looks_at_headers_and_retry_counts(tmp_path: Path):
    classifier = own(
        tmp_path,
        "{name: tired, when: {retry_count_at_least: 3}, category: manual, remedy: manual},"
        "{name: json, when: {header: {Content-Type: '*/json'}}, category: transient, remedy: retry}",
    )

    def ruled(count: bytes, content: bytes) -> str:
        record = letter(1, error_type="A")
        kept = tuple(header for header in record.headers if header[0] != "content-type")
        headers = (*kept, ("content-type", content), ("dlq-retry-count", count))
        return classifier.classify(Record(0, "1", 1, None, None, headers, 0))[1].rule

    assert ruled(b"0", b"application/json") == "json"
    assert ruled(b"3", b"application/json") == "tired"
    assert ruled(b"7", b"text/plain") == "tired"
    assert ruled(b"2", b"text/plain") == "no rule"


def test_it_says_why(classifier: Classifier):
    record = letter(1)
    assert classifier.why(record, classifier.classify(record)[0]) == (
        "rule 'rate limit' matched exception (*RateLimit*)"
    )


def test_what_people_merged_and_split_is_honoured(tmp_path: Path, classifier: Classifier):
    _, one = classifier.classify(letter(1, error_message="slow down"))
    _, other = classifier.classify(letter(1, error_type="DataCorruption"))
    decided = Regrouping({one.fingerprint: other}, {other.fingerprint: [re.compile("row 1")]})
    regrouped = Classifier(SHIPPED, OWNERS, regrouping=decided)
    assert regrouped.classify(letter(1, error_message="slow down"))[1] == other
    record = letter(1, error_type="DataCorruption", error_message="429 after 3 tries in row 17")
    _, plain = classifier.classify(record)
    splitting = Classifier(
        SHIPPED, OWNERS, regrouping=Regrouping({}, {plain.fingerprint: [re.compile("row 1")]})
    )
    _, apart = splitting.classify(record)
    assert apart.fingerprint == f"{plain.fingerprint}/{apart.fingerprint.rpartition('/')[2]}"
    assert (apart.category, apart.component) == (plain.category, plain.component)
    _, rest = splitting.classify(
        letter(1, error_type="DataCorruption", error_message="429 after 3 tries in row 2")
    )
    assert rest == plain


def test_a_circle_of_merges_ends(classifier: Classifier):
    _, one = classifier.classify(letter(1))
    _, other = classifier.classify(letter(1, error_type="DataCorruption"))
    circle = Regrouping({one.fingerprint: other, other.fingerprint: one})
    assert Classifier(SHIPPED, OWNERS, regrouping=circle).classify(letter(1))[1] in (one, other)
