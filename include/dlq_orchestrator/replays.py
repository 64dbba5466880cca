"""Running workflows again: the record of each that failed goes into the origin once more, under a replay's key."""

from __future__ import annotations

import json
import sqlite3
import threading
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from dlq_orchestrator.failures import DataCorruption
from dlq_orchestrator.origin import Inlet, NotSubmitted, Outgoing
from dlq_orchestrator.store import Store
from dlq_orchestrator.workflow import Headers, Step, parse_workflow

Refused = Literal["unknown_workflow", "no_record", "not_taken", "key_reused"]

_OURS = "dlq-"


@dataclass(frozen=True, slots=True)
class Replay:
    """A workflow to be run again. `key` is the replay's own; `value` replaces the record's; `headers` begin with
    `dlq-`; `person`: who goes on from the debugger.
    """

    correlation_id: str
    key: str
    retry_count: int
    value: bytes | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    person: str | None = None


@dataclass(frozen=True, slots=True)
class Override:
    """What a person gives a step instead of its input, or as its output."""

    step: str
    kind: Literal["input", "output"]
    document: dict[str, Any]
    person: str
    reason: str


class NeverSeen(Exception):
    """No workflow of that correlation id has been seen."""


class NoSuchStep(Exception):
    """The workflow has no step of that name."""


class NotDebuggable(Exception):
    """The workflow, or the step, is not where it could be gone on from."""


