from __future__ import annotations

from pathlib import Path

import pytest
from upath import UPath

from dlq.entry import Understood
from dlq.errors import ConfigError
from dlq.taxonomy import UNMATCHED, http_status, load_taxonomy

SHIPPED = load_taxonomy(UPath(Path(__file__).parents[2] / "include" / "config" / "taxonomy.yaml"))


def written(tmp_path: Path, text: str) -> UPath:
    path = tmp_path / "taxonomy.yaml"
    path.write_text(text, encoding="utf-8")
    return UPath(path)


def rule(name: str, when: str, does: str = "category: transient, remedy: retry") -> str:
    return f"  - {{name: {name}, when: {{{when}}}, {does}}}\n"


@pytest.mark.parametrize(
    ("error_type", "message", "expected"),
    [
        ("TransientNetwork", "read failed", ("transient", "retry", "network")),
        ("requests.exceptions.ConnectionError", None, ("transient", "retry", "network")),
        ("java.net.ConnectException", None, ("transient", "retry", "network")),
        ("RateLimit", "slow down", ("transient", "retry", "rate limit")),
        ("PluginTimeout", "no answer after 30 s", ("transient", "retry", "time-out")),
        ("java.net.SocketTimeoutException", "Read timed out", ("transient", "retry", "time-out")),
        ("PluginError", "HTTP 503 from upstream", ("transient", "retry", "server error or throttled")),
        ("HTTPStatusError", "429 Too Many Requests", ("transient", "retry", "server error or throttled")),
        ("PluginError", "Connection reset by peer", ("transient", "retry", "connection reset")),
        (None, "read ECONNRESET", ("transient", "retry", "connection reset")),
        ("QuotaExceeded", "tokens: connection reset", ("permanent", "raise_quota", "quota used up")),
        ("MemoryQuotaExceeded", "needs 700 MB", ("permanent", "raise_quota", "memory quota")),
        ("java.lang.OutOfMemoryError", "Java heap space", ("permanent", "raise_quota", "memory quota")),
        ("ScopeViolation", "crm.write", ("permanent", "patch_plugin", "scope violation")),
        ("DataCorruption", "bad checksum", ("manual", "edit", "corrupt data")),
        (
            "org.apache.kafka.common.errors.SerializationException",
            "?",
            ("manual", "edit", "cannot be deserialized"),
        ),
        ("RecordDeserializationException", "?", ("manual", "edit", "cannot be deserialized")),
        ("PluginError", "NoneType has no attribute x", ("unknown", "manual", UNMATCHED)),
        ("PluginError", "tenant 429 has no workflow", ("unknown", "manual", UNMATCHED)),
        (None, None, ("unknown", "manual", UNMATCHED)),
    ],
)
def test_the_shipped_rules_say_what_an_on_call_engineer_would(
    error_type: str | None, message: str | None, expected: tuple[str, str, str]
):
    decision = SHIPPED.decide(Understood(error_type=error_type, message=message))
    assert (decision.category, decision.remedy, decision.rule) == expected


def test_the_cause_decides_where_the_type_is_a_wrapper():
    understood = Understood(
        error_type="ListenerExecutionFailedException", cause_type="a.b.ValueDeserializationException"
    )
    assert SHIPPED.decide(understood).remedy == "edit"


def test_no_shipped_rule_is_unreachable():
    assert SHIPPED.findings == ()


@pytest.mark.parametrize(
    ("message", "status"),
    [
        ("HTTP 503", 503),
        ("HTTP/1.1 502 bad", 502),
        ("got status=429 from crm", 429),
        ("status_code: 500", 500),
        ("Status Code 404", 404),
        ("503 Service Unavailable", 503),
        ("502: Bad Gateway", 502),
        ("500 Server Error for url", 500),
        ("tenant 429 has no workflow", None),
        ("took 503 ms", None),
        ("HTTP 999", None),
        ("HTTP 5031", None),
        ("", None),
        (None, None),
    ],
)
def test_only_a_status_named_as_one_is_a_status(message: str | None, status: int | None):
    assert http_status(message) == status


@pytest.mark.parametrize(
    ("when", "understood", "holds"),
    [
        ("error_type: plugin*", Understood(error_type="PluginError"), True),
        ("error_type: plugin*", Understood(error_type="NoPlugin"), False),
        ("error_type: plugin*", Understood(), False),
        ("component: 'payments.*'", Understood(component="payments.charge"), True),
        ("component: charge", Understood(component="payments.charge"), False),
        ("stage: [charge, refund]", Understood(stage="refund"), True),
        ("message: BAD row", Understood(message="a bad ROW there"), True),
        ("message_matches: 'row \\d+$'", Understood(message="bad row 17"), True),
        ("message_matches: 'row \\d+$'", Understood(message="bad row 17."), False),
        ("status: 503", Understood(message="HTTP 503"), True),
        ("status: 5xx", Understood(message="HTTP 503"), True),
        ("status: [404, 5xx]", Understood(message="HTTP 403"), False),
        ("headerless: true", Understood(correlation_id="wf-1"), True),
        ("headerless: true", Understood(message=""), False),
        ("error_type: A, message: x", Understood(error_type="A", message="y"), False),
        ("error_type: A, message: x", Understood(error_type="a", message="xy"), True),
    ],
)
def test_conditions(tmp_path: Path, when: str, understood: Understood, holds: bool):
    taxonomy = load_taxonomy(written(tmp_path, "rules:\n" + rule("r", when)))
    assert (taxonomy.decide(understood).rule == "r") is holds


