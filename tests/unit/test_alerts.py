from __future__ import annotations

import socket
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from sqlalchemy import select

from dlq.alerts import acknowledge_alert, end_acknowledgement
from dlq.config import QueueConfig
from dlq.drain import Drain
from dlq.errors import ConfigError
from dlq.ledger import Ledger, lease, schema
from dlq.ports import Connection


def drain(tmp_path: Path, connection: Connection | None, *, dry_run: bool = False) -> Drain:
    ledger = Ledger.create(f"sqlite:///{tmp_path}/ledger.db")
    config = QueueConfig.model_validate(
        {
            "name": "orders",
            "source": {"kind": "memory"},
            "target": {"kind": "memory"},
            "alerts": {"connection": "am", "matchers": {"alertname": "DLQ", "queue": "orders"}}
            if connection
            else None,
            "ledger": f"sqlite:///{tmp_path}/ledger.db",
            "archive": str(tmp_path),
            "report": str(tmp_path),
        }
    )
    epoch = lease.acquire(
        ledger, "orders", "orders-1", run_id="r", kind="drain", seconds=60, config=config.model_dump_json()
    )

    def connections(name: str) -> Connection:
        if connection is None or connection.id != name:
            raise ConfigError(f"no Connection {name}; add AIRFLOW_CONN_{name.upper()}")
        return connection

    return Drain("orders-1", config, ledger, connections, epoch=epoch, dry_run=dry_run)


def notes(of: Drain) -> list[tuple[str, str]]:
    with of.ledger.read() as tx:
        return [(r.stage, r.level) for r in tx.execute(select(schema.event).order_by(schema.event.c.id))]


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def answering() -> Any:
    """Starts a server that answers everything with one status and body, as what is no Alertmanager might."""
    servers: list[tuple[HTTPServer, Thread]] = []

    def start(status: int, body: bytes) -> Connection:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                """The test's output is not a web server's log."""

        server = HTTPServer(("127.0.0.1", 0), Handler)
        thread = Thread(target=server.serve_forever)
        thread.start()
        servers.append((server, thread))
        return Connection("am", "http", host="127.0.0.1", port=server.server_port)

    yield start
    for server, thread in servers:
        server.shutdown()
        thread.join()
        server.server_close()


def test_not_configured_is_one_line(tmp_path: Path):
    one = drain(tmp_path, None)
    answer = acknowledge_alert(one)
    assert answer["acknowledged"] is False
    assert "alerts is not configured" in answer["said"]
    assert end_acknowledgement(one)["said"] == answer["said"]
    assert notes(one) == [("acknowledge_alert", "info")]


@pytest.mark.parametrize("stage", [acknowledge_alert, end_acknowledgement])
def test_an_alertmanager_that_is_away_is_said_and_not_raised(
    tmp_path: Path, stage: Callable[[Drain], dict[str, Any]]
):
    one = drain(tmp_path, Connection("am", "http", host="http://127.0.0.1", port=closed_port()))
    answer = stage(one)
    assert answer["acknowledged"] is False
    assert "Alertmanager (am) did not do it" in answer["said"]
    assert notes(one) == [(stage.__name__, "warning")]


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (500, b"boom"),
        (200, b"<html>a login page</html>"),
        (200, b'{"not": "a list"}'),
        (200, b"[1]"),
        (204, b""),
    ],
)
def test_an_answer_that_makes_no_sense_is_said_and_not_raised(
    tmp_path: Path, answering: Callable[[int, bytes], Connection], status: int, body: bytes
):
    answer = acknowledge_alert(drain(tmp_path, answering(status, body)))
    assert answer["acknowledged"] is False
    assert "did not do it" in answer["said"]


@pytest.mark.parametrize(
    ("connection", "words"),
    [
        (Connection("other", "http"), "no Connection am"),
        (Connection("am", "http"), "host must be set"),
        (Connection("am", "http", host="http://["), "did not do it"),
    ],
)
def test_a_wrong_connection_is_said_and_not_raised(tmp_path: Path, connection: Connection, words: str):
    assert words in acknowledge_alert(drain(tmp_path, connection))["said"]


def test_a_password_is_never_said(tmp_path: Path):
    host = f"http://app:hunter2@127.0.0.1:{closed_port()}"
    one = drain(tmp_path, Connection("am", "http", host=host, login="app", password="hunter2"))
    assert "hunter2" not in acknowledge_alert(one)["said"]


def test_a_dry_run_silences_nothing(tmp_path: Path):
    one = drain(tmp_path, Connection("am", "http", host="127.0.0.1", port=closed_port()), dry_run=True)
    answer = acknowledge_alert(one)
    assert answer["silence"] is None
    assert answer["said"].startswith(
        "dry run: alerts with alertname=DLQ, queue=orders would be silenced until "
    )
    assert end_acknowledgement(one)["said"].startswith("dry run")
