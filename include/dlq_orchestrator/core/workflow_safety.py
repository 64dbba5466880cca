"""What makes a replay safe: dedupe keys, completed steps, the effect log, all recorded with the outcome."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from dlq_orchestrator.store import Store
from dlq_orchestrator.workflow import Record, Run

KEEP_S = 30 * 86400.0
"""Twice as long as SQS keeps a message at most."""

# the contract's: a key that was accepted is accepted again for so long, and put in no more
_REPLAY_KEY_MS = 86_400_000

# forgotten with each batch, at most: more than a batch adds
_FORGET_AT_ONCE = 2000


@dataclass(slots=True)
class Memory:
    """What is known of some workflows before they run.

    :param succeeded: dedupe key → correlation id of the workflow that succeeded under it.
    :param completed: correlation id → step → its output.
    :param inputs: correlation id → step → the arguments a person gave it in the debugger.
    """

    succeeded: dict[str, str] = field(default_factory=dict)
    completed: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    inputs: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)

    def learn(self, run: Run) -> None:
        """A later record of the same batch sees what an earlier one did."""
        if run.state == "succeeded":
            self.succeeded.setdefault(run.dedupe_key, run.correlation_id)
        steps = self.completed.setdefault(run.correlation_id, {})
        steps.update({s.name: s.output for s in run.steps if s.output is not None})


class WorkflowSafety:
    """Keeps, durably, what each workflow did.

    A dedupe key is registered when its workflow *succeeds*: a first try that failed doesn't make its replay
    look done. Effects are recorded in the transaction that records the outcome, so a batch cut short by a
    crash left none, and runs again.

    :param keep_s: how long what is over is remembered, in seconds: a record that comes again later is run again.
    """

    def __init__(self, store: Store, keep_s: float = KEEP_S) -> None:
        self._store = store
        self._keep_ms = int(keep_s * 1000)

    def recall(self, correlation_ids: Collection[str], dedupe_keys: Collection[str]) -> Memory:
        memory = Memory()
        with self._store.read() as db:
            for row in db.execute(
                "SELECT key, correlation_id FROM dedupe WHERE key IN (SELECT value FROM json_each(?))",
                [json.dumps(list(dedupe_keys))],
            ):
                memory.succeeded[row["key"]] = row["correlation_id"]
            for row in db.execute(
                "SELECT correlation_id, name, output FROM step WHERE state = 'succeeded'"
                " AND correlation_id IN (SELECT value FROM json_each(?))",
                [json.dumps(list(correlation_ids))],
            ):
                completed = memory.completed.setdefault(row["correlation_id"], {})
                completed[row["name"]] = json.loads(row["output"])
            for row in db.execute(
                "SELECT correlation_id, step, document FROM override WHERE kind = 'input'"
                " AND correlation_id IN (SELECT value FROM json_each(?)) ORDER BY id",
                [json.dumps(list(correlation_ids))],
            ):
                inputs = memory.inputs.setdefault(row["correlation_id"], {})
                inputs[row["step"]] = json.loads(row["document"])
        return memory

    def claim(self, records: Iterable[Record]) -> None:
        """These records are about to run: their replays are `pending` until they are recorded, crash or not."""
        keys = [(record.replay_key, self._store.now_ms()) for record in records if record.replay_key]
        if keys:
            with self._store.transaction() as db:
                db.executemany("INSERT INTO claim VALUES (?, ?) ON CONFLICT (key) DO NOTHING", keys)

    def record(self, db: sqlite3.Connection, runs: list[Run]) -> None:
        """Write what a batch of runs came to, in the caller's transaction.

        Success is final: what failed under the same ids afterwards was another try of something done.
        """
        now = self._store.now_ms()
        self._forget(db, now)
        db.executemany(
            "INSERT INTO workflow VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
            " ON CONFLICT (correlation_id) DO UPDATE SET workflow = coalesce(excluded.workflow, workflow),"
            " dedupe_key = excluded.dedupe_key, trace_id = coalesce(excluded.trace_id, trace_id),"
            " retry_count = excluded.retry_count, state = excluded.state,"
            " duplicate_of = excluded.duplicate_of,"
            " failure = excluded.failure, changed_at = excluded.changed_at WHERE state <> 'succeeded'",
            [
                (
                    run.correlation_id,
                    run.workflow,
                    run.dedupe_key,
                    _trace_id(run),
                    run.record.retry_count,
                    run.state,
                    run.duplicate_of,
                    _failure(run),
                    now,
                )
                for run in runs
            ],
        )
        db.executemany(
            "INSERT INTO step VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
            " ON CONFLICT (correlation_id, name) DO UPDATE SET position = excluded.position,"
            " plugin = excluded.plugin, tool = excluded.tool, state = excluded.state,"
            " attempts = attempts + excluded.attempts, output = excluded.output, input = excluded.input"
            " WHERE state <> 'succeeded'",
            [
                (
                    run.correlation_id,
                    s.name,
                    s.position,
                    s.plugin,
                    s.tool,
                    s.state,
                    s.attempts,
                    _json(s.output),
                    _json(s.args),
                )
                for run in runs
                for s in run.steps
            ],
        )
        db.executemany(
            "INSERT INTO effect (effect_key, correlation_id, step, at) VALUES (?, ?, ?, ?)",
            [
                (s.effect_key, run.correlation_id, s.name, now)
                for run in runs
                for s in run.steps
                if s.effect_key
            ],
        )
        db.executemany(
            "INSERT INTO dedupe VALUES (?, ?, ?) ON CONFLICT (key) DO NOTHING",
            [(run.dedupe_key, run.correlation_id, now) for run in runs if run.state == "succeeded"],
        )
        db.executemany(
            "INSERT INTO outcome VALUES (?, ?, ?) ON CONFLICT (key) DO UPDATE SET state = excluded.state,"
            " at = excluded.at WHERE state <> 'succeeded'",
            [
                (run.record.replay_key, run.state, run.failure.failed_at if run.failure else now)
                for run in runs
                if run.record.replay_key
            ],
        )
        self._keep(db, runs)
        db.executemany(
            "DELETE FROM claim WHERE key = ?",
            [(run.record.replay_key,) for run in runs if run.record.replay_key],
        )

    @staticmethod
    def _keep(db: sqlite3.Connection, runs: list[Run]) -> None:
        """Keep the records of what has not succeeded, to be replayed; in their order, as the newest counts."""
        for run in runs:
            record = run.record
            if run.state == "succeeded":
                db.execute("DELETE FROM record WHERE correlation_id = ?", [run.correlation_id])
            elif not record.headers_broken:
                headers, types = msgspec.msgpack.encode(record.headers), msgspec.json.encode(record.types)
                db.execute(
                    "INSERT OR REPLACE INTO record VALUES (?, ?, ?, ?, ?)",
                    [run.correlation_id, record.key, record.value, headers, types],
                )

    def _forget(self, db: sqlite3.Connection, now: int) -> None:
        """Forget what is over and old, some at a time, in the caller's transaction."""
        before = now - self._keep_ms
        old = "SELECT correlation_id FROM workflow WHERE changed_at < ? ORDER BY changed_at LIMIT ?"
        if ids := [row[0] for row in db.execute(old, [before, _FORGET_AT_ONCE])]:
            for table in ("step", "effect", "record", "override", "workflow"):
                db.execute(
                    f"DELETE FROM {table} WHERE correlation_id IN (SELECT value FROM json_each(?))",  # noqa: S608
                    [json.dumps(ids)],
                )
        for table in ("dedupe", "outcome", "claim", "replay"):
            db.execute(
                f"DELETE FROM {table} WHERE key IN (SELECT key FROM {table} WHERE at < ? LIMIT ?)",  # noqa: S608
                [min(before, now - _REPLAY_KEY_MS) if table == "replay" else before, _FORGET_AT_ONCE],
            )

    def expect(self, correlation_id: str, workflow: str) -> None:
        """A workflow was submitted: it is `pending` until its record has run."""
        with self._store.transaction() as db:
            db.execute(
                "INSERT INTO workflow (correlation_id, workflow, state, changed_at)"
                " VALUES (?, ?, 'pending', ?) ON CONFLICT (correlation_id) DO NOTHING",
                [correlation_id, workflow, self._store.now_ms()],
            )

    def outcomes(self, replay_keys: list[str]) -> dict[str, tuple[str, int]]:
        """State and its time (epoch ms) by replay key, of those whose record has been read."""
        with self._store.read() as db:
            rows = db.execute(
                "SELECT key, state, at FROM outcome WHERE key IN (SELECT value FROM json_each(?1))"
                " AND (state = 'succeeded' OR key NOT IN (SELECT key FROM claim))"
                " UNION ALL SELECT key, 'pending', at FROM claim WHERE key IN (SELECT value FROM json_each(?1))"
                " AND key NOT IN (SELECT key FROM outcome WHERE state = 'succeeded')",
                [json.dumps(replay_keys)],
            ).fetchall()
        return {row["key"]: (row["state"], row["at"]) for row in rows}

    def workflow(self, correlation_id: str) -> tuple[sqlite3.Row, list[sqlite3.Row]] | None:
        """A workflow's row and those of its steps, in their order."""
        with self._store.read() as db:
            row = db.execute("SELECT * FROM workflow WHERE correlation_id = ?", [correlation_id]).fetchone()
            if row is None:
                return None
            steps = db.execute(
                "SELECT * FROM step WHERE correlation_id = ? ORDER BY position, name", [correlation_id]
            ).fetchall()
        return row, steps

    def workflows(self, state: str | None, after: str, limit: int) -> list[sqlite3.Row]:
        """Rows of workflows by correlation id, those after that one."""
        with self._store.read() as db:
            return db.execute(
                "SELECT correlation_id, workflow, state, changed_at FROM workflow"
                " WHERE correlation_id > ? AND state = coalesce(?, state) ORDER BY correlation_id LIMIT ?",
                [after, state, limit],
            ).fetchall()

    def failures(self, correlation_ids: list[str]) -> dict[str, sqlite3.Row]:
        """The rows of those workflows whose last run failed, by correlation id."""
        with self._store.read() as db:
            rows = db.execute(
                "SELECT correlation_id, workflow, trace_id, retry_count, failure FROM workflow"
                " WHERE failure IS NOT NULL AND correlation_id IN (SELECT value FROM json_each(?))",
                [json.dumps(correlation_ids)],
            ).fetchall()
        return {row["correlation_id"]: row for row in rows}

    def success_rate(self, window_s: int) -> tuple[int, int]:
        """How many distinct workflows (succeeded, failed) ended in the window, by their last state."""
        with self._store.read() as db:
            rows = db.execute(
                "SELECT state, count(*) AS n FROM workflow WHERE changed_at >= ? GROUP BY state",
                [self._store.now_ms() - window_s * 1000],
            ).fetchall()
        counts = {row["state"]: row["n"] for row in rows}
        return counts.get("succeeded", 0), counts.get("failed", 0)


def _json(value: Any) -> str | None:
    return None if value is None else msgspec.json.encode(value).decode()


def _trace_id(run: Run) -> str | None:
    """The trace id of a W3C `traceparent` (version-traceid-parentid-flags): the run's, else what its record says."""
    parts = (run.traceparent or run.record.text("traceparent") or "").split("-")
    return parts[1] if len(parts) == 4 and len(parts[1]) == 32 else None


def _failure(run: Run) -> str | None:
    """A failure without its stack trace, which may hold a payload and belongs to the dead letter alone."""
    if run.failure is None:
        return None
    shown = msgspec.to_builtins(run.failure)
    del shown["stack_trace"]
    return _json(shown)
