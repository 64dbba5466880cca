from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from dlq.config import QueueConfig
from dlq.drain import Drain
from dlq.errors import ConfigError
from dlq.ledger import Ledger
from dlq.notify import notify, service_urls
from dlq.ports import Connection


class Listener:
    """A real HTTP server on loopback that keeps what it is told, and answers ``status``."""

    def __init__(self, status: int = 200) -> None:
        self.got: list[dict[str, Any]] = []
        listener = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                listener.got.append(json.loads(body))
                self.send_response(status)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                """The test's output is not a web server's log."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"json://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def listener() -> Iterator[Listener]:
    listener = Listener()
    yield listener
    listener.close()


@pytest.fixture
def broken() -> Iterator[Listener]:
    listener = Listener(status=500)
    yield listener
    listener.close()


def nobody() -> str:
    """A URL where nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"json://127.0.0.1:{probe.getsockname()[1]}"


def drain(tmp_path: Path, connection: Connection | None, *, dry_run: bool = False) -> Drain:
    ledger = Ledger.create(f"sqlite:///{tmp_path}/ledger.db")
    config = QueueConfig.model_validate(
        {
            "name": "orders",
            "source": {"kind": "memory"},
            "target": {"kind": "memory"},
            "notify": {"connection": "lead"} if connection else None,
            "ledger": f"sqlite:///{tmp_path}/ledger.db",
            "archive": str(tmp_path),
            "report": str(tmp_path),
        }
    )

    def connections(name: str) -> Connection:
        if connection is None or name != connection.id:
            raise ConfigError(f"no Connection {name}; add AIRFLOW_CONN_{name.upper()}")
        return connection

    return Drain("orders-1", config, ledger, connections, epoch=1, dry_run=dry_run)


def told(*urls: str) -> Connection:
    return Connection("lead", "apprise", extra={"config": [{"path": url, "tag": "alerts"} for url in urls]})


def test_a_notification_arrives(tmp_path: Path, listener: Listener):
    delivered, said = notify(
        drain(tmp_path, told(listener.url)), "DLQ orders: over 1 %", "Drain orders-1: 312 open."
    )
    assert delivered
    assert said == "delivered to JSON 1"
    (got,) = listener.got
    assert got["title"] == "DLQ orders: over 1 %"
    assert got["message"] == "Drain orders-1: 312 open."


def test_secrets_in_it_are_hidden_and_lengths_capped(tmp_path: Path, listener: Listener):
    notify(
        drain(tmp_path, told(listener.url)),
        "password=hunter2",
        "Authorization: Bearer abcdef123 " + "x y " * 2000,
    )
    (got,) = listener.got
    assert got["title"] == "password=<hidden>"
    assert "abcdef123" not in got["message"]
    assert len(got["message"]) <= 2000


def test_one_service_that_fails_hides_no_other(tmp_path: Path, listener: Listener, broken: Listener):
    delivered, said = notify(drain(tmp_path, told(broken.url, listener.url)), "t", "b")
    assert delivered
    assert said == "delivered to JSON 2; not delivered to JSON 1"
    assert len(listener.got) == 1


def test_nobody_reached_is_said_and_not_raised(tmp_path: Path):
    assert notify(drain(tmp_path, told(nobody())), "t", "b") == (False, "not delivered to JSON 1")


def test_an_url_apprise_does_not_know_is_said_without_showing_it(tmp_path: Path):
    delivered, said = notify(drain(tmp_path, told("nosuch://s3cret@x")), "t", "b")
    assert not delivered
    assert "not one Apprise knows" in said
    assert "s3cret" not in said


def test_not_configured_is_one_line(tmp_path: Path):
    delivered, said = notify(drain(tmp_path, None), "t", "b")
    assert not delivered
    assert "notify is not configured" in said


def test_a_missing_connection_is_said_and_not_raised(tmp_path: Path):
    one = drain(tmp_path, told("json://x"))
    one.connections = drain(tmp_path, None).connections
    assert notify(one, "t", "b") == (False, "not delivered: no Connection lead; add AIRFLOW_CONN_LEAD")


def test_a_dry_run_tells_nobody(tmp_path: Path, listener: Listener):
    delivered, said = notify(drain(tmp_path, told(listener.url), dry_run=True), "over 1 %", "b")
    assert not delivered
    assert said == "dry run: lead would have been told: over 1 %"
    assert listener.got == []


@pytest.mark.parametrize(
    ("connection", "urls"),
    [
        (Connection("c", extra={"config": {"path": "json://a", "tag": "x"}}), ["json://a"]),
        (
            Connection("c", extra={"config": [{"path": "json://a"}, {"path": "json://b"}]}),
            ["json://a", "json://b"],
        ),
        (Connection("c", extra={"config": '{"path": "json://a"}'}), ["json://a"]),
        (Connection("c", password="json://a"), ["json://a"]),
        (Connection("c", host="json://a"), ["json://a"]),
    ],
)
def test_urls_are_where_airflows_provider_keeps_them(connection: Connection, urls: list[str]):
    assert service_urls(connection) == urls


@pytest.mark.parametrize(
    "extra", [{}, {"config": "{"}, {"config": []}, {"config": [{"tag": "x"}]}, {"config": 5}]
)
def test_a_connection_without_urls_says_what_to_write(extra: dict[str, Any]):
    with pytest.raises(ConfigError, match=r"Connection lead: extra\.config .*; write \{"):
        service_urls(Connection("lead", host="example.com", extra=extra))
