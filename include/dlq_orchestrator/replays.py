"""Running workflows again: what came of each that failed is kept, and put into the origin under a replay's key."""

from __future__ import annotations

import json
import sqlite3
import threading
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import msgspec

from dlq_orchestrator.dead_letter import KafkaRecord
from dlq_orchestrator.origin import NotSubmitted
from dlq_orchestrator.store import Store
from dlq_orchestrator.workflow import Headers, Run, parse_workflow

_REPLAY = "dlq-"


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A record to be put into the origin."""

    key: bytes | None
    value: bytes | None
    headers: Headers


class Inlet(Protocol):
    """What replays go into."""

    def produce(self, records: Sequence[Outgoing]) -> list[str | None]:
        """Put them in; for each None, once it is acknowledged, or why it was not."""


@dataclass(frozen=True, slots=True)
class Replay:
    """A workflow to be run again. `key` is the replay's own; `value` replaces the record's; `headers` begin with
    `dlq-`.
    """

    correlation_id: str
    key: str
    retry_count: int
    value: bytes | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


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


class NotDebuggable(Exception):
    """The workflow, or the step, is not where it could be gone on from."""


class Replays:
    """Knows what failed, and runs it again.

    A record is kept from its failure until its workflow succeeds. A replay's key is remembered once its record is in
    the origin: asked for again, nothing is put in. Who dies between the two puts it in twice when asked again: its
    dedupe key and the steps that are done keep the effects once.
    """

    def __init__(self, store: Store, inlet: Inlet) -> None:
        self._store = store
        self._inlet = inlet
        self._one_at_a_time = threading.Lock()

    def keep(self, db: sqlite3.Connection, records: Sequence[KafkaRecord], runs: Sequence[Run]) -> None:
        """Keep the records of what failed, in the caller's transaction; those of what succeeded are not needed."""
        db.executemany(
            "INSERT INTO record VALUES (?, ?, ?, ?) ON CONFLICT (correlation_id) DO UPDATE SET"
            " key = excluded.key, value = excluded.value, headers = excluded.headers",
            [
                (run.correlation_id, record.key, record.value, msgspec.msgpack.encode(record.headers))
                for record, run in zip(records, runs, strict=True)
                if run.state != "succeeded" and not record.headers_broken
            ],
        )
        db.executemany(
            "DELETE FROM record WHERE correlation_id = ?",
            [(run.correlation_id,) for run in runs if run.state == "succeeded"],
        )

    def replay(self, replays: Sequence[Replay]) -> dict[str, str | None]:
        """Have workflows run again; for each key None, or a short code for why not.

        :raises NotSubmitted: not all were acknowledged; ask again, those that were are not put in again.
        """
        with self._one_at_a_time:
            return self._replay(replays)

    def _replay(self, replays: Sequence[Replay]) -> dict[str, str | None]:
        accepted = self._accepted([replay.key for replay in replays])
        answer: dict[str, str | None] = dict.fromkeys(accepted)
        going: list[tuple[Replay, Outgoing]] = []
        done: list[Replay] = []
        for replay in replays:
            if replay.key in answer:
                continue
            answer[replay.key] = None
            state, kept = self._known(replay.correlation_id)
            if state == "succeeded":
                done.append(replay)
            elif state is None or kept is None:
                answer[replay.key] = "unknown_workflow" if state is None else "no_record"
            else:
                going.append((replay, _outgoing(kept, replay)))
        refused = self._inlet.produce([record for _, record in going])
        put = [replay for (replay, _), why in zip(going, refused, strict=True) if why is None]
        self._remember(put, done)
        if faults := [why for why in refused if why is not None]:
            raise NotSubmitted(f"{len(faults)} of {len(going)} replays were not acknowledged: {faults[0]}")
        return answer

    def debug(self, correlation_id: str, override: Override) -> str:
        """Override a step's input or output and go on from there; returns the key its outcome is asked for by.

        :raises NeverSeen, NotDebuggable: see there.
        :raises NotSubmitted: no acknowledgement; the override stands.
        """
        state, kept = self._known(correlation_id)
        if state is None:
            raise NeverSeen("no workflow with this correlation id has been seen")
        if state == "succeeded" or kept is None:
            raise NotDebuggable("it succeeded" if state == "succeeded" else "what it came as was not kept")
        workflow = parse_workflow(kept.value)
        at = next((n for n, step in enumerate(workflow.steps) if step.name == override.step), None)
        if at is None:
            names = ", ".join(step.name for step in workflow.steps)
            raise NotDebuggable(f"it has no step {override.step!r}; it has: {names}")
        step = workflow.steps[at]
        with self._store.transaction() as db:
            found = db.execute(
                "SELECT state FROM step WHERE correlation_id = ? AND name = ?", [correlation_id, step.name]
            ).fetchone()
            if found is not None and found["state"] == "succeeded":
                raise NotDebuggable(f"its step {step.name} is done: what it did can't be done again")
            document = json.dumps(override.document)
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
                        at,
                        step.plugin,
                        step.tool,
                        document,
                        json.dumps(step.args),
                    ],
                )
            count = db.execute(
                "SELECT retry_count FROM workflow WHERE correlation_id = ?", [correlation_id]
            ).fetchone()["retry_count"]
        key = f"debug-{uuid.uuid4().hex}"
        self.replay([Replay(correlation_id, key, count + 1)])
        return key

    def lineage(self, correlation_id: str) -> tuple[list[sqlite3.Row], list[sqlite3.Row]]:
        """A workflow's replays and overrides, oldest first."""
        with self._store.read() as db:
            replays = db.execute(
                "SELECT key, retry_count, at FROM replay WHERE correlation_id = ? ORDER BY at, key",
                [correlation_id],
            ).fetchall()
            overrides = db.execute(
                "SELECT step, kind, person, reason, at FROM override WHERE correlation_id = ? ORDER BY id",
                [correlation_id],
            ).fetchall()
        return replays, overrides

    def _accepted(self, keys: list[str]) -> list[str]:
        with self._store.read() as db:
            rows = db.execute(
                "SELECT key FROM replay WHERE key IN (SELECT value FROM json_each(?))", [json.dumps(keys)]
            ).fetchall()
        return [row["key"] for row in rows]

    def _known(self, correlation_id: str) -> tuple[str | None, Outgoing | None]:
        """The workflow's state, and the record it came as."""
        with self._store.read() as db:
            row = db.execute(
                "SELECT state, record.key, value, headers FROM workflow LEFT JOIN record USING (correlation_id)"
                " WHERE correlation_id = ?",
                [correlation_id],
            ).fetchone()
        if row is None:
            return None, None
        if row["headers"] is None:
            return row["state"], None
        return row["state"], Outgoing(row["key"], row["value"], _headers.decode(row["headers"]))

    def _remember(self, put: Sequence[Replay], done: Sequence[Replay]) -> None:
        """`done`: their workflows had succeeded, so their outcome is known without a run."""
        now = self._store.now_ms()
        with self._store.transaction() as db:
            db.executemany(
                "INSERT INTO replay VALUES (?, ?, ?, ?)",
                [(replay.key, replay.correlation_id, replay.retry_count, now) for replay in (*put, *done)],
            )
            db.executemany(
                "INSERT INTO outcome VALUES (?, 'succeeded', ?) ON CONFLICT (key) DO UPDATE"
                " SET state = 'succeeded', at = excluded.at",
                [(replay.key, now) for replay in done],
            )


_headers = msgspec.msgpack.Decoder(Headers)


def _outgoing(kept: Outgoing, replay: Replay) -> Outgoing:
    """The record as it last came, with this replay's headers in place of an earlier one's."""
    ours = dict(replay.headers) | {"dlq-key": replay.key, "dlq-retry-count": str(replay.retry_count)}
    headers = [(name, value) for name, value in kept.headers if not name.startswith(_REPLAY)]
    return Outgoing(
        kept.key,
        kept.value if replay.value is None else replay.value,
        [*headers, *((name, value.encode()) for name, value in ours.items())],
    )
