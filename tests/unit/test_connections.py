"""Connections from environment variables, read as Airflow reads them."""

from __future__ import annotations

import json

import pytest

from dlq.connections import from_environment
from dlq.errors import ConfigError


def given(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("AIRFLOW_CONN_DLQ_KAFKA", value)


# What airflow.sdk's Connection.from_uri says of the same, 3.3.2.
@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        (
            "kafka://?bootstrap.servers=b%3A9092%2Cc%3A9092",
            ("kafka", None, None, None, None, None, {"bootstrap.servers": "b:9092,c:9092"}),
        ),
        (
            "kafka://?__extra__=%7B%22bootstrap.servers%22%3A+%22b%22%2C+%22x%22%3A+1%7D",
            ("kafka", None, None, None, None, None, {"bootstrap.servers": "b", "x": 1}),
        ),
        (
            "http://:tok%2Fen@http%3A%2F%2F127.0.0.1:1234/",
            ("http", "http://127.0.0.1", 1234, None, "", "tok/en", {}),
        ),
        (
            "http://user:pa%40ss@Host.Example:80/sch%2Fema?a=1&b=",
            ("http", "host.example", 80, "sch/ema", "user", "pa@ss", {"a": "1", "b": ""}),
        ),
        (
            "http://https://u:p@api.example.com:8443/x?timeout=5",
            ("http", "https://api.example.com", 8443, "x", "u", "p", {"timeout": "5"}),
        ),
        ("postgresql://u:p@h:5432/db", ("postgres", "h", 5432, "db", "u", "p", {})),
        ("google-cloud-platform://?a=b", ("google_cloud_platform", None, None, None, None, None, {"a": "b"})),
        ("http://[::1]:8080/", ("http", "::1", 8080, None, None, None, {})),
    ],
)
def test_a_uri_is_read_as_airflow_reads_it(
    uri: str, expected: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    given(monkeypatch, uri)
    found = from_environment("dlq_kafka")
    assert found.id == "dlq_kafka"
    assert (
        found.conn_type,
        found.host,
        found.port,
        found.schema,
        found.login,
        found.password,
        found.extra,
    ) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (
            {"conn_type": "kafka", "extra": {"bootstrap.servers": "b:1"}},
            ("kafka", None, None, None, {"bootstrap.servers": "b:1"}),
        ),
        (
            {"conn_type": "kafka", "extra": '{"bootstrap.servers": "b:1"}'},
            ("kafka", None, None, None, {"bootstrap.servers": "b:1"}),
        ),
        (
            {"conn_type": "http", "host": "http://127.0.0.1", "port": 1234, "password": "t"},
            ("http", "http://127.0.0.1", 1234, "t", {}),
        ),
        ({"conn_type": "http", "host": "h", "port": "80", "extra": ""}, ("http", "h", 80, None, {})),
        ({"conn_type": "google-cloud-platform"}, ("google_cloud_platform", None, None, None, {})),
    ],
)
def test_json_is_read_as_airflow_reads_it(
    value: object, expected: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    given(monkeypatch, f"  {json.dumps(value)}\n")
    found = from_environment("dlq_kafka")
    assert (found.conn_type, found.host, found.port, found.password, found.extra) == expected


def test_a_missing_variable_is_named_with_an_example(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AIRFLOW_CONN_DLQ_KAFKA", raising=False)
    with pytest.raises(ConfigError, match=r"AIRFLOW_CONN_DLQ_KAFKA is not set.*bootstrap\.servers"):
        from_environment("dlq_kafka")


@pytest.mark.parametrize(
    ("value", "what"),
    [
        ('{"conn_type": "kafka", "password": "hunter2"', "not JSON"),
        ('{"conn_type": "kafka", "pasword": "hunter2"}', "unknown key"),
        ('{"conn_type": "kafka", "password": ["hunter2"]}', "password is no text"),
        ('{"conn_type": "kafka", "password": "hunter2", "port": "x"}', "port is no number"),
        ('{"conn_type": "kafka", "extra": "hunter2"}', "its extra is not JSON"),
        ('{"conn_type": "kafka", "extra": ["hunter2"]}', "its extra is no JSON object"),
        ("hunter2", "neither JSON nor a URI"),
        ("http://u:hunter2@h:notaport/", "host and port"),
        ("http://u:hunter2@h/?__extra__=hunter2", "its extra is not JSON"),
    ],
)
def test_a_broken_variable_is_named_and_its_value_is_not_shown(
    value: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given(monkeypatch, value)
    with pytest.raises(ConfigError) as error:
        from_environment("dlq_kafka")
    assert "AIRFLOW_CONN_DLQ_KAFKA" in str(error.value)
    assert what in str(error.value)
    assert "hunter2" not in str(error.value)
    assert error.value.__cause__ is None


def test_a_connection_does_not_show_its_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    given(
        monkeypatch,
        '{"conn_type": "kafka", "login": "me", "password": "hunter2", "extra": {"sasl.password": "hunter2"}}',
    )
    assert "hunter2" not in repr(from_environment("dlq_kafka"))
