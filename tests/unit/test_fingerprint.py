from __future__ import annotations

import time

import pytest

from dlq.fingerprint import fingerprint, normalise, signature


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("no answer after 30 s", "no answer after 2.5 s"),
        ("took 30,000 ms of -5", "took 1 ms of 17"),
        (
            "order 6f1c2e9a-1b2c-4d3e-8f90-1234567890ab gone",
            "order 00000000-0000-4000-8000-00000000000F gone",
        ),
        ("at 2026-11-24T20:21:00.123Z", "at 2025-01-02 03:04:05"),
        ("on Tue, 24 Nov 2026 20:21:00 GMT", "on Wed, 2 Dec 2026 01:02:03 GMT"),
        ("connect to 10.0.0.1:8080 failed", "connect to 192.168.17.254:9 failed"),
        ("connect to [2001:db8::1]:443 failed", "connect to [::1]:80 failed"),
        ("connect to kafka-1.prod:9092 failed", "connect to kafka-12.prod:9094 failed"),
        ("GET https://api.example.com/v1/a?b=1 failed", "GET http://other.example.org/ failed"),
        ("cannot read /var/lib/x/1.json", "cannot read /srv/y.json"),
        (r"cannot read C:\data\x.csv", r"cannot read D:\a\b\c.csv"),
        ("unknown user 'u1' in 'eu'", "unknown user 'u2' in 'us'"),
        ('unknown key "a \\" b"', 'unknown key ""'),
        ("Order@1672045 is no Map", "Order@5e91993f is no Map"),
        ("pointer 0xdeadbeef", "pointer 0x0"),
        ("commit 8f14e45fceea167a", "commit 1679091c5a880faf"),
        ("job 01HXYZABC9DEF2GH7JKM missing", "job 01J0QRS4TU5VW6XYZ8AB missing"),
        ("missing ids 1, 2, 3", "missing ids 9, 8"),
        ("mail to ops@example.com bounced", "mail to on.b+c@mail.example.org bounced"),
        ("a\n\tb", "a b"),
    ],
)
def test_values_do_not_tell_failures_apart(one: str, other: str):
    assert normalise(one) == normalise(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("connection reset", "connection refused"),
        ("HTTP 503 from upstream", "HTTP 429 from upstream"),
        ("status code: 404", "status code: 500"),
        ("can't open, won't close", "can't close, won't open"),
        ("field effaced", "field defaced"),
    ],
)
def test_words_and_named_statuses_do(one: str, other: str):
    assert normalise(one) != normalise(other)


def test_digits_that_are_no_status_go():
    assert normalise("tenant 429 has no workflow") == normalise("tenant 503 has no workflow")


def test_apostrophes_are_no_quotes():
    assert normalise("can't connect, isn't up") == "can't connect, isn't up"


def test_a_signature_reads_as_a_sentence():
    said = signature("PluginError", "ValueError", "bad row 17", "payments.charge")
    assert said == "PluginError < ValueError: bad row <n> @ payments.charge"
    assert signature(None, None, None, None) == "unknown error"
    assert signature("E", "E", "", "c") == "E @ c"


def test_type_cause_and_component_tell_failures_apart():
    signatures = {
        signature(*parts)
        for parts in [
            ("A", None, "m", "c"),
            ("B", None, "m", "c"),
            ("A", "X", "m", "c"),
            ("A", None, "m", "d"),
        ]
    }
    assert len({fingerprint(s) for s in signatures}) == 4


def test_a_fingerprint_is_versioned_and_stays_what_it_was():
    assert fingerprint(signature("RateLimit", None, "429 after 3 tries", "crm.sync")) == "v1:fcc7cd634eaf6baa"


def test_a_fingerprint_survives_a_lone_surrogate():
    assert fingerprint("\ud800").startswith("v1:")


@pytest.mark.parametrize(
    "junk",
    [
        '"',
        "'",
        " '",
        "a'",
        '"\\',
        "\\",
        "a.",
        "/a",
        "a/",
        ":",
        "a:",
        "[:",
        "0",
        "1,",
        "1.",
        "1.1.1.",
        "a1",
        "ab1",
        "a@",
        "a@a.",
        "<n> ",
        "://",
        "a://",
        "0123456789abcdef-",
        "-",
        " ",
        "x ",
        "2026-11-24 ",
        "Nov 1 ",
        "_",
        "`",
        "ſ",
        "0x",
        "%\x00",
    ],
)
def test_hostile_messages_take_linear_time(junk: str, monkeypatch: pytest.MonkeyPatch):
    message = junk * (100_000 // len(junk))
    began = time.process_time()
    assert len(signature(message[:200], message[:200], message, message[:200])) < 1000
    capped = time.process_time() - began
    monkeypatch.setattr("dlq.fingerprint._READ", len(message))  # even without the cap it must not blow up
    began = time.process_time()
    normalise(message)
    whole = time.process_time() - began
    assert capped < 0.1
    assert whole < 2
