"""Drafts: a value to replace an entry's, written by a person or made by their repair. The original stays; nothing is
sent before review says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from sqlalchemy import ColumnElement, exists, or_, select

from dlq import clock
from dlq.archive import Archive, Rows, Stored
from dlq.codecs import CodecError, decode, json_text, registry_of
from dlq.codecs.payload import framed
from dlq.config import QueueConfig
from dlq.entry import Headers, payload_sha
from dlq.errors import ArchiveError, Refused
from dlq.ledger import Ledger, custody, insert_rows
from dlq.ledger.schema import draft, entry, repair, segment
from dlq.plan import READY
from dlq.ports import Connections
from dlq.selection import find_entry

if TYPE_CHECKING:
    from dlq.codecs.registry import SchemaRegistry

NOT_YET = {
    "new": "no drain has looked at it yet; run `dlq take`, then see whether it needs a person",
    "returned": "it came back in a drain that is not over; wait for its end",
    **dict.fromkeys(READY, "the next drain replays it as it is"),
}
"""Why an open entry does not wait for a person."""


@dataclass(frozen=True)
class Draft:
    """A draft as it was written; ``sha`` is the payload sum (hex sha256 of key and value) that is approved."""

    id: int
    entry: str
    sha: str
    size_before: int
    size: int


def newest() -> ColumnElement[bool]:
    """Of an entry's drafts the last one; those of a repair that was not written to its end never count."""
    later = draft.alias("later")
    return counts(draft) & ~exists().where(
        later.c.entry == draft.c.entry, later.c.id > draft.c.id, counts(later)
    )


def counts(drafts: Any) -> ColumnElement[bool]:
    whole = select(repair.c.id).where(repair.c.drafted.is_not(None))
    return or_(drafts.c.repair.is_(None), drafts.c.repair.in_(whole))


def edit(config: QueueConfig, reference: str, given: bytes, who: str, connections: Connections) -> Draft:
    """Write a draft for the entry ``reference``: same key, headers and place, another value.

    ``given`` is the whole new value; of one that is compressed or framed for a schema registry it may be the document
    instead, as JSON, which is then encoded as the entry's was. Needs no lease, for nothing of the entry changes.

    :raises ConfigError: when there is no such entry.
    :raises Refused: when the entry does not wait for a person, or can't be edited.
    :raises CodecError: when the schema refuses the value.
    """
    ledger, archive = Ledger.open(config.ledger), Archive(config.archive, config.name)
    try:
        with ledger.read() as tx:
            number = find_entry(tx, config.name, reference)
            row = tx.execute(
                select(
                    *(entry.c[name] for name in ("part", "place", "payload_sha", "row_no")),
                    *(segment.c[name] for name in ("uri", "sha256")),
                )
                .join_from(entry, segment, segment.c.id == entry.c.segment)
                .where(entry.c.id == number)
            ).one()
        table, about = archive.verified(row.uri, row.sha256)
        rows = Rows(table, [row.row_no])
        if rows.payload_sha(0) != row.payload_sha:
            raise ArchiveError(
                f"archive: segment {row.uri}, row {row.row_no} is not what the ledger says; "
                "restore the archive from a backup"
            )
        if flaw := table["flaw"][row.row_no].as_py():
            raise Refused(
                f"{reference}: {flaw.replace('_', ' ')}: the archive lacks them, a replay of any value would lose them"
            )
        with registry_of(config, connections) as registry:
            value = _encoded(rows[0], given, registry)
        if value == rows[0].value:
            raise Refused(f"{reference}: the file holds the value the entry has already; nothing was written")
        _see_that_it_waits(ledger, number, reference)
        sha = payload_sha(rows[0].key, value)
        said = {"source": about["source"], "draft_of": row.uri, "row": row.row_no}
        stored = store(ledger, archive, config.name, table, [(number, row.row_no, value, sha)], said, who)
        with ledger.read() as tx:
            made = tx.execute(select(draft.c.id).where(draft.c.segment == stored)).scalar_one()
    finally:
        ledger.close()
    return Draft(int(made), f"{row.part}/{row.place}", sha, len(rows[0].value or b""), len(value))


def store(
    ledger: Ledger,
    archive: Archive,
    queue: str,
    originals: pa.Table,
    revisions: Sequence[tuple[int, int, bytes | None, str]],
    about: Mapping[str, Any],
    who: str,
    repair_id: int | None = None,
) -> int:
    """Write drafts to the archive and the ledger: each the original's row with another value. Returns their segment.

    :param revisions: (entry, its row of ``originals``, the new value, its payload sum).
    """
    table = originals.take(pa.array([row for _, row, _, _ in revisions], pa.int64()))
    values = pa.array([value for _, _, value, _ in revisions], pa.binary())
    table = table.set_column(table.schema.get_field_index("value"), "value", values)
    written = archive.write("drafts", table, {**about, "queue": queue, "ledger": ledger.id, "who": who})
    now = clock.now()
    with ledger.write(queue, None) as tx:
        stored = custody.add_segment(tx, queue, written, "draft")
        insert_rows(
            tx,
            draft,
            ("entry", "segment", "row_no", "payload_sha", "repair", "who", "at"),
            [
                (number, stored, n, sha, repair_id, who, now)
                for n, (number, _, _, sha) in enumerate(revisions)
            ],
        )
    return stored


def _encoded(stored: Stored, given: bytes, registry: SchemaRegistry | None) -> bytes:
    """What is sent for the value a person gave: itself, or encoded as the entry's was; checked where it can be."""
    try:
        original = decode(stored.value, stored.headers, registry)
    except CodecError as error:  # which may be why the entry is here
        return _in_the_frame_of(stored, given, registry, error)
    if original.encoding.is_bare:
        return given
    try:
        whole = decode(given, stored.headers, registry)
    except CodecError:
        whole = None
    if whole is not None and whole.encoding == original.encoding:
        whole.check()
        return given
    try:
        document = json_text.loads(given)
    except ValueError as error:
        raise Refused(
            f"the entry's value is {original.encoding}, and the file holds neither such a value nor a document as "
            f"JSON ({error})"
        ) from None
    value = original.encode(document)
    assert value is not None, "a null value is bare"
    return value


def _in_the_frame_of(
    stored: Stored, given: bytes, registry: SchemaRegistry | None, error: CodecError
) -> bytes:
    frame = _frame(stored.value, stored.headers)
    if frame is None:
        return given
    if _frame(given, stored.headers) != frame:
        raise Refused(
            f"the entry's value can't be read ({error}), so nothing is encoded like it: give the whole value in the "
            "same frame"
        )
    if registry is not None:
        decode(given, stored.headers, registry)
    return given


def _frame(value: bytes | None, headers: Headers) -> Any:
    try:
        compressions, found = framed(value, headers)
    except CodecError:
        return None
    return (compressions, found and found.schema) if compressions or found else None


def _see_that_it_waits(ledger: Ledger, number: int, reference: str) -> None:
    with ledger.read() as tx:
        state, reason = tx.execute(select(entry.c.state, entry.c.reason).where(entry.c.id == number)).one()
    if state not in ("open", "ambiguous"):
        raise Refused(f"{reference} is {state}: only an entry that waits for a person can be edited")
    if state == "open" and reason in NOT_YET:
        raise Refused(f"{reference}: {NOT_YET[reason]}")
