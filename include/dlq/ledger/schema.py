"""The ledger's tables, the transitions an entry's state may make, and the triggers by which the database holds them.

One database serves any number of queues. Times are ISO 8601 UTC text of one fixed width (so they sort), sums are
hex text. Declared column types matter: without them SQLite's proof loses its indexes.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
    text,
)

VERSION = 2

UNSETTLED = ("open", "planned", "sending", "ambiguous")
SENT = ("replayed", "confirmed", "returned", "handed_back")
SETTLED = (*SENT, "duplicate", "discarded")

CONTESTED = "a dead letter claims to be its replay, but carries something else"
"""Reason of an entry that was replayed: silence proves nothing of it any more, only the orchestrator's word does."""

ALLOWED = {
    ("open", "planned"): "an approved plan locks it",
    ("open", "duplicate"): "its twin was sent",
    ("open", "discarded"): "by a person or a rule",
    ("open", "ambiguous"): "the ledger was rebuilt: what became of it since is not known",
    ("planned", "open"): "skipped, or the job was closed",
    ("planned", "sending"): "marked before a call that is not transactional",
    ("planned", "replayed"): "the job's cursor passed it",
    ("planned", "handed_back"): "the job's cursor passed it",
    ("planned", "ambiguous"): "the job's cursor is gone",
    ("sending", "replayed"): "the target took it",
    ("sending", "handed_back"): "the target took it",
    ("sending", "open"): "the target refused it, certainly",
    ("sending", "ambiguous"): "in doubt",
    ("ambiguous", "replayed"): "evidence, or a person",
    ("ambiguous", "handed_back"): "evidence, or a person",
    ("ambiguous", "open"): "evidence, or a person",
    ("ambiguous", "discarded"): "a person",
    ("replayed", "confirmed"): "its outcome is known to be good",
    ("replayed", "returned"): "its new entry was taken",
    ("confirmed", "returned"): "its new entry was taken late",
}

Id = BigInteger().with_variant(Integer, "sqlite")
metadata = MetaData()


def _states(states: tuple[str, ...]) -> str:
    return ", ".join(f"'{s}'" for s in states)


def _queue() -> Column[str]:
    return Column("queue", Text, ForeignKey("queue.name"), nullable=False)


about = Table(
    "ledger", metadata, Column("version", Integer, nullable=False), Column("id", Text, nullable=False)
)

queue = Table(
    "queue",
    metadata,
    Column("name", Text, primary_key=True),
    Column("epoch", BigInteger, nullable=False, server_default="0"),
    Column("holder", Text),
    Column("lease_until", Text),
    Column("paused_by", Text),
)

source = Table(  # a DLQ as it was seen: a recreated topic is another source
    "source",
    metadata,
    Column("id", Id, primary_key=True),
    _queue(),
    Column("uri", Text, nullable=False, unique=True),
    Column("seen_at", Text, nullable=False),
    Column("retired_at", Text),
)

incident = Table(
    "incident",
    metadata,
    Column("id", Id, primary_key=True),
    _queue(),
    Column("started_at", Text, nullable=False),
    Column("closed_at", Text),
)

drain = Table(  # one row for each holder of the lease
    "drain",
    metadata,
    Column("id", Text, primary_key=True),
    _queue(),
    Column("run_id", Text, nullable=False),
    Column("epoch", BigInteger, nullable=False),
    Column("kind", Text, CheckConstraint("kind IN ('drain','review','restore','cli')"), nullable=False),
    Column("opened_at", Text, nullable=False),
    Column("closed_at", Text),
    Column("config", Text, nullable=False),
    Column("open_before", BigInteger, nullable=False),
    Column("phase", Text),
    Column("incident", Id, ForeignKey("incident.id")),
    Column("verdict", Text),
    UniqueConstraint("queue", "epoch"),
)

intake = Table(  # Kafka: a chain of ranges a partition; the last to_pos is THE position. Never pruned.
    "intake",
    metadata,
    Column("source", Id, ForeignKey("source.id"), primary_key=True),
    Column("part", Integer, primary_key=True),
    Column("round", BigInteger, primary_key=True),
    Column("drain", Text, ForeignKey("drain.id"), nullable=False),
    Column("from_pos", BigInteger),
    Column("cutoff", BigInteger),
    Column("to_pos", BigInteger),
    Column("leader_epoch", Integer),
    Column("again", BigInteger, nullable=False, server_default="0"),  # places read that were rows already
    Column(
        "vanished_max", BigInteger, nullable=False, server_default="0"
    ),  # places retention took unread, at most
    Column(
        "first", Integer, nullable=False, server_default="0"
    ),  # 1: a first intake, whose entries wait for a decision
)

