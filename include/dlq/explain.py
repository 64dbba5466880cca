"""Explain: what a dead letter says and what the taxonomy makes of it; and all the ledger knows of one in custody."""

from __future__ import annotations

from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from sqlalchemy import Connection, func, or_, select

from dlq import returns
from dlq.archive import STORED, Archive, Rows
from dlq.codecs import decode, registry_of
from dlq.config import QueueConfig
from dlq.dedupe import DedupeKeys
from dlq.errors import DlqError
from dlq.export import BadExport, imported
from dlq.grouping.classify import Classifier
from dlq.ledger import Ledger
from dlq.ledger.schema import (
    decision,
    delivery,
    draft,
    drain,
    entry,
    grp,
    job,
    job_entry,
    plan,
    repair,
    repair_failure,
    segment,
    source,
    work,
)
from dlq.ports import Connections
from dlq.redact import redact
from dlq.selection import find_entry


class BadLine(NamedTuple):
    """A line of an export that is none: which, and why, without quoting it."""

    number: int
    why: str


def explained(
    lines: Iterable[bytes], classifier: Classifier, keys: DedupeKeys | None = None
) -> Iterator[dict[str, Any] | BadLine]:
    """For each line of an export, in order, what is understood of it (null where not known); empty lines are passed
    over, and so is a byte order mark.
    """
    for number, line in enumerate(lines, 1):
        line = line.removeprefix(BOM_UTF8) if number == 1 else line
        if not line.strip():
            continue
        try:
            record = imported(line)
        except BadExport as error:
            yield BadLine(number, str(error))
            continue
        what, group = classifier.classify(record)
        if keys is not None:
            keys.fill(record, what)
        yield {
            "format": what.format,
            "origin": {
                "topic": what.origin_topic,
                "queue": what.origin_queue,
                "partition": what.origin_partition,
                "offset": what.origin_offset,
                "timestamp_ms": what.origin_timestamp_ms,
            },
            "failure": {
                "error_type": what.error_type,
                "cause_type": what.cause_type,
                "message": what.message,
                "component": what.component,
                "stage": what.stage,
                "attempts": what.attempts,
            },
            "correlation_id": what.correlation_id,
            "trace_id": what.trace_id,
            "dedupe_key": what.dedupe_key,
            "retry_count": what.retries,
            "pointer": what.pointer,
            "category": group.category,
            "remedy": group.remedy,
            "rule": group.rule,
            "why": classifier.why(record, what),
            "fingerprint": group.fingerprint,
        }


def history(ledger: Ledger, queue: str, reference: str) -> dict[str, Any]:
    """Everything the ledger knows of one entry, without its payload.

    :raises ConfigError: when it has no such entry.
    """
    with ledger.read() as tx:
        number = find_entry(tx, queue, reference)
        row = dict(tx.execute(select(entry).where(entry.c.id == number)).mappings().one())
        uri = tx.execute(select(source.c.uri).where(source.c.id == row["source"])).scalar_one()
        group = dict(tx.execute(select(grp).where(grp.c.id == row["grp"])).mappings().one())
        stored = tx.execute(select(segment.c.uri, segment.c.kind).where(segment.c.id == row["segment"])).one()
        jobs = _jobs(tx, number)
        return {
            "entry": f"{uri}/{row['part']}/{row['place']}",
            "state": row["state"],
            "reason": row["reason"],
            "owner": row["owner"] or group["owner"],
            "target": row["target"],
            "held_until": row["hold_until"],
            "attempts": row["attempts"],
            "size": row["size"],
            "payload_sha": row["payload_sha"],
            "archive": {"segment": stored.uri, "row": row["row_no"], "kind": stored.kind},
            "failed_at": row["failed_at"],
            "expires_at": row["expires_at"],
            "origin": row["origin"],
            "correlation_id": row["correlation_id"],
            "trace_id": row["trace_id"],
            "dedupe_key": row["dedupe_key"],
            "group": {**{k: group[k] for k in _GROUP}, "signature": redact(group["signature"])},
            "taken": _drain(tx, row["taken_drain"]),
            "settled": _drain(tx, row["settled_drain"]),
            "jobs": jobs,
            "drafts": _drafts(tx, number),
            "repairs_failed": _rows(
                tx,
                select(
                    repair.c.id,
                    repair.c.at,
                    repair.c.who,
                    repair.c.patch_sha,
                    repair.c.patch_uri,
                    repair_failure.c.why,
                )
                .join(repair_failure, repair_failure.c.repair == repair.c.id)
                .where(repair_failure.c.entry == number, repair.c.drafted.is_not(None))
                .order_by(repair.c.id),
            ),
            "work": _rows(
                tx,
                select(work.c.id, work.c.reason, work.c.owner, work.c.opened_at, work.c.closed_at).where(
                    work.c.id == row["work"]
                ),
            ),
            "decisions": _decisions(tx, queue, row, uri, {j["plan"] for j in jobs}),
            "came_back_of": _places(tx, entry.c.id == row["return_of"]),
            "came_back_as": _places(tx, entry.c.return_of == number),
            "returns": returns.family(tx, number),
            "twin_of": _places(tx, entry.c.id == row["duplicate_of"]),
            "twins": _places(tx, entry.c.duplicate_of == number),
        }


