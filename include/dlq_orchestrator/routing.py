"""Auto-DLQ routing, and the lease under which it pauses."""

from __future__ import annotations

import sqlite3
import threading
from dataclasses import dataclass

import msgspec
import structlog

from dlq_orchestrator.dead_letter import DeadLetter, DeadLetterWriter
from dlq_orchestrator.store import Store
from dlq_orchestrator.workflow import Headers

_log = structlog.get_logger()

_RELEASE_BATCH = 200


class LeaseHeld(Exception):
    """Somebody else paused routing, and their lease is live."""


@dataclass(frozen=True, slots=True)
class RoutingState:
    """`until` in epoch ms. `held` failures wait for the lease's end; `undeliverable` ones are too large."""

    holder: str | None
    until: int | None
    held: int
    undeliverable: int

    @property
    def paused(self) -> bool:
        return self.holder is not None


class Routing:
    """Pauses dead-lettering for one holder at a time, and holds what fails meanwhile, durably.

    `gate` is held while failures are routed: a pause waits for it, so that once a pause was answered nothing
    is dead-lettered but the failures of replays.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self.gate = threading.Lock()

    def state(self) -> RoutingState:
        with self._store.read() as db:
            lease = self._live(db)
            counts = db.execute(
                "SELECT count(*) AS n, coalesce(sum(undeliverable), 0) AS undeliverable FROM held"
            ).fetchone()
        return RoutingState(
            lease["holder"] if lease else None,
            lease["until"] if lease else None,
            counts["n"] - counts["undeliverable"],
            counts["undeliverable"],
        )

    def pause(self, holder: str, seconds: int) -> None:
        """Pause, or extend one's own pause, until at least so many seconds from now.

        :raises LeaseHeld: another holder's lease is live.
        """
        with self.gate, self._store.transaction() as db:
            lease = self._live(db)
            self._refuse_other(lease, holder)
            until = max(self._store.now_ms() + seconds * 1000, lease["until"] if lease else 0)
            db.execute("INSERT OR REPLACE INTO lease VALUES (1, ?, ?)", [holder, until])
        _log.info("routing paused", holder=holder, seconds=seconds)

    def resume(self, holder: str) -> None:
        """End one's own pause; nothing to do where routing is not paused.

        :raises LeaseHeld: another holder's lease is live.
        """
        with self.gate, self._store.transaction() as db:
            self._refuse_other(self._live(db), holder)
            db.execute("DELETE FROM lease")
        _log.info("routing resumed", holder=holder)

    def paused(self) -> bool:
        with self._store.read() as db:
            return self._live(db) is not None

    def hold(self, db: sqlite3.Connection, letters: list[DeadLetter], *, undeliverable: bool = False) -> None:
        """Keep dead letters, in the caller's transaction: until the lease ends, or for good."""
        db.executemany(
            "INSERT INTO held (key, value, headers, undeliverable) VALUES (?, ?, ?, ?)",
            [(x.key, x.value, msgspec.msgpack.encode(x.headers), undeliverable) for x in letters],
        )

    def release(self, writer: DeadLetterWriter) -> int:
        """Dead-letter what was held, unless a lease is live; returns how many. A crash repeats some."""
        released = 0
        while True:
            with self.gate:
                rows = [] if self.paused() else self._waiting()
                if not rows:
                    break
                too_large = writer.write(
                    [
                        DeadLetter(f"held/{r['id']}", r["key"], r["value"], _headers.decode(r["headers"]))
                        for r in rows
                    ]
                )
                with self._store.transaction() as db:
                    db.executemany(
                        "DELETE FROM held WHERE id = ?", _ids(rows, set(range(len(rows))) - too_large)
                    )
                    db.executemany("UPDATE held SET undeliverable = 1 WHERE id = ?", _ids(rows, too_large))
            released += len(rows) - len(too_large)
        if released:
            _log.info("held failures dead-lettered", count=released)
        return released

    def _waiting(self) -> list[sqlite3.Row]:
        with self._store.read() as db:
            return db.execute(
                "SELECT id, key, value, headers FROM held WHERE NOT undeliverable ORDER BY id LIMIT ?",
                [_RELEASE_BATCH],
            ).fetchall()

    def _live(self, db: sqlite3.Connection) -> sqlite3.Row | None:
        row: sqlite3.Row | None = db.execute(
            "SELECT holder, until FROM lease WHERE until > ?", [self._store.now_ms()]
        ).fetchone()
        return row

    def _refuse_other(self, lease: sqlite3.Row | None, holder: str) -> None:
        if lease is not None and lease["holder"] != holder:
            seconds = (lease["until"] - self._store.now_ms()) // 1000 + 1
            raise LeaseHeld(f"routing is paused by {lease['holder']} for {seconds} s more")


def _ids(rows: list[sqlite3.Row], places: set[int]) -> list[tuple[int]]:
    return [(rows[place]["id"],) for place in sorted(places)]


_headers = msgspec.msgpack.Decoder(Headers)
