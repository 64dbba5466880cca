from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlq.grouping.fingerprint import VERSION, fingerprint, normalise, signature

GOLDEN = [
    json.loads(line)
    for line in (Path(__file__).parent / "fingerprints.golden.jsonl").read_text().splitlines()
]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        # numbers and measures
        ("no answer after 30 s", "no answer after 2.5 s"),
        ("no answer after 30000 ms", "no answer after 5s"),
        ("no answer after PT1M30S", "no answer after 1m30s"),
        ("took 30,000 ms of -5", "took 1 ms of 17"),
        ("needs 512 MiB, has 1.5GB", "needs 7 bytes, has 2048 KiB"),
        ("disk is 97.3% full", "disk is 4 % full"),
        ("total $1,204.50 too high", "total 12.00 EUR too high"),
        # ids and hashes
        (
            "order 6f1c2e9a-1b2c-4d3e-8f90-1234567890ab gone",
            "order 00000000-0000-4000-8000-00000000000F gone",
        ),
        ("order ORD-10023 gone", "order 42 gone"),
        ("charge ch_3NffrFeUfNV2Hib gone", "charge ch_1OaXyZabcdEF9Gh gone"),
        ("job 01HXYZABC9DEF2GH7JKM missing", "job 01J0QRS4TU5VW6XYZ8AB missing"),
        ("commit 8f14e45fceea167a", "commit 1679091c5a880faf"),
        ("pointer 0xdeadbeef", "pointer 0x0"),
        ("Order@1672045 is no Map", "Order@5e91993f is no Map"),
        ("pod orders-7d9f8b6c5d-x2x9z died", "pod carts-5b8c9d7f4-qq4kz died"),
        ("token eyJhbGciOi.eyJzdWIi.c2lnbg bad", "token eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOjF9.x-Yz_1 bad"),
        ("user alice not found", "user bob.smith not found"),
        ("tenant acme has no quota", "tenant t-17 has no quota"),
        # times
        ("at 2026-11-24T20:21:00.123Z", "at 2025-01-02 03:04:05"),
        ("on Tue, 24 Nov 2026 20:21:00 GMT", "on Wed, 2 Dec 2026 01:02:03 GMT"),
        ("on 24/Nov/2026:20:21:00 +0000", "on 11/24/2026 8:21:00 PM"),
        ("expired March 3, 2026", "expired 2026-11-24"),
        # addresses
        ("connect to 10.0.0.1:8080 failed", "connect to 192.168.17.254:9 failed"),
        ("connect to [2001:db8::1]:443 failed", "connect to [::1]:80 failed"),
        ("connect to kafka-1.prod:9092 failed", "connect to localhost:9094 failed"),
        ("no route to db.eu-west-1.internal", "no route to api.example.com"),
        ("mac 02:42:ac:11:00:02 unknown", "mac 0A-1B-2C-3D-4E-5F unknown"),
        ("mail to ops@example.com bounced", "mail to on.b+c@mail.example.org bounced"),
        ("GET https://api.example.com/v1/a?b=1 failed", "GET http://other.example.org/ failed"),
        ("role arn:aws:iam::123456789012:role/a denied", "role arn:aws-cn:sqs:cn-north-1:1:q denied"),
        # paths
        ("cannot read /var/lib/x/1.json", "cannot read s3://bucket/a/b.csv"),
        (r"cannot read C:\data\x.csv", r"cannot read D:\a\b\c.csv"),
        ("GET /v1/orders/7?full=true&page=2 refused", "GET /health refused"),
        ("at handler.js:10:5", "at handler.js:99:17"),
        # quoted, assigned, data, lists
        ("unknown user 'u1' in 'eu'", "unknown user 'u2' in 'us'"),
        ('unknown key "a \\" b"', 'unknown key ""'),
        ("lookup of `a` “b” failed", "lookup of `c` “d e” failed"),
        ("failed tenant=acme try=1", "failed tenant=globex try=3"),
        ('bad row {"id": 1, "lines": [{"n": {"x": 2}}]}', 'bad row {"id": 2}'),
        ("bad row Order{id=1, name=x}", "bad row Order{id=22, name=y}"),
        ("missing ids 1, 2, 3", "missing ids 9, 8"),
        ("missing topics: [a.b, c.d]", "missing topics: [e.f]"),
        ("Key (email)=(a@b.example) exists", "Key (email)=(x) exists"),
        # versions, digests, what was masked before, zones, degrees, sources, names after what they name
        ("agent v4.0.0-SNAPSHOT is too old", "agent 5.1.2+build.7 is too old"),
        ("digest sha512:cf83e1357eefb8bd of it", "digest md5:acbd18db4cc2f85c of it"),
        ("card **** **** **** 4242 refused", "card 4111-11XX-XXXX-1111 refused"),
        ("sent to [redacted]", "sent to +49 171 555"),
        ("quote of 15:59 EST", "quote of 3:05 PM JST"),
        ("depot at 52°31'12.0\"N 13°24'18.0\"E", "depot at 40.7128° N, 74.0060° W"),
        ("panicked at src/a.rs:1:1", "panicked at /build/src/main.rs:77:14"),
        ("worker w7@7c9d6b5f4-x2x8z gone", "worker w9@10.0.0.1 gone"),
        ("shard [orders-2026.11.04][3] failed", "shard [logs-000123][0] failed"),
        ("in namespace shop-prod, twice", "in namespace kube-system, twice"),
        # shape
        ("a\n\tb", "a b"),
        ("it failed.", "it failed"),
    ],
)
def test_values_do_not_tell_failures_apart(one: str, other: str):
    assert normalise(one) == normalise(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("connection reset", "connection refused"),
        ("connect to 10.0.0.1:80: connection refused", "connect to 10.0.0.1:80: i/o timeout"),
        ("HTTP 503 from upstream", "HTTP 429 from upstream"),
        ("status code: 404", "status code: 500"),
        ("can't open, won't close", "can't close, won't open"),
        ("field effaced", "field defaced"),
        ("user authentication failed", "user authorization failed"),
        ("account locked", "account closed"),
        ("reply: state=FAILED", "reply: state=CANCELLED"),
        ("rpc error: code = Unavailable desc = x", "rpc error: code = NotFound desc = x"),
        ("a.b.OrderService failed", "a.b.CartService failed"),
        ("(Caused by E('too many 502 error responses'))", "(Caused by E('remote end closed connection'))"),
        ('400: {"error": "invalid_grant"}', '400: {"error": "invalid_scope"}'),
        ("May not be null", "Mar not be null"),
        ("queue full", "queue empty"),
        ("node not-ready", "node out-of-disk"),
        (
            'Os { code: 2, kind: NotFound, message: "x" }',
            'Os { code: 13, kind: PermissionDenied, message: "x" }',
        ),
    ],
)
def test_words_and_named_statuses_do(one: str, other: str):
    assert normalise(one) != normalise(other)


