"""The core's Connections are Airflow's, with what its Kafka provider makes of them."""

from __future__ import annotations

import asyncio
import json
import sys
import types
from functools import partial
from typing import Any

import pytest

from dlq.errors import ConfigError
from dlq_runbook.connections import connection, fetched


@pytest.fixture
def define(monkeypatch: pytest.MonkeyPatch) -> Any:
    def put(conn_id: str, **fields: Any) -> None:
        monkeypatch.setenv(f"AIRFLOW_CONN_{conn_id.upper()}", json.dumps(fields))

    return put


def test_a_plain_connection(define: Any) -> None:
    define("flows", conn_type="http", host="http://127.0.0.1", port=1234, password="secret")
    found = connection("flows")
    assert (found.id, found.conn_type, found.host, found.port) == ("flows", "http", "http://127.0.0.1", 1234)
    assert found.password == "secret"
    assert "secret" not in repr(found)


def test_a_missing_connection_says_what_to_do() -> None:
    with pytest.raises(ConfigError, match="AIRFLOW_CONN_NOWHERE"):
        connection("nowhere")


def test_kafka_settings_are_the_extra(define: Any) -> None:
    extra = {"bootstrap.servers": "b:9092", "security.protocol": "SASL_SSL", "sasl.mechanism": "PLAIN"}
    define("events", conn_type="kafka", extra=extra)
    assert dict(connection("events").extra) == extra


def test_kafka_without_brokers_says_so(define: Any) -> None:
    define("events", conn_type="kafka", extra={"security.protocol": "SSL"})
    with pytest.raises(ConfigError, match=r"events.*bootstrap\.servers"):
        connection("events")


def test_amazon_msk_keeps_its_token_callback(define: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    signer = types.ModuleType("aws_msk_iam_sasl_signer")
    signer.MSKAuthTokenProvider = object  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "aws_msk_iam_sasl_signer", signer)
    servers = "b-1.demo.abcde1.c2.kafka.us-east-1.amazonaws.com:9098"
    define(
        "msk",
        conn_type="kafka",
        extra={
            "bootstrap.servers": servers,
            "security.protocol": "SASL_SSL",
            "sasl.mechanism": "OAUTHBEARER",
        },
    )
    callback = connection("msk").extra["oauth_cb"]
    assert isinstance(callback, partial)
    assert callback.args == ("us-east-1",)


def test_a_callback_by_path_must_be_allowed(define: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    define("events", conn_type="kafka", extra={"bootstrap.servers": "b:9092", "oauth_cb": "json.loads"})
    with pytest.raises(ConfigError, match="callback_allowlist"):
        connection("events")
    monkeypatch.setenv("AIRFLOW__APACHE_KAFKA__CALLBACK_ALLOWLIST", "json.loads")
    assert connection("events").extra["oauth_cb"] is json.loads


def test_a_private_key_is_masked(define: Any) -> None:
    """Airflow masks by names, and ``ssl.key.pem`` is none it knows."""
    from airflow.sdk.log import redact

    key = "-----BEGIN {0}-----\nMIIEvQIBADANBgkqhkiG9w0BAQ\n-----END {0}-----".format("PRIVATE" + " KEY")
    define("events", conn_type="kafka", extra={"bootstrap.servers": "b:9093", "ssl.key.pem": key})
    connection("events")
    assert "MIIEvQ" not in str(redact(f"it said {key}!"))


def test_a_trigger_has_them_fetched_ahead(define: Any) -> None:
    define("events", conn_type="kafka", extra={"bootstrap.servers": "b:9092"})
    get = asyncio.run(fetched(["events", "nowhere"]))
    assert get("events").extra["bootstrap.servers"] == "b:9092"
    with pytest.raises(ConfigError, match="nowhere"):
        get("nowhere")