def encoding(config: QueueConfig, stored: Mapping[str, Any], connections: Connections) -> str:
    """How an entry's value is encoded, in words, and that it can be read; else why not.

    :param stored: its ``archive``, as :func:`history` has it.
    """
    try:
        table = Archive(config.archive, config.name).read(stored["segment"], STORED)
        row = Rows(table, [stored["row"]])[0]
        with registry_of(config, connections) as registry:
            return str(decode(row.value, row.headers, registry).encoding)
    except DlqError as error:
        return f"not read: {error}"


_GROUP = ("id", "fingerprint", "component", "error_type", "category", "remedy", "rule", "format")


def _rows(tx: Connection, statement: Any) -> list[dict[str, Any]]:
    return [dict(row) for row in tx.execute(statement).mappings()]


def _drain(tx: Connection, identity: str | None) -> dict[str, Any] | None:
    found = tx.execute(
        select(
            drain.c.id, drain.c.kind, drain.c.run_id, drain.c.opened_at, drain.c.closed_at, drain.c.verdict
        ).where(drain.c.id == identity)
    ).mappings()
    row = found.first()
    return None if row is None else dict(row)


def _jobs(tx: Connection, number: int) -> list[dict[str, Any]]:
    """Each job that ever held the entry, with where the target says its output went."""
    return _rows(
        tx,
        select(
            job.c.id,
            job.c.kind,
            job.c.target,
            job.c.state,
            job.c.ended,
            job.c.plan,
            plan.c.stage,
            plan.c.hash.label("plan_hash"),
            plan.c.approved_at,
            job_entry.c.ordinal,
            (job_entry.c.ordinal < job.c.cursor).label("passed"),
            job_entry.c.idem_key,
            job_entry.c.payload_sha,
            delivery.c.part.label("sent_to_part"),
            delivery.c.pos.label("sent_to_pos"),
            delivery.c.sent_at,
        )
        .join_from(job_entry, job, job.c.id == job_entry.c.job)
        .join(plan, plan.c.id == job.c.plan)
        .outerjoin(delivery, (delivery.c.job == job.c.id) & (delivery.c.ordinal == job_entry.c.ordinal))
        .where(job_entry.c.entry == number)
        .order_by(plan.c.proposed_at, job.c.id),
    )


def _drafts(tx: Connection, number: int) -> list[dict[str, Any]]:
    """Each value that was to replace the entry's: whose, by which patch (its file lies in the archive), and the job
    that sent it.
    """
    sent = (
        select(func.min(job_entry.c.job))
        .where(
            job_entry.c.entry == draft.c.entry,
            job_entry.c.segment == draft.c.segment,
            job_entry.c.row_no == draft.c.row_no,
        )
        .scalar_subquery()
    )
    return _rows(
        tx,
        select(
            *(draft.c[name] for name in ("id", "at", "who", "payload_sha", "repair")),
            repair.c.patch_sha,
            repair.c.patch_uri,
            sent.label("job"),
        )
        .outerjoin(repair, repair.c.id == draft.c.repair)
        .where(draft.c.entry == number, or_(draft.c.repair.is_(None), repair.c.drafted.is_not(None)))
        .order_by(draft.c.id),
    )


def _decisions(
    tx: Connection, queue: str, row: dict[str, Any], uri: str, plans: set[str]
) -> list[dict[str, Any]]:
    """Decisions on its plans, its work, its drafts, its group, or itself; in the order they were taken."""
    drafts = tx.execute(select(draft.c.id, draft.c.repair).where(draft.c.entry == row["id"])).all()
    subjects = {
        *plans,
        f"entry {uri}/{row['part']}/{row['place']}",
        f"group {row['grp']}",
        *(f"draft {each.id}" for each in drafts),
        *(f"repair {each.repair}" for each in drafts if each.repair is not None),
        *([f"work {row['work']}"] if row["work"] else []),
    }
    return _rows(
        tx,
        select(
            decision.c.id,
            decision.c.at,
            decision.c.who,
            decision.c.kind,
            decision.c.subject,
            decision.c.saw,
            decision.c.choice,
        )
        .where(decision.c.queue == queue, decision.c.subject.in_(subjects))
        .order_by(decision.c.id),
    )


def _places(tx: Connection, condition: Any) -> list[dict[str, Any]]:
    return _rows(
        tx,
        select(source.c.uri.label("source"), entry.c.part, entry.c.place, entry.c.state, entry.c.reason)
        .join(source, source.c.id == entry.c.source)
        .where(condition)
        .order_by(entry.c.id),
    )
