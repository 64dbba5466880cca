from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from upath import UPath

from dlq.entry import Understood
from dlq.errors import ConfigError
from dlq.grouping.conditions import http_status, named, plain
from dlq.grouping.taxonomy import UNMATCHED, Taxonomy, load_taxonomy

SHIPPED = load_taxonomy(UPath(Path(__file__).parents[2] / "include" / "config" / "taxonomy.yaml"))


def written(tmp_path: Path, text: str) -> UPath:
    path = tmp_path / "taxonomy.yaml"
    path.write_text(text, encoding="utf-8")
    return UPath(path)


def rule(name: str, when: str, does: str = "category: transient, remedy: retry") -> str:
    return f"  - {{name: {name}, when: {{{when}}}, {does}}}\n"


def taxonomy_of(tmp_path: Path, *rules: str, wrappers: str = "[]") -> Taxonomy:
    return load_taxonomy(written(tmp_path, f"wrappers: {wrappers}\nrules:\n" + "".join(rules)))


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
        ("[429 Too Many Requests] during [POST]", 429),
        ("does not indicate success: 503 (Service Unavailable)", 503),
        ('{"timestamp":17,"status":404}', 404),
        ("crm answered 429", 429),
        ("got 500 from crm", 500),
        ("Error Code: 502; Request ID: x", 502),
        ("502: Bad Gateway", 502),
        ("500 Server Error for url", 500),
        ("tenant 429 has no workflow", None),
        ("took 503 ms", None),
        ("got 503 records", None),
        ("order 500 received", None),
        ("error 1205 (HY000)", None),
        ("HTTP 999", None),
        ("HTTP 5031", None),
        ("", None),
        (None, None),
    ],
)
def test_only_a_status_named_as_one_is_a_status(message: str | None, status: int | None):
    assert http_status(message) == status


@pytest.mark.parametrize(
    ("message", "names"),
    [
        ("An error occurred (ThrottlingException) when calling PutItem", ("ThrottlingException",)),
        (
            "nested exception is java.net.SocketTimeoutException: Read timed out",
            ("java.net.SocketTimeoutException",),
        ),
        ("(psycopg2.errors.DeadlockDetected) deadlock", ("psycopg2.errors.DeadlockDetected",)),
        ("rpc error: code = Unavailable desc = x", ("Unavailable",)),
        ("UNAVAILABLE: io exception", ("UNAVAILABLE",)),
        ("connect ECONNREFUSED 10.0.0.1:80", ("ECONNREFUSED",)),
        ("{'error': {'code': 'rate_limit_exceeded'}}", ("rate_limit_exceeded",)),
        ("Service: S3; Status Code: 503; Error Code: SlowDown; Request ID: X", ("SlowDown",)),
        ("no field 'TimeoutException' in \"a.RateLimitException\"", ()),
        ("'void a.RateLimitException.<init>()' not found", ()),
        ("tenant 429 has no workflow", ()),
        ("", ()),
        (None, ()),
    ],
)
def test_names_are_read_out_of_messages(message: str | None, names: tuple[str, ...]):
    assert named(message) == names


@pytest.mark.parametrize(
    "name",
    [
        "RateLimit",
        "a.b.RateLimitException",
        "rate_limit_error",
        "RATE-LIMIT",
        "a.Outer$RateLimitException",
        "x::RateLimit",
    ],
)
def test_a_name_is_one_however_it_is_written(name: str):
    assert plain(name) == "ratelimit"


