"""Opening, creating and writing the ledger: SQLite for one machine, Postgres beyond."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

from sqlalchemy import Connection, Engine, Table, create_engine, event, insert, inspect, select, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DatabaseError, OperationalError

from dlq.errors import ConfigError, DlqError, Fenced
from dlq.ledger import schema

_BUSY_MS = 30_000
_PARAMETERS = {"sqlite": 32_000, "postgresql": 60_000}  # limits are 32,766 and 65,535 a statement


class LedgerError(DlqError):
    """The ledger did not answer; nothing is taken and nothing is sent until it does."""


class Ledger:
    """The ledger's database. ``id`` is made when it is created and never changes."""

    def __init__(self, engine: Engine, ledger_id: str) -> None:
        self._engine = engine
        self.id = ledger_id

    @property
    def dialect(self) -> str:
        return self._engine.dialect.name

    @classmethod
    def open(cls, url: str) -> Ledger:
        """The ledger at ``url``.

        :raises ConfigError: when the URL is wrong, or there is no ledger of this version.
        :raises LedgerError: when the database can't be reached.
        """
        engine = _engine(url)
        try:
            if engine.dialect.name == "sqlite" and not _sqlite_exists(engine):
                raise _absent(url)
            with engine.connect() as connection:
                if not inspect(connection).has_table("ledger"):
                    raise _absent(url)
                version, ledger_id = connection.execute(
                    select(schema.about.c.version, schema.about.c.id)
                ).one()
                if engine.dialect.name == "postgresql":
                    mode = connection.execute(text("SHOW synchronous_commit")).scalar_one()
                    if mode == "off":
                        raise ConfigError(
                            f"ledger {_shown(url)}: synchronous_commit is off, a crash could forget what was "
                            "sent; turn it on"
                        )
        except DatabaseError as error:
            _raise_ours(error, f"ledger {_shown(url)} can't be reached", "is the database up?")
        if version != schema.VERSION:
            raise ConfigError(
                f"ledger {_shown(url)} has version {version}, this code {schema.VERSION}: install the matching release"
            )
        return cls(engine, ledger_id)

    @classmethod
    def create(cls, url: str) -> Ledger:
        """Create the ledger's tables, guards and id; an existing ledger is opened as it is."""
        engine = _engine(url)
        try:
            with engine.begin() as connection:
                if not inspect(connection).has_table("ledger"):
                    schema.metadata.create_all(connection)
                    for statement in schema.triggers(engine.dialect.name):
                        connection.exec_driver_sql(statement)
                    connection.execute(
                        insert(schema.allowed), [{"from_state": a, "to_state": b} for a, b in schema.ALLOWED]
                    )
                    connection.execute(
                        insert(schema.about), {"version": schema.VERSION, "id": uuid.uuid4().hex}
                    )
        except DatabaseError as error:
            fix = "does the folder or database exist?"
            _raise_ours(error, f"ledger {_shown(url)} can't be created", fix)
        engine.dispose()
        return cls.open(url)

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """One consistent look."""
        try:
            with self._engine.connect() as connection, connection.begin():
                yield connection
        except DatabaseError as error:
            _raise_ours(error, "the ledger did not answer", "it is asked again at the next try")

    @contextmanager
    def scratch(self) -> Iterator[Connection]:
        """One consistent look with temporary tables beside it, which go with it."""
        with self._engine.connect() as connection:
            transaction = connection.begin()
            try:
                yield connection
            finally:
                transaction.rollback()

    @contextmanager
    def write(self, queue: str, epoch: int | None, *, alone: bool = False) -> Iterator[Connection]:
        """One transaction, begun by checking that ``epoch`` still holds ``queue``.

        ``epoch`` None writes without the lease: only for recording a decision or a draft, and for the lease itself.
        ``alone``: no other write of the queue runs beside it, so that what it reads stays so until it commits.

        :raises Fenced: when another holder took the lease since.
        """
        try:
            with self._engine.connect().execution_options(dlq_write=True) as connection, connection.begin():
                if epoch is not None:
                    holds = select(schema.queue.c.epoch).where(
                        schema.queue.c.name == queue, schema.queue.c.epoch == epoch
                    )
                    if self.dialect == "postgresql":
                        holds = holds.with_for_update(read=not alone)
                    if connection.execute(holds).first() is None:
                        raise Fenced(
                            f"queue {queue}: another holder took the lease after epoch {epoch}; this process stops"
                        )
                yield connection
        except DatabaseError as error:
            _raise_ours(error, "the ledger did not take the write", "nothing of it counts")

    def close(self) -> None:
        self._engine.dispose()


