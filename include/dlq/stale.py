"""The stale guard: on a compacted topic an old value that is sent again would replace its key's newest for good.

Kafka has no conditional write, so what is newer is looked for when a plan is made, and the plan says up to which
offset: nothing keeps a newer record from coming in between.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from sqlalchemy import ColumnElement, and_, select, update

from dlq.drain import Drain
from dlq.errors import ArchiveError
from dlq.ledger.custody import batched
from dlq.ledger.schema import entry, segment

NEWER = "newer_of_its_key"
UNKNOWN = "place_on_target_unknown"
HELD = (NEWER, UNKNOWN)
"""Reasons of entries that only a person sends: the target has a newer record of their key, or nobody can tell, since
their origin is no place on it."""

FREED = "freed by decision"
"""How the reason of an entry begins that a person let go."""

_AT_ONCE = 20_000  # entries looked for in one reading of the target
_KEYS_BYTES = 64 << 20

_Line = tuple[int, bytes, tuple[int, int] | None]  # entry, key, partition and offset on the target


def hold(drain: Drain, condition: ColumnElement[bool]) -> tuple[ColumnElement[bool], str]:
    """Write down which entries of ``condition`` are stale.

    :return: the condition of the others, and in words up to where that was checked, empty where no target is compacted.
    :raises dlq.errors.TargetError: when the target can't be read; nothing of it may be planned then.
    """
    with drain.ledger.read() as tx:
        targets = tx.execute(select(entry.c.target).where(condition).distinct()).scalars().all()
    said = [
        _check(drain, str(t), condition) for t in sorted(filter(None, targets)) if drain.target.compacted(t)
    ]
    if not said:
        return condition, ""
    return and_(condition, entry.c.reason.not_in(HELD)), "; ".join(said)


def _check(drain: Drain, target: str, condition: ColumnElement[bool]) -> str:
    checked: dict[int, int] = {}
    newer = unknown = looked = 0
    for lines in _pages(drain, target, condition):
        since: dict[int, int] = {}
        for _, _, place in lines:
            if place is not None:
                since[place[0]] = min(since.get(place[0], place[1] + 1), place[1] + 1)
        newest, ends = drain.target.newest(target, since, {key for _, key, _ in lines}) if since else ({}, {})
        for part, end in ends.items():  # each entry was checked at least to the least of them
            checked[part] = min(checked.get(part, end), end)
        stale = {
            number: NEWER if place is not None else UNKNOWN
            for number, key, place in lines
            if place is None or newest.get((place[0], key), -1) > place[1]
        }
        _write_down(drain, stale)
        looked += len(lines)
        newer += sum(reason == NEWER for reason in stale.values())
        unknown += sum(reason == UNKNOWN for reason in stale.values())
    said = f"{target}: {newer} of {looked} entries held, their key has a newer record there"
    if unknown:
        said += f"; {unknown} more, their place there is not known"
    if checked:
        said += "; checked to " + ", ".join(f"{part}/{end}" for part, end in sorted(checked.items()))
    drain.note(
        "stale_guard", said, level="warning" if newer or unknown else "info", target=target, held=newer
    )
    return said


def _write_down(drain: Drain, stale: Mapping[int, str]) -> None:
    with drain.ledger.write(drain.queue, drain.epoch) as tx:
        for reason in HELD:
            for some in batched((number for number, why in stale.items() if why == reason), 500):
                ours = and_(entry.c.id.in_(some), entry.c.state == "open")
                tx.execute(update(entry).where(ours).values(reason=reason))


def _pages(drain: Drain, target: str, condition: ColumnElement[bool]) -> Iterator[list[_Line]]:
    """Entries with a key that nobody has let go, as many as fit."""
    ours = and_(condition, entry.c.target == target, entry.c.reason.not_like(f"{FREED}%"))
    last = 0
    while True:
        with drain.ledger.read() as tx:
            rows = tx.execute(
                select(entry.c.id, entry.c.origin, entry.c.row_no, segment.c.uri)
                .join(segment, segment.c.id == entry.c.segment)
                .where(ours, entry.c.id > last)
                .order_by(entry.c.id)
                .limit(_AT_ONCE)
            ).all()
        if not rows:
            return
        lines: list[_Line] = []
        size, keys, uri = 0, None, None
        for row in rows:
            if size > _KEYS_BYTES:
                break
            if row.uri != uri:
                keys, uri = _keys(drain, row.uri), row.uri
            last = row.id
            key = None if keys is None or row.row_no >= len(keys) else keys[row.row_no].as_py()
            if key is not None:  # a compacted topic takes no record without one
                lines.append((row.id, key, _place(row.origin, target)))
                size += len(key)
        yield lines


def _keys(drain: Drain, uri: str) -> Any:
    try:
        return drain.archive.read(uri, ["key"])["key"]
    except ArchiveError as error:  # what can't be read can't be sent either
        drain.note("archive", str(error), level="error")
        return None


def _place(origin: str | None, target: str) -> tuple[int, int] | None:
    """Partition and offset in ``topic/partition/offset@group``, where that is on the target."""
    topic, _, rest = (origin or "").partition("/")
    part, _, offset = rest.partition("@")[0].partition("/")
    return (int(part), int(offset)) if topic == target and part.isdigit() and offset.isdigit() else None
