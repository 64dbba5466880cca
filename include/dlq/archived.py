"""Entries as they lie in the archive: the bytes of those that a person chose."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sqlalchemy import Connection, func, select

from dlq.archive import Archive, Rows, Stored
from dlq.config import KafkaSource, QueueConfig
from dlq.errors import ArchiveError
from dlq.ledger import Ledger
from dlq.ledger.schema import drain as drains
from dlq.ledger.schema import entry, segment, source
from dlq.selection import Selection

_PAGE = 4_000


@dataclass(frozen=True, slots=True)
class Archived:
    """An archived entry: its row in the ledger, its place, the topic it lay in, its bytes."""

    number: int
    reference: str
    topic: str | None
    flawed: bool
    stored: Stored


def archived(config: QueueConfig, chosen: Selection) -> Iterator[tuple[Archived, int]]:
    """The chosen entries in order of intake, each with how many there are in all; every segment's sum is checked.

    :raises ArchiveError: when the archive's bytes are not those taken.
    """
    ledger, archive = Ledger.open(config.ledger), Archive(config.archive, config.name)
    topics: dict[str, str | None] = {}
    try:
        with ledger.read() as tx:
            condition = chosen.condition(tx, config.name)
            total = int(tx.execute(select(func.count()).select_from(entry).where(condition)).scalar_one())
        last, held, rows, flaws = 0, None, None, None
        while True:
            with ledger.read() as tx:
                page = tx.execute(
                    select(
                        entry.c.id,
                        entry.c.part,
                        entry.c.place,
                        entry.c.row_no,
                        entry.c.payload_sha,
                        entry.c.taken_drain,
                        segment.c.uri,
                        segment.c.sha256,
                        source.c.uri.label("source"),
                    )
                    .join(segment, segment.c.id == entry.c.segment)
                    .join(source, source.c.id == entry.c.source)
                    .where(condition, entry.c.id > last)
                    .order_by(entry.c.id)
                    .limit(_PAGE)
                ).all()
                for name in {row.taken_drain for row in page} - topics.keys():
                    topics[name] = _topic(tx, name)
            if not page:
                return
            for one in page:
                if one.uri != held:
                    table, _ = archive.verified(one.uri, one.sha256)
                    held, rows, flaws = one.uri, Rows(table), table["flaw"].to_pylist()
                assert rows is not None
                assert flaws is not None
                if rows.payload_sha(one.row_no) != one.payload_sha:
                    raise ArchiveError(
                        f"archive: segment {one.uri}, row {one.row_no} is not what the ledger says; "
                        "restore the archive from a backup"
                    )
                reference = f"{one.source}/{one.part}/{one.place}"
                flawed = bool(flaws[one.row_no])
                yield Archived(one.id, reference, topics[one.taken_drain], flawed, rows[one.row_no]), total
            last = page[-1].id
    finally:
        ledger.close()


def _topic(tx: Connection, drain: str) -> str | None:
    """The name the topic had when ``drain`` took from it."""
    frozen = QueueConfig.thaw(
        tx.execute(select(drains.c.config).where(drains.c.id == drain)).scalar_one(), drain
    )
    return frozen.source.topic if isinstance(frozen.source, KafkaSource) else None
