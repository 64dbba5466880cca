"""Fixtures of the core's tests: ledgers on both databases, queues in memory."""

from __future__ import annotations

import json
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine
from tests.ledger_rig import LedgerRig
from tests.memory_rig import MemoryRig

from dlq.ledger import Ledger, schema
from dlq_demo.postgres import Postgres

Answer = tuple[Any, ...]


@pytest.fixture(scope="session")
def ledger_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty ledger to copy: faster than making one."""
    path = tmp_path_factory.mktemp("ledger") / "template.db"
    Ledger.create(f"sqlite:///{path}").close()
    return path


@pytest.fixture(scope="session")
def postgres_ledger(postgres: Postgres) -> str:
    """A ledger on Postgres that the process's tests use one after the other."""
    url = postgres.create_database(f"ledger_{uuid.uuid4().hex[:8]}")
    Ledger.create(url).close()
    return url


@pytest.fixture(params=["sqlite", "postgres"])
def ledger_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where an empty ledger is: each test that asks for it runs on both databases."""
    if request.param == "sqlite":
        shutil.copyfile(request.getfixturevalue("ledger_template"), tmp_path / "ledger.db")
        return f"sqlite:///{tmp_path}/ledger.db"
    url = str(request.getfixturevalue("postgres_ledger"))
    kept = {schema.about.name, schema.allowed.name}
    tables = ", ".join(t.name for t in schema.metadata.sorted_tables if t.name not in kept)
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.exec_driver_sql(f"TRUNCATE {tables} RESTART IDENTITY CASCADE")
    engine.dispose()
    return url


@pytest.fixture
def ledger_rig(ledger_url: str) -> Iterator[LedgerRig]:
    with LedgerRig(ledger_url) as rig:
        yield rig


@pytest.fixture
def make_queue(tmp_path: Path, ledger_template: Path) -> Iterator[Callable[..., MemoryRig]]:
    """Makes queues in memory, each with its own ledger and archive: ``make_queue(ordering="per_key")``."""
    with ExitStack() as open_ones:

        def make(**how: Any) -> MemoryRig:
            folder = tmp_path / f"queue-{len(list(tmp_path.iterdir()))}"
            folder.mkdir()
            return open_ones.enter_context(MemoryRig(folder, template=ledger_template, **how))

        yield make


@pytest.fixture
def queue(make_queue: Callable[..., MemoryRig]) -> MemoryRig:
    """A queue in memory whose first intake is behind it: what is put into it needs no decision of a person."""
    made = make_queue()
    made.begin()
    return made


@pytest.fixture
def serve() -> Iterator[Callable[..., tuple[str, list[str]]]]:
    """Starts a server with answers by ``METHOD path``, one or a list; returns its URL and what was asked."""
    servers: list[ThreadingHTTPServer] = []

    def start(answers: dict[str, Answer | list[Answer]]) -> tuple[str, list[str]]:
        asked: list[str] = []

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                self.rfile.read(int(self.headers.get("content-length", 0)))
                what = f"{self.command} {self.path.split('?')[0]}"
                asked.append(what)
                found = answers[what]
                status, body, *headers = found.pop(0) if isinstance(found, list) else found
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                self.send_header("content-length", str(len(data)))
                for name, value in headers:
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_PUT = answer  # noqa: N815

            def log_message(self, *args: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}", asked

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()