@pytest.mark.parametrize(
    ("when", "understood", "holds"),
    [
        ("error_type: plugin*", Understood(error_type="PluginError"), True),
        ("error_type: plugin*", Understood(error_type="NoPlugin"), False),
        ("error_type: plugin*", Understood(), False),
        ("component: 'payments.*'", Understood(component="payments.charge"), True),
        ("component: charge", Understood(component="payments.charge"), False),
        ("error_type: a.b.PluginError", Understood(error_type="a.b.PluginError"), True),
        ("error_type: a.b.PluginError", Understood(error_type="c.PluginError"), False),
        ("cause_type: Inner", Understood(error_type="Outer", cause_type="a.InnerException"), True),
        ("cause_type: Outer", Understood(error_type="Outer", cause_type="a.InnerException"), False),
        ("exception: Inner", Understood(error_type="Outer", causes=("Middle", "a.InnerException")), True),
        ("exception: Inner", Understood(error_type="Outer", message="it failed: InnerException: x"), True),
        ("exception: [Inner, Outer]", Understood(error_type="Outer"), True),
        ("stage: [charge, refund]", Understood(stage="refund"), True),
        ("message: BAD row", Understood(message="a bad ROW there"), True),
        ("message_matches: 'row \\d+$'", Understood(message="bad row 17"), True),
        ("message_matches: 'row \\d+$'", Understood(message="bad row 17."), False),
        ("status: 503", Understood(message="HTTP 503"), True),
        ("status: 5xx", Understood(message="HTTP 503"), True),
        ("status: [404, 5xx]", Understood(message="HTTP 403"), False),
        ("status: 503", Understood(http_status=503, message="HTTP 404"), True),
        ("status: 503", Understood(error_type="503"), True),
        ("retry_count_at_least: 3", Understood(retry_count=3), True),
        ("retry_count_at_least: 3", Understood(retry_count=2), False),
        ("retry_count_at_least: 3", Understood(retry_count=0, retries=7), True),
        ("headerless: true", Understood(correlation_id="wf-1"), True),
        ("headerless: true", Understood(message=""), False),
        ("error_type: A, message: x", Understood(error_type="A", message="y"), False),
        ("error_type: A, message: x", Understood(error_type="a", message="xy"), True),
    ],
)
def test_conditions(tmp_path: Path, when: str, understood: Understood, holds: bool):
    taxonomy = load_taxonomy(written(tmp_path, "rules:\n" + rule("r", when)))
    assert (taxonomy.decide(understood).rule == "r") is holds


def test_the_first_rule_that_holds_decides(tmp_path: Path):
    taxonomy = taxonomy_of(
        tmp_path,
        rule("one", "error_type: A, component: c"),
        rule("two", "error_type: A", "category: manual, remedy: edit, owner: data"),
    )
    first = taxonomy.decide(Understood(error_type="A", component="c"))
    second = taxonomy.decide(Understood(error_type="A"))
    assert (first.rule, first.owner) == ("one", None)
    assert (second.rule, second.owner) == ("two", "data")


def test_a_decision_says_which_rule_matched_which_field(tmp_path: Path):
    taxonomy = taxonomy_of(
        tmp_path,
        rule("late", "exception: ['*Timeout*', X], message: [slow, timed out], retry_count_at_least: 2"),
    )
    failure = Understood(error_type="a.ReadTimeout", message="card 4111 timed out", retry_count=2)
    assert taxonomy.why(failure) == (
        "rule 'late' matched exception (*Timeout*) and retry_count_at_least (2) and message (timed out)"
    )
    assert taxonomy.why(Understood(error_type="a.Other")) == "no rule matched"


def test_wrappers_are_looked_through(tmp_path: Path):
    rules = (
        rule("net", "exception: ConnectException"),
        rule("bug", "exception: Bug", "category: manual, remedy: manual"),
    )
    connect = Understood(error_type="org.connect.ConnectException", causes=("a.Bug",))
    assert taxonomy_of(tmp_path, *rules).decide(connect).rule == "net"
    assert (
        taxonomy_of(tmp_path, *rules, wrappers="[org.connect.ConnectException]").decide(connect).rule == "bug"
    )


def test_what_is_known_of_the_chain_comes_before_what_the_message_mentions(tmp_path: Path):
    taxonomy = taxonomy_of(
        tmp_path,
        rule("time", "exception: Timeout"),
        rule("bug", "exception: Bug", "category: manual, remedy: manual"),
    )
    assert taxonomy.decide(Understood(error_type="Bug", message="see TimeoutException: x")).rule == "bug"
    assert taxonomy.decide(Understood(error_type="Other", message="see TimeoutException: x")).rule == "time"