segment = Table(
    "segment",
    metadata,
    Column("id", Id, primary_key=True),
    _queue(),
    Column("uri", Text, nullable=False, unique=True),  # relative to the queue's archive
    Column("sha256", Text, nullable=False),
    Column("rows", BigInteger, nullable=False),
    Column("kind", Text, CheckConstraint("kind IN ('intake','orphan','draft')"), nullable=False),
    Column("purged_at", Text),
)

decision = Table(  # append-only
    "decision",
    metadata,
    Column("id", Id, primary_key=True),
    _queue(),
    Column("at", Text, nullable=False),
    Column("who", Text, nullable=False),
    Column("kind", Text, nullable=False),
    Column("subject", Text, nullable=False),
    Column("saw", Text, nullable=False),
    Column("choice", Text, nullable=False),
    Column("drain", Text, ForeignKey("drain.id")),
)

grp = Table(  # a failure's signature with what the taxonomy made of it
    "grp",
    metadata,
    Column("id", Id, primary_key=True),
    _queue(),
    Column("fingerprint", Text, nullable=False),
    Column("signature", Text, nullable=False),
    Column("component", Text, nullable=False),
    Column("error_type", Text, nullable=False),
    Column(
        "category",
        Text,
        CheckConstraint("category IN ('transient','permanent','manual','unknown')"),
        nullable=False,
    ),
    Column("remedy", Text, nullable=False),
    Column("rule", Text, nullable=False),
    Column("format", Text, nullable=False),
    Column("owner", Text, nullable=False),
    UniqueConstraint("queue", "fingerprint", "component", "category", "remedy", "rule", "format"),
)

work = Table(  # filed work for people
    "work",
    metadata,
    Column("id", Id, primary_key=True),
    _queue(),
    Column("grp", Id, ForeignKey("grp.id"), nullable=False),
    Column("reason", Text, nullable=False),
    Column("owner", Text, nullable=False),
    Column("opened_at", Text, nullable=False),
    Column("closed_at", Text),
)

plan = Table(
    "plan",
    metadata,
    Column("id", Text, primary_key=True),  # <drain>.p<n>
    _queue(),
    Column("drain", Text, ForeignKey("drain.id"), nullable=False),
    Column("stage", Text, nullable=False),  # the task that made it
    Column("hash", Text, nullable=False, unique=True),
    Column("proposed_at", Text, nullable=False),
    Column("expires_at", Text, nullable=False),  # an approval after it starts nothing
    Column("decision", Id, ForeignKey("decision.id")),
    Column("approved_at", Text),
    Column("withdrawn_at", Text),
)