def test_the_first_rule_that_holds_decides_and_says_by_what(tmp_path: Path):
    text = (
        "rules:\n"
        + rule("one", "error_type: A, component: c")
        + rule("two", "error_type: A", "category: manual, remedy: edit, owner: data")
    )
    taxonomy = load_taxonomy(written(tmp_path, text))
    first = taxonomy.decide(Understood(error_type="A", component="c"))
    second = taxonomy.decide(Understood(error_type="A"))
    assert (first.rule, first.matched, first.owner) == ("one", ("error_type", "component"), None)
    assert (second.rule, second.matched, second.owner) == ("two", ("error_type",), "data")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rules: [", ["not YAML"]),
        ("rules:", ["expected one key, rules"]),
        ("[]", ["expected one key, rules"]),
        ("rules: []\nmore: 1", ["expected one key, rules"]),
        ("rules: [1]", ["rule 1", "(rule)"]),
        ("rules:\n" + rule("r", "eror_type: A"), ["rule 'r'", "when.eror_type", "not a field", "error_type"]),
        (
            "rules:\n" + rule("r", "error_type: A", "category: transiant, remedy: retry"),
            ["rule 'r'", "category", "'transient'"],
        ),
        (
            "rules:\n" + rule("r", "error_type: A", "category: transient"),
            ["rule 'r'", "remedy", "is missing"],
        ),
        (
            "rules:\n" + rule("r", "error_type: A", "category: manual, remedy: retry"),
            ["rule 'r'", "does not go with", "edit, manual"],
        ),
        ("rules:\n" + rule("r", ""), ["rule 'r'", "when", "no condition"]),
        ("rules:\n" + rule("r", "error_type: []"), ["rule 'r'", "no condition"]),
        ("rules:\n" + rule("r", "error_type: ''"), ["rule 'r'", "when.error_type"]),
        (
            "rules:\n" + rule("r", "message_matches: '('"),
            ["rule 'r'", "when.message_matches", "not a regular expression"],
        ),
        ("rules:\n" + rule("r", "status: 5x"), ["rule 'r'", "when.status", "503 or 5xx"]),
        ("rules:\n" + rule("r", "headerless: false"), ["rule 'r'", "when.headerless"]),
        ("rules:\n" + rule("r", "error_type: A") + rule("r", "error_type: B"), ["rule 'r'", "name", "twice"]),
    ],
)
def test_a_wrong_file_is_refused_with_file_rule_field_and_fix(tmp_path: Path, text: str, words: list[str]):
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as error:
        load_taxonomy(path)
    for word in [str(path), *words]:
        assert word in str(error.value)


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"rule 'a'.*rule 'b'"):
        load_taxonomy(written(tmp_path, "rules:\n" + rule("a", "x: 1") + rule("b", "y: 1")))


def test_a_missing_file_says_where_to_put_one(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"taxonomy\.yaml does not exist; put"):
        load_taxonomy(UPath(tmp_path / "taxonomy.yaml"))


@pytest.mark.parametrize(
    ("earlier", "later", "reported"),
    [
        ("error_type: A", "error_type: a", True),
        ("error_type: '*Timeout*'", "error_type: a.PluginTimeout", True),
        ("error_type: PluginTimeout", "error_type: a.PluginTimeout", True),
        ("error_type: A", "error_type: A, message: x", True),
        ("message: reset", "message: Connection RESET by peer", True),
        ("status: 5xx", "status: 503", True),
        ("error_type: [A, B]", "error_type: [B, A]", True),
        ("error_type: A, message: x", "error_type: A", False),
        ("error_type: A", "error_type: B", False),
        ("error_type: 'A*'", "error_type: '*A'", False),
        ("status: 503", "status: 5xx", False),
        ("component: charge", "component: payments.charge", False),
        ("message: x", "message_matches: x", False),
    ],
)
def test_a_rule_that_can_never_decide_is_reported(tmp_path: Path, earlier: str, later: str, reported: bool):
    taxonomy = load_taxonomy(written(tmp_path, "rules:\n" + rule("one", earlier) + rule("two", later)))
    assert bool(taxonomy.findings) is reported
    if reported:
        assert "'two' can never decide" in taxonomy.findings[0]
        assert "repeats" in taxonomy.findings[0]


def test_a_contradiction_is_called_one(tmp_path: Path):
    text = (
        "rules:\n"
        + rule("one", "error_type: A")
        + rule("two", "error_type: A", "category: manual, remedy: edit")
    )
    (finding,) = load_taxonomy(written(tmp_path, text)).findings
    assert "contradicts" in finding
    assert "manual/edit" in finding


def test_a_value_that_can_never_decide_is_reported(tmp_path: Path):
    text = "rules:\n" + rule("one", "error_type: A") + rule("two", "error_type: [A, B]")
    (finding,) = load_taxonomy(written(tmp_path, text)).findings
    assert "'two': error_type 'A' can never decide" in finding
