"""Drafts: a value a person wrote to replace an entry's. The original stays; nothing is sent before review says so."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import insert, select

from dlq import clock
from dlq.archive import Archive, Rows, segment_table
from dlq.config import QueueConfig
from dlq.entry import Group, Record, payload_sha
from dlq.envelopes import decode
from dlq.errors import ArchiveError, Refused
from dlq.ledger import Ledger, custody
from dlq.ledger.schema import draft, entry, grp, segment
from dlq.plan import READY
from dlq.selection import find_entry

_NOT_YET = {
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


def edit(config: QueueConfig, reference: str, value: bytes, who: str) -> Draft:
    """Write ``value`` as a draft for the entry ``reference``: same key, headers and place, another value.

    Needs no lease, for nothing of the entry changes.

    :raises ConfigError: when there is no such entry.
    :raises Refused: when the entry does not wait for a person, or can't be edited.
    """
    ledger, archive = Ledger.open(config.ledger), Archive(config.archive, config.name)
    try:
        with ledger.read() as tx:
            number = find_entry(tx, config.name, reference)
            row = tx.execute(
                select(
                    entry.c.part,
                    entry.c.place,
                    entry.c.payload_sha,
                    entry.c.row_no,
                    segment.c.uri,
                    segment.c.sha256,
                    grp,
                )
                .join_from(entry, segment, segment.c.id == entry.c.segment)
                .join(grp, grp.c.id == entry.c.grp)
                .where(entry.c.id == number)
            ).one()
        table, about = archive.verified(row.uri, row.sha256)
        rows = Rows(table)
        stored = rows[row.row_no]
        if rows.payload_sha(row.row_no) != row.payload_sha:
            raise ArchiveError(
                f"archive: segment {row.uri}, row {row.row_no} is not what the ledger says; "
                "restore the archive from a backup"
            )
        if flaw := table["flaw"][row.row_no].as_py():
            raise Refused(
                f"{reference}: {flaw.replace('_', ' ')}: the archive lacks them, a replay of any value would lose them"
            )
        sha = payload_sha(stored.key, value)
        if sha == row.payload_sha:
            raise Refused(f"{reference}: the file holds the value the entry has already; nothing was written")
        record = Record(
            row.part, row.place, stored.pos, stored.key, value, stored.headers, stored.timestamp_ms
        )
        group = Group(**{name: row._mapping[name] for name in Group.__struct_fields__})
        said = {
            "queue": config.name,
            "source": about["source"],
            "draft_of": row.uri,
            "row": row.row_no,
            "ledger": ledger.id,
            "who": who,
        }
        _see_that_it_waits(ledger, number, reference)
        written = archive.write("drafts", segment_table([record], [decode(record)], [group]), said)
        with ledger.write(config.name, None) as tx:
            stored_in = custody.add_segment(tx, config.name, written, "draft")
            made = tx.execute(
                insert(draft)
                .values(entry=number, segment=stored_in, row_no=0, payload_sha=sha, who=who, at=clock.now())
                .returning(draft.c.id)
            ).scalar_one()
    finally:
        ledger.close()
    return Draft(int(made), f"{row.part}/{row.place}", sha, len(stored.value or b""), len(value))


def _see_that_it_waits(ledger: Ledger, number: int, reference: str) -> None:
    with ledger.read() as tx:
        state, reason = tx.execute(select(entry.c.state, entry.c.reason).where(entry.c.id == number)).one()
    if state not in ("open", "ambiguous"):
        raise Refused(f"{reference} is {state}: only an entry that waits for a person can be edited")
    if state == "open" and reason in _NOT_YET:
        raise Refused(f"{reference}: {_NOT_YET[reason]}")