def test_digits_that_are_no_status_go():
    assert normalise("tenant 429 has no workflow") == normalise("tenant 503 has no workflow")


@pytest.mark.parametrize(
    "words",
    [
        "can't connect, isn't up",
        "user not found",
        "client disconnected",
        "host unreachable",
        "customer service unavailable",
        "text/html and I/O over TCP/IP",
        "com.example.billing.OrderService refused it",
        "May not be null",
        "foo() failed",
    ],
)
def test_prose_stays_as_it_is(words: str):
    assert normalise(words) == words


def test_a_signature_reads_as_a_sentence():
    said = signature("PluginError", ["ValueError"], "bad row 17", "payments.charge")
    assert said == "PluginError < ValueError: bad row <*> @ payments.charge"
    assert signature(None, (), None, None) == "unknown error"
    assert signature("E", ["E"], "", "c") == "E @ c"


def test_type_causes_and_component_tell_failures_apart():
    signatures = {
        signature(*parts)
        for parts in [
            ("A", (), "m", "c"),
            ("B", (), "m", "c"),
            ("A", ("X",), "m", "c"),
            ("A", ("X", "Y"), "m", "c"),
            ("A", (), "m", "d"),
        ]
    }
    assert len({fingerprint(s) for s in signatures}) == 5


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda golden: golden["signature"][:40])
def test_fingerprints_stay_what_they_were(golden: dict[str, str]):
    """Groups in people's ledgers are named so: what changes one counts the version up and writes this file anew."""
    said = signature(golden["error_type"], golden["causes"], golden["message"], golden["component"])
    assert said == golden["signature"]
    assert fingerprint(said) == golden["fingerprint"]
    assert golden["fingerprint"].startswith(f"{VERSION}:")


def test_a_fingerprint_survives_a_lone_surrogate():
    assert fingerprint("\ud800").startswith(f"{VERSION}:")


@given(st.text(max_size=300))
def test_no_message_is_too_much(message: str):
    once = normalise(message)
    assert len(once) <= 400
    assert normalise(message) == once


@pytest.mark.parametrize(
    "junk",
    [
        '"', "'", " '", "a'", '"\\', "\\", "a.", "/a", "a/", ":", "a:", "[:", "0", "1,", "1.", "1.1.1.", "a1", "ab1",
        "a@", "a@a.", "<*> ", "<*>", "://", "a://", "0123456789abcdef-", "-", " ", "x ", "2026-11-24 ", "Nov 1 ", "_",
        "`", "ſ", "0x", "%\x00", "{", "{}", "{a", "{{{", "{ {} {} ", '{"a": ', "[", "[a,", "[a, ", "(", "(a, ", "a=",
        "a=(", "a=b ", "user ", "user a", "user a ", "status ", "status 1", "aA", "aAbB1", "eyJ", "P1", "a-", "a_b",
        "~", "$.", "$[", "«", "“", "u'", "May ", "Mon, ", "1 s", "a1b2",
    ],
)  # fmt: skip
def test_hostile_messages_take_linear_time(junk: str, monkeypatch: pytest.MonkeyPatch):
    message = junk * (100_000 // len(junk))
    began = time.process_time()
    assert len(signature(message[:200], [message[:200]], message, message[:200])) < 1100
    capped = time.process_time() - began
    monkeypatch.setattr(
        "dlq.grouping.fingerprint._READ", len(message)
    )  # even without the cap it must not blow up
    began = time.process_time()
    normalise(message)
    whole = time.process_time() - began
    assert capped < 0.1
    assert whole < 2
