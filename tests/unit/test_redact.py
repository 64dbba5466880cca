from __future__ import annotations

import time

import pytest

from dlq.redact import redact


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("cannot reach postgresql://app:hunter2@db/orders", "cannot reach postgresql://<hidden>@db/orders"),
        ("Authorization: Bearer abc.def.ghi", "Authorization: Bearer <hidden>"),
        ("password=hunter2, user=app", "password=<hidden>, user=app"),
        ("DB_PASSWORD: 'a b c' and more", "DB_PASSWORD: <hidden> and more"),
        ('{"api_key": "a b", "x": 1}', '{"api_key": <hidden>, "x": 1}'),
        ("my_client_secret_value = s3", "my_client_secret_value = <hidden>"),
        ("mail to on.call+x@example.com", "mail to <hidden>"),
        ("card 4111 1111 1111 1111 declined", "card <hidden> declined"),
        ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.abc", "<hidden>"),
        ("key " + "AKIA" + "IOSFODNN7EXAMPLE", "key <hidden>"),
        ("x" * 20 + "1" + "y" * 30, "<hidden>"),
    ],
)
def test_secrets_and_peoples_addresses_are_hidden(text: str, shown: str):
    assert redact(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "RateLimit: HTTP 429 from <url> after <n> tries @ crm.sync",
        "token expired 30 s ago",
        "order 12345 at 2026-11-24T03:02:11Z, epoch 1764015660123",
        "orders-3fa9c2d41b77 plan 8f14e45fceea",
        "wrong password",
    ],
)
def test_what_people_need_to_read_stays(text: str):
    assert redact(text) == text


@pytest.mark.parametrize(
    "junk",
    [
        "a",
        "a1",
        "a://",
        "password",
        "secret.",
        "token=",
        "a.b-",
        "1 ",
        "1-",
        "a@",
        "a@b.",
        "eyJ",
        "eyJa.",
        '"',
        "='",
        "_-",
    ],
)
def test_hostile_text_takes_linear_time(junk: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("dlq.redact._KEPT", 50_000)
    began = time.process_time()
    redact(junk * (50_000 // len(junk)))
    assert time.process_time() - began < 5