def insert_rows(
    connection: Connection,
    table: Table,
    columns: tuple[str, ...],
    rows: Iterable[Sequence[Any]],
    *,
    skip_on: tuple[str, ...] | None = None,
) -> int:
    """Insert many rows in few statements; returns how many were new.

    ``skip_on`` names the unique columns by which a row that is there already is passed over; any other fault is raised.
    One statement for many rows lets SQLite work without the interpreter's lock, so that another thread can decode.
    """
    dialect = connection.dialect.name
    size = _PARAMETERS[dialect] // len(columns)
    new = 0
    left = iter(rows)
    while chunk := list(islice(left, size)):
        statement = _insert(dialect, table, columns, len(chunk), skip_on)
        result = connection.exec_driver_sql(statement, tuple(value for row in chunk for value in row))
        new += result.rowcount
    return new


@lru_cache(maxsize=64)
def _insert(
    dialect: str, table: Table, columns: tuple[str, ...], rows: int, skip_on: tuple[str, ...] | None
) -> str:
    mark = "?" if dialect == "sqlite" else "%s"
    row = f"({', '.join([mark] * len(columns))})"
    skip = f" ON CONFLICT ({', '.join(skip_on)}) DO NOTHING" if skip_on else ""
    # Only names of this schema are put into the text; every value is bound.
    return f"INSERT INTO {table.name} ({', '.join(columns)}) VALUES {', '.join([row] * rows)}{skip}"  # noqa: S608


def _engine(url: str) -> Engine:
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise ConfigError(
            "ledger: not a database URL; write sqlite:////absolute/path.db or postgresql+psycopg://…"
        ) from None
    if parsed.get_backend_name() not in _PARAMETERS:
        raise ConfigError(f"ledger: {parsed.get_backend_name()} is not supported; use sqlite or postgresql")
    if parsed.drivername == "postgresql":
        parsed = parsed.set(drivername="postgresql+psycopg")
    if parsed.get_backend_name() == "postgresql":
        return create_engine(
            parsed, pool_pre_ping=True, connect_args={"connect_timeout": 10}, hide_parameters=True
        )
    if not Path(parsed.database or "").is_absolute():
        raise ConfigError(
            f"ledger: {_shown(url)} is relative, and every component of Airflow has a working folder of its own; "
            "write sqlite:////absolute/path.db"
        )
    # Parameters are what dead letters say: an error's text must not carry them into a log.
    engine = create_engine(parsed, connect_args={"timeout": _BUSY_MS / 1000}, hide_parameters=True)

    @event.listens_for(engine, "connect")
    def _configure(raw: Any, _record: Any) -> None:
        raw.isolation_level = None  # we begin transactions ourselves
        for pragma in (
            "journal_mode=WAL",
            "synchronous=FULL",
            f"busy_timeout={_BUSY_MS}",
            "foreign_keys=ON",
            "cache_size=-65536",
        ):
            raw.execute(f"PRAGMA {pragma}").close()

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        # A writer that began as a reader would fail with "database is locked" instead of waiting its turn.
        connection.exec_driver_sql(
            "BEGIN IMMEDIATE" if connection.get_execution_options().get("dlq_write") else "BEGIN"
        )

    return engine


def _raise_ours(error: DatabaseError, what: str, fix: str) -> NoReturn:
    """Say what a database that fails says. What it refuses (a guard, a statement) is no failure of its own."""
    if type(error) is DatabaseError:  # SQLite's: no database, or a damaged one
        raise LedgerError(
            f"{what}: {error.orig}; look whether the ledger names the right file, else restore it from a backup"
        ) from error
    if isinstance(error, OperationalError):
        raise LedgerError(f"{what}: {error.orig}; {fix}") from error
    raise error


def _sqlite_exists(engine: Engine) -> bool:
    return bool(engine.url.database) and Path(str(engine.url.database)).exists()


def _shown(url: str) -> str:
    return make_url(url).render_as_string(hide_password=True)


def _absent(url: str) -> ConfigError:
    return ConfigError(
        f"there is no ledger at {_shown(url)}: create it with `dlq ledger create` (once, by hand)"
    )
