"""A throw-away Postgres on loopback, from the binaries of an installed Postgres package."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

import psycopg
from psycopg import sql

from dlq_demo import loopback
from dlq_demo.process import Process, ServiceError, Unavailable

_USER = "dlq"


class Postgres:
    """One server with its data in a temporary folder; a context manager that starts and stops it.

    :raises Unavailable: when no Postgres is installed.
    :raises ServiceError: when it doesn't start.
    """

    def __init__(self) -> None:
        self.port = loopback.free_ports(1)[0]
        self._binaries = _binaries()
        self._folder = Path(tempfile.mkdtemp(prefix="dlq-postgres-"))
        self._password = secrets.token_urlsafe(12)
        self._process: Process | None = None

    def url(self, database: str) -> str:
        """For SQLAlchemy."""
        return f"postgresql+psycopg://{_USER}:{self._password}@{loopback.HOST}:{self.port}/{database}"

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def create_database(self, name: str) -> str:
        """Create an empty database; returns its SQLAlchemy URL."""
        with psycopg.connect(self._address(), autocommit=True) as connection:
            connection.execute(sql.SQL("create database {}").format(sql.Identifier(name)))
        return self.url(name)

    def stop(self) -> None:
        """End it and remove its data. Stopping twice is fine."""
        if self._process is not None:
            self._process.stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self) -> None:
        password_file = self._folder / "password"
        password_file.write_text(self._password)
        prefix: list[str | Path] = []
        if os.geteuid() == 0:  # Postgres refuses to be root; its package made a user for it
            prefix = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups", "--"]
            shutil.chown(self._folder, "postgres", "postgres")
            shutil.chown(password_file, "postgres", "postgres")
        data = self._folder / "data"
        initdb: list[str | Path] = [
            *prefix,
            self._binaries / "initdb",
            f"--pgdata={data}",
            "--encoding=UTF8",
            "--locale=C",
        ]
        login = [f"--username={_USER}", f"--pwfile={password_file}", "--auth=scram-sha-256", "--no-sync"]
        made = subprocess.run(
            [*initdb, *login], capture_output=True, text=True, check=False, cwd=self._folder
        )
        if made.returncode:
            raise ServiceError(f"Postgres could not make its data folder {data}. It said:\n{made.stderr}")
        settings = {
            "listen_addresses": loopback.HOST,
            "port": str(self.port),
            "unix_socket_directories": "",
            "fsync": "off",  # the data does not outlive the process
        }
        self._process = Process(
            "Postgres",
            [*prefix, self._binaries / "postgres", "-D", data, *(f"--{k}={v}" for k, v in settings.items())],
            log=self._folder / "postgres.log",
            cwd=self._folder,
            stop_with=signal.SIGINT,  # SIGTERM would wait for every client to leave
        )
        self._process.wait_until(self._answers, seconds=30)

    def _address(self) -> str:
        return self.url("postgres").replace("+psycopg", "")

    def _answers(self) -> bool:
        try:
            psycopg.connect(self._address(), connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True


def _binaries() -> Path:
    """The folder of the newest Postgres installed; distributions keep it off the PATH."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[4]))
    on_path = shutil.which("initdb")
    if on_path:
        found.append(Path(on_path).resolve())
    if not found:
        raise Unavailable("Postgres is not installed here (no initdb). On Debian: apt-get install postgresql")
    return found[-1].parent
