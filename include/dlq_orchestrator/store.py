"""The orchestrator's memory: one SQLite file that survives SIGKILL, one process to a folder."""

from __future__ import annotations

import fcntl
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_SCHEMA = """
CREATE TABLE IF NOT EXISTS instance (id TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS workflow (
  correlation_id TEXT PRIMARY KEY, workflow TEXT, dedupe_key TEXT, trace_id TEXT,
  retry_count INTEGER NOT NULL DEFAULT 0,
  state TEXT NOT NULL CHECK (state IN ('pending', 'succeeded', 'failed')),
  duplicate_of TEXT, failure TEXT, changed_at INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS workflow_changed ON workflow (changed_at, state);
CREATE TABLE IF NOT EXISTS step (
  correlation_id TEXT NOT NULL, name TEXT NOT NULL, position INTEGER NOT NULL,
  plugin TEXT NOT NULL, tool TEXT NOT NULL,
  state TEXT NOT NULL CHECK (state IN ('succeeded', 'failed')), attempts INTEGER NOT NULL, output TEXT,
  input TEXT, PRIMARY KEY (correlation_id, name)
) WITHOUT ROWID;
-- what a workflow that has not succeeded came as, to be replayed
CREATE TABLE IF NOT EXISTS record (
  correlation_id TEXT PRIMARY KEY, key BLOB, value BLOB, headers BLOB NOT NULL, types BLOB NOT NULL
);
-- replays that the origin has
CREATE TABLE IF NOT EXISTS replay (
  key TEXT PRIMARY KEY, correlation_id TEXT NOT NULL, retry_count INTEGER NOT NULL, at INTEGER NOT NULL, person TEXT
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS replay_of ON replay (correlation_id, at);
CREATE INDEX IF NOT EXISTS replay_at ON replay (at);
CREATE TABLE IF NOT EXISTS override (
  id INTEGER PRIMARY KEY, correlation_id TEXT NOT NULL, step TEXT NOT NULL,
  kind TEXT NOT NULL CHECK (kind IN ('input', 'output')), document TEXT NOT NULL,
  person TEXT NOT NULL, reason TEXT NOT NULL, at INTEGER NOT NULL
);
CREATE INDEX IF NOT EXISTS override_of ON override (correlation_id);
-- a log, without a unique key on purpose: an effect that happened twice must be seen twice
CREATE TABLE IF NOT EXISTS effect (
  id INTEGER PRIMARY KEY, effect_key TEXT NOT NULL, correlation_id TEXT NOT NULL, step TEXT NOT NULL,
  at INTEGER NOT NULL
);
CREATE INDEX IF NOT EXISTS effect_of ON effect (correlation_id);
CREATE TABLE IF NOT EXISTS dedupe (
  key TEXT PRIMARY KEY, correlation_id TEXT NOT NULL, at INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS dedupe_at ON dedupe (at);
CREATE TABLE IF NOT EXISTS outcome (
  key TEXT PRIMARY KEY, state TEXT NOT NULL CHECK (state IN ('pending', 'succeeded', 'failed')),
  at INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS outcome_at ON outcome (at);
CREATE TABLE IF NOT EXISTS lease (
  one INTEGER PRIMARY KEY CHECK (one = 1), holder TEXT NOT NULL, until INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS held (
  id INTEGER PRIMARY KEY, key BLOB, value BLOB, headers BLOB NOT NULL, undeliverable INTEGER NOT NULL
);
-- replays that were read and not recorded yet: they survive a crash, so that nobody takes them for never sent
CREATE TABLE IF NOT EXISTS claim (key TEXT PRIMARY KEY, at INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS quota (
  plugin TEXT NOT NULL, resource TEXT NOT NULL, "limit" INTEGER NOT NULL, ceiling INTEGER NOT NULL,
  peak_need INTEGER NOT NULL DEFAULT 0, rejected INTEGER NOT NULL DEFAULT 0, CHECK ("limit" <= ceiling),
  PRIMARY KEY (plugin, resource)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS plugin (
  name TEXT PRIMARY KEY, version TEXT NOT NULL, scopes TEXT NOT NULL, disabled INTEGER NOT NULL,
  revision INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS plugin_change (
  name TEXT NOT NULL, revision INTEGER NOT NULL, at INTEGER NOT NULL, person TEXT NOT NULL, reason TEXT NOT NULL,
  version TEXT NOT NULL, scopes TEXT NOT NULL, disabled INTEGER NOT NULL, PRIMARY KEY (name, revision)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS violation (
  plugin TEXT NOT NULL, scope TEXT NOT NULL, count INTEGER NOT NULL, last_at INTEGER NOT NULL,
  PRIMARY KEY (plugin, scope)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS idempotency (
  key TEXT PRIMARY KEY, request TEXT NOT NULL, answer TEXT, at INTEGER NOT NULL
);
"""


_VERSION = 3


class StateInUse(Exception):
    """Another orchestrator works on this folder, or one of another version did."""


class Store:
    """One connection for all threads; whoever touches the database holds its lock for that short while.

    :param folder: where the state lies; made if absent. Held by a lock for as long as the process lives.
    :param now: the clock, epoch seconds.
    :raises StateInUse: another process has the folder: two would run each workflow's effects twice.
    """

    def __init__(self, folder: Path, now: Callable[[], float] = time.time) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._held = (folder / "lock").open("w")
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StateInUse(
                f"{folder} is in use by another orchestrator: stop it, or give this one its own"
            ) from None
        self._now = now
        self._lock = threading.RLock()
        self._db = sqlite3.connect(
            folder / "orchestrator.sqlite", isolation_level=None, check_same_thread=False
        )
        self._db.row_factory = sqlite3.Row
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")
        found = self._db.execute("PRAGMA user_version").fetchone()[0]
        if found != _VERSION and self._db.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone():
            raise StateInUse(
                f"{folder} is of another version of the orchestrator: give this one a new folder"
            )
        self._db.executescript(f"{_SCHEMA}PRAGMA user_version = {_VERSION};")
        with self.transaction() as db:
            db.execute(
                "INSERT INTO instance SELECT ? WHERE NOT EXISTS (SELECT 1 FROM instance)", [uuid.uuid4().hex]
            )
            # requests whose process died before it answered
            db.execute("DELETE FROM idempotency WHERE answer IS NULL")
            self.instance_id: str = db.execute("SELECT id FROM instance").fetchone()["id"]

    def now_ms(self) -> int:
        return int(self._now() * 1000)

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """What happens inside is durable on leaving, or never happened."""
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    @contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            yield self._db

    def close(self) -> None:
        with self._lock:
            self._db.close()
        self._held.close()