@pytest.mark.parametrize(
    ("headers", "holds"),
    [
        ({"x-tenant": "acme-eu"}, True),
        ({"x-tenant": "ACME-eu", "other": ""}, True),
        ({"x-tenant": "globex"}, False),
        ({}, False),
    ],
)
def test_headers_decide_too(tmp_path: Path, headers: dict[str, str], holds: bool):
    taxonomy = taxonomy_of(tmp_path, rule("r", "header: {X-Tenant: [acme*, initech]}"))
    assert (taxonomy.decide(Understood(), headers).rule == "r") is holds
    assert taxonomy.headers == {"x-tenant"}


def test_the_shipped_rules_need_neither_headers_nor_counts():
    assert (SHIPPED.headers, SHIPPED.retries) == (frozenset(), 0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rules: [", ["not YAML"]),
        ("rules:", ["expected the key rules"]),
        ("[]", ["expected the key rules"]),
        ("rules: []\nmore: 1", ["expected the key rules"]),
        ("rules: []\nwrappers: {a: b}", ["wrappers", "list of error names"]),
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
            ["rule 'r'", "does not go with", "repair, edit, discard, manual"],
        ),
        ("rules:\n" + rule("r", ""), ["rule 'r'", "when", "no condition"]),
        ("rules:\n" + rule("r", "error_type: []"), ["rule 'r'", "no condition"]),
        ("rules:\n" + rule("r", "error_type: ''"), ["rule 'r'", "when.error_type"]),
        (
            "rules:\n" + rule("r", "message_matches: '('"),
            ["rule 'r'", "when.message_matches", "not a regular expression"],
        ),
        ("rules:\n" + rule("r", "status: 5x"), ["rule 'r'", "when.status", "503 or 5xx"]),
        ("rules:\n" + rule("r", "retry_count_at_least: 0"), ["rule 'r'", "when.retry_count_at_least"]),
        ("rules:\n" + rule("r", "header: {x: []}"), ["rule 'r'", "when.header.x"]),
        ("rules:\n" + rule("r", "header: x"), ["rule 'r'", "when.header"]),
        (
            "rules:\n" + rule("r", "error_type: A", "category: transient, remedy: retry, fingerprint: 'A b'"),
            ["rule 'r'", "fingerprint", "small letters"],
        ),
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
        ("exception: '*Timeout*'", "exception: ReadTimeoutException", True),
        ("exception: Timeout", "exception: a.b.TimeoutException", True),
        ("exception: a.b.TimeoutException", "exception: Timeout", False),
        ("header: {x: 'a*'}", "header: {x: abc, y: d}", True),
        ("header: {x: abc}", "header: {y: abc}", False),
        ("retry_count_at_least: 2", "retry_count_at_least: 3", True),
        ("retry_count_at_least: 3", "retry_count_at_least: 2", False),
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


def test_a_wrapper_that_a_rule_asks_for_is_reported(tmp_path: Path):
    (finding,) = taxonomy_of(tmp_path, rule("r", "exception: [A, B]"), wrappers="[B]").findings
    assert "'r': exception 'B' can never decide" in finding


@given(
    st.text(max_size=60),
    st.lists(st.text(max_size=30), max_size=4),
    st.text(max_size=300),
    st.integers(0, 10**6),
)
def test_no_failure_is_too_much(error_type: str, causes: list[str], message: str, status: int):
    failure = Understood(error_type=error_type, causes=tuple(causes), message=message, http_status=status)
    decision = SHIPPED.decide(failure)
    said = "no rule matched" if decision.rule == UNMATCHED else f"rule {decision.rule!r} matched "
    assert SHIPPED.why(failure).startswith(said)


@pytest.mark.parametrize(
    "junk",
    ["a.", "E", "A_", "(a.", "(A", "code=", "HTTP ", "status ", "503 ", "got 503", "quota ", "memory ", "scope no ",
     "Get : ", "aError", "aException.", "connection ", "$", "5", "time"],
)  # fmt: skip
def test_hostile_messages_take_linear_time(junk: str):
    message = junk * (2_000 // len(junk))  # as much of one as a decoder keeps
    began = time.process_time()
    for _ in range(5):
        SHIPPED.decide(Understood(error_type=junk[:200], message=message))
    assert time.process_time() - began < 0.25