class Replays:
    """Runs again what failed. (`WorkflowSafety` keeps its record, from its failure until its workflow succeeds.)

    A replay's key is remembered after the origin has acknowledged its record and before it is answered: an accepted
    one is in the origin, and put in no more. Who dies between the two knows nothing of it, and puts it in again when
    asked again: both run, one after the other, and the dedupe key and the steps that are done keep each effect once.
    """

    def __init__(self, store: Store, inlet: Inlet) -> None:
        self._store = store
        self._inlet = inlet
        # two calls with one key, at once, would both put it in
        self._one_at_a_time = threading.Lock()

    def replay(self, replays: Sequence[Replay]) -> dict[str, Refused | None]:
        """Have workflows run again; for each key None, or why not. The keys differ.

        One that has succeeded is not run: its replay has succeeded, too.

        :raises NotSubmitted: some were not acknowledged; ask again, those that were are not put in again.
        """
        with self._one_at_a_time:
            return self._replay(replays)

    def _replay(self, replays: Sequence[Replay]) -> dict[str, Refused | None]:
        accepted = self._accepted([replay.key for replay in replays])
        answer: dict[str, Refused | None] = {}
        going: list[tuple[Replay, Outgoing]] = []
        done: list[Replay] = []
        for replay in replays:
            answer[replay.key] = None
            if replay.key in accepted:
                if accepted[replay.key] != replay.correlation_id:
                    answer[replay.key] = "key_reused"
                continue
            state, record = self._known(replay.correlation_id)
            if state is None:
                answer[replay.key] = "unknown_workflow"
            elif record is not None:
                going.append((replay, _outgoing(record, replay)))
            elif state == "succeeded":
                done.append(replay)
            else:
                answer[replay.key] = "no_record"
        put: list[Replay] = []
        faults: list[NotSubmitted] = []
        for (replay, _), place in zip(going, self._inlet.put([record for _, record in going]), strict=True):
            if isinstance(place, NotSubmitted):
                faults.append(place)
            elif isinstance(place, DataCorruption):
                answer[replay.key] = "not_taken"
            else:
                put.append(replay)
        self._remember(put, done)
        if faults:
            raise NotSubmitted(f"{len(faults)} of {len(going)} replays were not acknowledged: {faults[0]}")
        return answer

    def debug(self, correlation_id: str, override: Override) -> str:
        """Override a step's input or output and go on from there; returns the key its outcome is asked for by.

        An input holds for every run until the step is done.

        :raises NeverSeen, NoSuchStep, NotDebuggable: see there.
        :raises DataCorruption: what it came as is no workflow, or the origin doesn't take it again.
        :raises NotSubmitted: no acknowledgement; the override stands.
        """
        state, record = self._known(correlation_id)
        if state is None:
            raise NeverSeen("no workflow with this correlation id has been seen")
        if record is None:
            raise NotDebuggable("it succeeded" if state == "succeeded" else "what it came as was not kept")
        steps = parse_workflow(record.value).steps
        position = next((n for n, step in enumerate(steps) if step.name == override.step), None)
        if position is None:
            raise NoSuchStep(f"it has no such step; it has: {', '.join(step.name for step in steps)}")
        retry_count = self._override(correlation_id, steps[position], position, override)
        key = f"debug-{uuid.uuid4().hex}"
        refused = self.replay([Replay(correlation_id, key, retry_count + 1, person=override.person)])[key]
        if refused is not None:
            raise DataCorruption("the origin doesn't take its record again")
        return key

    def _override(self, correlation_id: str, step: Step, position: int, override: Override) -> int:
        """Record an override, and what it makes of the step; returns the workflow's retry count."""
        document = json.dumps(override.document)
        with self._store.transaction() as db:
            done = db.execute(
                "SELECT 1 FROM step WHERE correlation_id = ? AND name = ? AND state = 'succeeded'",
                [correlation_id, step.name],
            ).fetchone()
            if done:
                raise NotDebuggable(f"its step {step.name} is done: what it did can't be done again")
            db.execute(
                "INSERT INTO override (correlation_id, step, kind, document, person, reason, at)"
                " VALUES (?, ?, ?, ?, ?, ?, ?)",
                [
                    correlation_id,
                    step.name,
                    override.kind,
                    document,
                    override.person,
                    override.reason,
                    self._store.now_ms(),
                ],
            )
            if override.kind == "output":
                db.execute(
                    "INSERT INTO step VALUES (?, ?, ?, ?, ?, 'succeeded', 0, ?, ?) ON CONFLICT"
                    " (correlation_id, name) DO UPDATE SET state = 'succeeded', output = excluded.output",
                    [
                        correlation_id,
                        step.name,
                        position,
                        step.plugin,
                        step.tool,
                        document,
                        json.dumps(step.args),
                    ],
                )
            count: int = db.execute(
                "SELECT retry_count FROM workflow WHERE correlation_id = ?", [correlation_id]
            ).fetchone()["retry_count"]
        return count

    def lineage(self, correlation_id: str) -> tuple[list[sqlite3.Row], list[sqlite3.Row]]:
        """A workflow's replays and overrides, oldest first."""
        with self._store.read() as db:
            replays = db.execute(
                "SELECT key, retry_count, at, person AS by FROM replay WHERE correlation_id = ? ORDER BY at, key",
                [correlation_id],
            ).fetchall()
            overrides = db.execute(
                "SELECT step, kind, document, person, reason, at FROM override WHERE correlation_id = ?"
                " ORDER BY id",
                [correlation_id],
            ).fetchall()
        return replays, overrides

    def _accepted(self, keys: list[str]) -> dict[str, str]:
        """Those of the keys that were accepted before, and for which workflow."""
        with self._store.read() as db:
            rows = db.execute(
                "SELECT key, correlation_id FROM replay WHERE key IN (SELECT value FROM json_each(?))",
                [json.dumps(keys)],
            ).fetchall()
        return {row["key"]: row["correlation_id"] for row in rows}

    def _known(self, correlation_id: str) -> tuple[str | None, Outgoing | None]:
        """The workflow's state, and the record it came as."""
        with self._store.read() as db:
            row = db.execute(
                "SELECT state, record.* FROM workflow LEFT JOIN record USING (correlation_id)"
                " WHERE workflow.correlation_id = ?",
                [correlation_id],
            ).fetchone()
        if row is None:
            return None, None
        if row["headers"] is None:
            return row["state"], None
        headers = msgspec.msgpack.decode(row["headers"], type=Headers)
        types = msgspec.json.decode(row["types"], type=dict[str, str])
        return row["state"], Outgoing(row["key"], row["value"], headers, types)

    def _remember(self, put: Sequence[Replay], done: Sequence[Replay]) -> None:
        """`done`: their workflows had succeeded, so their outcome is known without a run."""
        now = self._store.now_ms()
        with self._store.transaction() as db:
            db.executemany(
                "INSERT INTO replay VALUES (?, ?, ?, ?, ?)",
                [(r.key, r.correlation_id, r.retry_count, now, r.person) for r in (*put, *done)],
            )
            db.executemany(
                "INSERT INTO outcome VALUES (?, 'succeeded', ?) ON CONFLICT (key) DO UPDATE"
                " SET state = 'succeeded', at = excluded.at",
                [(replay.key, now) for replay in done],
            )


def _outgoing(record: Outgoing, replay: Replay) -> Outgoing:
    """The record as it last came, with this replay's headers in place of an earlier one's."""
    ours = dict(replay.headers) | {"dlq-key": replay.key, "dlq-retry-count": str(replay.retry_count)}
    headers: Headers = [(name, value) for name, value in record.headers if not name.startswith(_OURS)]
    headers += [(name, value.encode()) for name, value in ours.items()]
    value = record.value if replay.value is None else replay.value
    return Outgoing(record.key, value, headers, record.types)
