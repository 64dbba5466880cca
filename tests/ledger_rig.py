"""A ledger with a queue in it, on SQLite or Postgres, and builders of its rows."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Self

from sqlalchemy import Connection, insert, select, text

from dlq import clock
from dlq.ledger import Ledger, lease
from dlq.ledger import jobs as ledger_jobs
from dlq.ledger.jobs import Cut
from dlq.ledger.schema import UNSETTLED, entry, grp, segment, source

QUEUE, DRAIN, TARGET = "orders", "orders-000000000001", "orders.topic"
NEED_A_JOB = ("planned", "sending", "replayed", "confirmed", "returned", "handed_back")


def sha(text_: str) -> str:
    return hashlib.sha256(text_.encode()).hexdigest()


class LedgerRig:
    """One queue, held by one drain, with entries in whatever state a test wants."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.ledger = Ledger.open(url)
        self.epoch = self.acquire()
        with self.write() as tx:
            values = {"queue": QUEUE, "uri": "kafka:c/t", "seen_at": clock.now()}
            self.source = int(tx.execute(insert(source).values(**values).returning(source.c.id)).scalar_one())
            self.segment = int(
                tx.execute(
                    insert(segment)
                    .values(queue=QUEUE, uri="segments/x.parquet", sha256=sha("x"), rows=1, kind="intake")
                    .returning(segment.c.id)
                ).scalar_one()
            )
            self.group = int(
                tx.execute(
                    insert(grp)
                    .values(
                        queue=QUEUE,
                        fingerprint="v1:1",
                        signature="s",
                        component="c",
                        error_type="TransientNetwork",
                        category="transient",
                        remedy="retry",
                        rule="network",
                        format="orchestrator",
                        owner="on-call",
                    )
                    .returning(grp.c.id)
                ).scalar_one()
            )
        self._pos = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.ledger.close()

    def acquire(self, holder: str = DRAIN, **how: Any) -> int:
        settings = {"run_id": holder, "kind": "drain", "seconds": 300.0, "config": "{}", **how}
        return lease.acquire(self.ledger, QUEUE, holder, **settings)

    def write(self, epoch: int | None = None) -> AbstractContextManager[Connection]:
        return self.ledger.write(QUEUE, epoch)

    def read_tx(self) -> AbstractContextManager[Connection]:
        return self.ledger.read()

    def entry(self, state: str = "open", **values: Any) -> int:
        """A row of the ledger; returns its id."""
        pos = self._pos
        self._pos += 1
        row = {
            "queue": QUEUE,
            "source": self.source,
            "part": 0,
            "place": str(pos),
            "pos": pos,
            "taken_drain": DRAIN,
            "segment": self.segment,
            "row_no": 0,
            "payload_sha": sha(f"payload {pos}"),
            "size": 10,
            "state": state,
            "reason": "ready" if state == "open" else "as a test made it",
            "grp": self.group,
            "target": TARGET,
            "settled_drain": None if state in UNSETTLED else DRAIN,
            **values,
        }
        if state in NEED_A_JOB and "job" not in values:
            row["job"] = self.job()
        with self.write() as tx:
            return int(tx.execute(insert(entry).values(**row).returning(entry.c.id)).scalar_one())

    def entries(self, count: int, **values: Any) -> list[int]:
        return [self.entry(**values) for _ in range(count)]

    def job(self, *entries: int, state: str = "approved", **cut: Any) -> str:
        """A job of a plan of its own over ``entries`` (those in states that need one get an empty one)."""
        jobs = self.plan(list(entries), **cut)
        if entries and state != "proposed":
            self.approve(jobs[0])
        return jobs[0]

    def plan(
        self, *cuts: Sequence[int], stage: str = "retry_transient", expires_s: float = 600, **cut: Any
    ) -> list[str]:
        """Propose a plan of one job for each of ``cuts``; returns its jobs. Without any entry, a job that has none."""
        if not any(cuts):
            return [self._empty_job()]
        plan_id = ledger_jobs.propose(
            self.ledger,
            QUEUE,
            self.epoch,
            DRAIN,
            stage,
            [Cut(TARGET, [self.line(e) for e in ids], **cut) for ids in cuts],
            expires_s=expires_s,
        )
        return [row[0] for row in self.rows("SELECT id FROM job WHERE plan = :p ORDER BY id", p=plan_id)]

    def _empty_job(self) -> str:
        number = self.one("SELECT COUNT(*) FROM job") + 1
        plan_id, job_id = f"{DRAIN}.p{number}x", f"{DRAIN}.{number}x"
        self.execute(
            "INSERT INTO plan (id, queue, drain, stage, hash, proposed_at, expires_at) "
            "VALUES (:i, :q, :d, 'x', :i, 't', 't')",
            i=plan_id,
            q=QUEUE,
            d=DRAIN,
        )
        self.execute(
            "INSERT INTO job (id, queue, plan, drain, kind, target, size, state) "
            "VALUES (:i, :q, :p, :d, 'replay', :t, 0, 'running')",
            i=job_id,
            q=QUEUE,
            p=plan_id,
            d=DRAIN,
            t=TARGET,
        )
        return job_id

    def line(self, entry_id: int) -> tuple[Any, ...]:
        with self.ledger.read() as tx:
            row = tx.execute(
                select(
                    entry.c.id,
                    source.c.uri,
                    entry.c.part,
                    entry.c.place,
                    entry.c.segment,
                    entry.c.row_no,
                    entry.c.payload_sha,
                )
                .join(source, source.c.id == entry.c.source)
                .where(entry.c.id == entry_id)
            ).one()
            return tuple(row)

    def approve(self, job_id: str, plan_hash: str | None = None) -> None:
        plan_id, hash_ = self.one(
            "SELECT plan, (SELECT hash FROM plan WHERE id = job.plan) FROM job WHERE id = :j", j=job_id
        )
        ledger_jobs.approve(self.ledger, QUEUE, self.epoch, plan_id, plan_hash or hash_, self.decision())

    def decision(self, subject: str = "a plan") -> int:
        with self.write() as tx:
            return ledger_jobs.record_decision(tx, QUEUE, "person", "replay", subject, "what they saw", "yes")

    def execute(self, sql: str, **values: Any) -> None:
        with self.write() as tx:
            tx.execute(text(sql), values)

    def rows(self, sql: str, **values: Any) -> list[Any]:
        with self.ledger.read() as tx:
            return list(tx.execute(text(sql), values).all())

    def one(self, sql: str, **values: Any) -> Any:
        (row,) = self.rows(sql, **values)
        return row[0] if len(row) == 1 else tuple(row)

    def state(self, entry_id: int) -> str:
        return str(self.one("SELECT state FROM entry WHERE id = :e", e=entry_id))

    def reason(self, entry_id: int) -> str:
        return str(self.one("SELECT reason FROM entry WHERE id = :e", e=entry_id))