job = Table(
    "job",
    metadata,
    Column("id", Text, primary_key=True),  # <drain>.<n>
    _queue(),
    Column("plan", Text, ForeignKey("plan.id"), nullable=False),
    Column("drain", Text, ForeignKey("drain.id"), nullable=False),
    Column("kind", Text, CheckConstraint("kind IN ('replay','hand_back')"), nullable=False),
    Column("canary", Integer, nullable=False, server_default="0"),
    Column("target", Text, nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("cursor", BigInteger, nullable=False, server_default="0"),
    Column("writer", Text),  # the try that writes it now: an older one never opens the target again
    Column("target_from", Text),  # the target's end offsets when the job began, JSON by partition
    Column(
        "state", Text, CheckConstraint("state IN ('proposed','approved','running','closed')"), nullable=False
    ),
    Column("ended", Text),  # why it was closed: done, or the reason it stopped
    CheckConstraint("cursor BETWEEN 0 AND size"),
)

entry = Table(
    "entry",
    metadata,
    Column("id", Id, primary_key=True),
    _queue(),
    Column("source", Id, ForeignKey("source.id"), nullable=False),
    Column("part", Integer, nullable=False),
    Column("place", Text, nullable=False),  # offset or MessageId
    Column("pos", BigInteger),
    Column("taken_drain", Text, ForeignKey("drain.id"), nullable=False),
    Column("segment", Id, ForeignKey("segment.id"), nullable=False),
    Column("row_no", Integer, nullable=False),
    Column("payload_sha", Text, nullable=False),
    Column("size", Integer, nullable=False),  # bytes of key and value
    Column(
        "state",
        Text,
        CheckConstraint(f"state IN ({_states((*UNSETTLED, *SETTLED))})"),
        nullable=False,
        server_default="open",
    ),
    Column("reason", Text, nullable=False, server_default="new"),
    Column("grp", Id, ForeignKey("grp.id"), nullable=False),
    Column("owner", Text),
    Column("work", Id, ForeignKey("work.id")),
    Column("hold_until", Text),
    Column("job", Text, ForeignKey("job.id")),
    Column("settled_drain", Text, ForeignKey("drain.id")),
    Column("target", Text),  # the target its origin selects, None where none is allowed
    Column("correlation_id", Text),
    Column("trace_id", Text),
    Column("dedupe_key", Text),
    Column("origin", Text),  # topic/partition/offset@group
    Column("key_hash", Text),  # of the record's key, where order within a key is to hold
    Column("failed_at", Text),
    Column("expires_at", Text),  # when retention would have deleted it
    Column("attempts", Integer, nullable=False, server_default="0"),  # replays before this entry
    Column("return_of", Id, ForeignKey("entry.id")),
    Column("duplicate_of", Id, ForeignKey("entry.id")),
    UniqueConstraint("source", "part", "place"),
    CheckConstraint("duplicate_of <> id"),
    CheckConstraint("return_of <> id"),
    CheckConstraint(
        "job IS NOT NULL OR state NOT IN ('planned','sending','replayed','confirmed','returned','handed_back')"
    ),
    CheckConstraint(f"(settled_drain IS NULL) = (state IN ({_states(UNSETTLED)}))"),
)

job_entry = Table(  # frozen; segment and row_no are the revision to send
    "job_entry",
    metadata,
    Column("job", Text, ForeignKey("job.id"), primary_key=True),
    Column("ordinal", BigInteger, primary_key=True),
    Column("entry", Id, ForeignKey("entry.id"), nullable=False),
    Column("segment", Id, ForeignKey("segment.id"), nullable=False),
    Column("row_no", Integer, nullable=False),
    Column("payload_sha", Text, nullable=False),
    Column("idem_key", Text, nullable=False),
    UniqueConstraint("job", "entry"),
    sqlite_with_rowid=False,
)

delivery = Table(  # what the target said of each ordinal that was sent
    "delivery",
    metadata,
    Column("job", Text, primary_key=True),
    Column("ordinal", BigInteger, primary_key=True),
    Column("part", Integer),
    Column("pos", BigInteger),
    Column("ref", Text),
    Column("sent_at", Text, nullable=False),  # without a place or ref: when it was about to be sent
    sqlite_with_rowid=False,
)

repair = Table(  # one change for many entries
    "repair",
    metadata,
    Column("id", Id, primary_key=True),
    _queue(),
    Column("who", Text, nullable=False),
    Column("at", Text, nullable=False),
    Column("chosen", Text, nullable=False),  # which entries, in words
    Column("patch_sha", Text, nullable=False),
    Column("patch_uri", Text, nullable=False),  # relative to the queue's archive
    Column("drafted", BigInteger),  # None: not all drafts are written, none of them counts
    Column("unchanged", BigInteger),
    Column("failed", BigInteger),
    Column("sample", Text),  # JSON: what changes in a few entries, without their values
)

repair_failure = Table(  # what a repair could not be made of, and why
    "repair_failure",
    metadata,
    Column("repair", Id, ForeignKey("repair.id"), primary_key=True),
    Column("entry", Id, ForeignKey("entry.id"), primary_key=True),
    Column("why", Text, nullable=False),
    sqlite_with_rowid=False,
)

draft = Table(  # a value to replace an entry's, written by a person or by their repair; the newest counts
    "draft",
    metadata,
    Column("id", Id, primary_key=True),
    Column("entry", Id, ForeignKey("entry.id"), nullable=False),
    Column("segment", Id, ForeignKey("segment.id"), nullable=False),
    Column("row_no", Integer, nullable=False),
    Column("payload_sha", Text, nullable=False),
    Column("repair", Id, ForeignKey("repair.id")),
    Column("who", Text, nullable=False),
    Column("at", Text, nullable=False),
)

event = Table(  # a drain's timeline, for the report
    "event",
    metadata,
    Column("id", Id, primary_key=True),
    Column("drain", Text, ForeignKey("drain.id"), nullable=False),
    Column("at", Text, nullable=False),
    Column("stage", Text, nullable=False),
    Column("level", Text, CheckConstraint("level IN ('info','warning','error')"), nullable=False),
    Column("text", Text, nullable=False),
    Column("data", Text, nullable=False),  # JSON, no payloads
)

allowed = Table(
    "allowed",
    metadata,
    Column("from_state", Text, primary_key=True),
    Column("to_state", Text, primary_key=True),
)


def _partial(name: str, *columns: str, where: str) -> None:
    Index(name, *(entry.c[c] for c in columns), sqlite_where=text(where), postgresql_where=text(where))


_partial("entry_todo", "queue", "grp", where="settled_drain IS NULL")
_partial("entry_job", "job", where="job IS NOT NULL")
_partial("entry_dedupe", "dedupe_key", where="dedupe_key IS NOT NULL")
_partial("entry_origin", "origin", where="origin IS NOT NULL")
_partial("entry_order", "queue", "key_hash", where="key_hash IS NOT NULL AND settled_drain IS NULL")
_partial("entry_return", "return_of", where="return_of IS NOT NULL")
_partial("entry_twin", "duplicate_of", where="duplicate_of IS NOT NULL")
Index("delivery_place", delivery.c.part, delivery.c.pos)
Index(
    "delivery_ref",
    delivery.c.ref,
    sqlite_where=text("ref IS NOT NULL"),
    postgresql_where=text("ref IS NOT NULL"),
)
Index("event_drain", event.c.drain)
Index("draft_entry", draft.c.entry)
Index("draft_repair", draft.c.repair)
Index("repair_failure_entry", repair_failure.c.entry)

# (name, event, table, condition on OLD/NEW, message): held by the database, whoever writes.
_GUARDS = (
    (
        "entry_state",
        "UPDATE OF state",
        "entry",
        "OLD.state <> NEW.state AND NOT EXISTS (SELECT 1 FROM allowed WHERE from_state = OLD.state AND "
        "to_state = NEW.state)",
        "transition not allowed",
    ),
    ("entry_keep", "DELETE", "entry", "OLD.settled_drain IS NULL", "an unsettled entry is never deleted"),
    ("decision_keep", "UPDATE", "decision", "TRUE", "decisions are append-only"),
    ("decision_stay", "DELETE", "decision", "TRUE", "decisions are append-only"),
    ("job_entry_keep", "UPDATE", "job_entry", "TRUE", "a plan is frozen"),
    (
        "job_entry_stay",
        "DELETE",
        "job_entry",
        "EXISTS (SELECT 1 FROM entry WHERE id = OLD.entry AND settled_drain IS NULL)",
        "a plan is frozen",
    ),
    (
        "job_entry_full",
        "INSERT",
        "job_entry",
        "NOT EXISTS (SELECT 1 FROM job WHERE id = NEW.job AND state = 'proposed')",
        "a plan is frozen",
    ),
    ("job_forward", "UPDATE OF cursor", "job", "NEW.cursor < OLD.cursor", "a cursor never goes back"),
    ("intake_stay", "DELETE", "intake", "TRUE", "positions are never pruned"),
    (
        "intake_forward",
        "UPDATE OF to_pos",
        "intake",
        "NEW.to_pos < OLD.to_pos",
        "a position never goes back",
    ),
)


def triggers(dialect: str) -> list[str]:
    """The DDL of the guards for ``sqlite`` or ``postgresql``."""
    statements: list[str] = []
    for name, when, table, condition, message in _GUARDS:
        if dialect == "sqlite":
            condition = condition.replace("TRUE", "1")
            statements.append(
                f"CREATE TRIGGER {name} BEFORE {when} ON {table} WHEN {condition} BEGIN SELECT RAISE(ABORT, "
                f"'{message}'); END"
            )
            continue
        # Postgres allows no subquery in a trigger's WHEN: the condition is tested in the function.
        outcome = "OLD" if when == "DELETE" else "NEW"
        statements.append(
            f"CREATE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN IF {condition} THEN "
            f"RAISE EXCEPTION '{message}' USING ERRCODE = 'integrity_constraint_violation'; END IF; RETURN "
            f"{outcome}; END $$"
        )
        statements.append(
            f"CREATE TRIGGER {name} BEFORE {when} ON {table} FOR EACH ROW EXECUTE FUNCTION {name}()"
        )
    return statements
