"""Search: entries in custody by what they carry, in key, headers or value, whatever the value is encoded with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy import select

from dlq.archive import Stored
from dlq.archived import archived
from dlq.codecs import CodecError, RegistryError, decode, registry_of
from dlq.config import QueueConfig
from dlq.envelopes import JsonPath
from dlq.ledger import Ledger
from dlq.ledger.schema import entry, grp
from dlq.ports import Connections
from dlq.selection import Selection

if TYPE_CHECKING:  # its client takes a second to import, and few queues have one
    from dlq.codecs.registry import SchemaRegistry


@dataclass(frozen=True)
class Found:
    """``matched`` names where the text is: the key, a header, the value or the path."""

    place: str
    state: str
    reason: str | None
    group: int
    error_type: str
    correlation_id: str | None
    matched: str


@dataclass(frozen=True)
class Search:
    """``more``: there are others beyond those asked for. ``unread`` values could only be searched as bytes."""

    found: list[Found]
    more: bool
    unread: int


def search(
    config: QueueConfig,
    chosen: Selection,
    text: str,
    path: JsonPath | None,
    connections: Connections,
    most: int,
    progress: Callable[[int, int], None],
) -> Search:
    """The first ``most`` of the chosen entries that carry ``text``, in order of intake.

    :param path: the value must have the text there, and nothing else; without it, it may be anywhere in the entry.
    :raises dlq.errors.ArchiveError: when the archive's bytes are not those taken.
    """
    hits: list[tuple[int, str]] = []
    done = unread = 0
    with registry_of(config, connections) as registry:
        for row, total in archived(config, chosen):
            matched, read = _matched(row.stored, text, path, registry)
            unread += not read
            done += 1
            progress(done, total)
            if matched is not None and len(hits) == most:
                return Search(_told(config, hits), True, unread)
            if matched is not None:
                hits.append((row.number, matched))
    return Search(_told(config, hits), False, unread)


def _matched(
    stored: Stored, text: str, path: JsonPath | None, registry: SchemaRegistry | None
) -> tuple[str | None, bool]:
    """Where the text is, and whether the value could be read."""
    raw = text.encode()
    if path is None:
        if raw in (stored.key or b""):
            return "key", True
        for name, value in stored.headers:
            if raw in (value or b""):
                return f"header {name}", True
    try:
        document = decode(stored.value, stored.headers, registry).document
    except (CodecError, RegistryError):
        return ("value" if path is None and raw in (stored.value or b"") else None), False
    if path is not None:
        return ("value" if path.among(document) == text else None), True
    return ("value" if any(text in leaf for leaf in _leaves(document)) else None), True


def _leaves(document: Any) -> Iterator[str]:
    """All names and values of a document, as text."""
    left = [document]
    while left:
        one = left.pop()
        if isinstance(one, dict):
            left.extend(one.keys())
            left.extend(one.values())
        elif isinstance(one, list):
            left.extend(one)
        elif isinstance(one, bytes):
            yield one.decode("utf-8", "replace")
        elif one is not None:
            yield str(one)


def _told(config: QueueConfig, hits: Sequence[tuple[int, str]]) -> list[Found]:
    ledger = Ledger.open(config.ledger)
    try:
        with ledger.read() as tx:
            rows = {
                row.id: row
                for row in tx.execute(
                    select(
                        entry.c.id,
                        entry.c.part,
                        entry.c.place,
                        entry.c.state,
                        entry.c.reason,
                        entry.c.grp,
                        grp.c.error_type,
                        entry.c.correlation_id,
                    )
                    .join(grp, grp.c.id == entry.c.grp)
                    .where(entry.c.id.in_([number for number, _ in hits]))
                )
            }
    finally:
        ledger.close()
    return [
        Found(
            f"{(row := rows[number]).part}/{row.place}",
            row.state,
            row.reason,
            row.grp,
            row.error_type,
            row.correlation_id,
            matched,
        )
        for number, matched in hits
    ]
