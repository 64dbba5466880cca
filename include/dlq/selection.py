"""Which entries a person means: one by its place, or many by group, drain, time of taking."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime

from sqlalchemy import ColumnElement, Connection, and_, or_, select, true

from dlq import clock
from dlq.errors import ConfigError
from dlq.ledger.schema import drain, entry, grp, source


def find_entry(tx: Connection, queue: str, reference: str) -> int:
    """The row of ``<part>/<place>`` (of the queue's present source) or ``<source>/<part>/<place>``.

    :raises ConfigError: when the ledger has no such entry.
    """
    uri, part, place = _parsed(reference)
    rows = tx.execute(
        select(entry.c.id, source.c.uri, source.c.retired_at)
        .join(source, source.c.id == entry.c.source)
        .where(
            entry.c.queue == queue,
            entry.c.part == part,
            entry.c.place == place,
            source.c.uri == uri if uri else true(),
        )
        .order_by(source.c.retired_at.is_not(None), source.c.id.desc())
    ).all()
    if not rows:
        raise ConfigError(
            f"queue {queue} has no entry {reference} in custody (a place is written <partition>/<offset>); "
            f"`dlq sample {queue}` shows what is still in the queue"
        )
    live = [row for row in rows if row.retired_at is None]
    if not live and len(rows) > 1:
        known = ", ".join(f"{row.uri}/{part}/{place}" for row in rows)
        raise ConfigError(f"entry {reference} of queue {queue} is one of several; write which: {known}")
    return int((live or rows)[0].id)


def _parsed(reference: str) -> tuple[str, int, str]:
    uri, part, place = ["", "", *reference.rsplit("/", 2)][-3:]
    if not part.isdigit() or not place:
        raise ConfigError(f"{reference!r} is no entry: write <partition>/<offset>, such as 0/1234")
    return uri, int(part), place


@dataclass(frozen=True)
class Selection:
    """What to choose among a queue's entries; several kinds narrow, several values of one kind widen.

    ``since`` and ``until`` bound the moment the drain that took the entry was opened.
    """

    entries: Sequence[str] = ()
    groups: Sequence[int] = ()
    drains: Sequence[str] = ()
    since: datetime | None = None
    until: datetime | None = None
    everything: bool = field(default=False)

    @property
    def is_empty(self) -> bool:
        return not (self.entries or self.groups or self.drains or self.since or self.until or self.everything)

    def condition(self, tx: Connection, queue: str) -> ColumnElement[bool]:
        """The selection as a condition on ``entry``.

        :raises ConfigError: when it names an entry, group or drain the ledger doesn't have.
        """
        wanted: list[ColumnElement[bool]] = [entry.c.queue == queue]
        if self.entries:
            wanted.append(entry.c.id.in_([find_entry(tx, queue, each) for each in self.entries]))
        if self.groups:
            known = set(tx.execute(select(grp.c.id).where(grp.c.queue == queue)).scalars())
            if unknown := sorted(set(self.groups) - known):
                raise ConfigError(f"queue {queue} has no group {unknown[0]}; `dlq status {queue}` lists them")
            wanted.append(entry.c.grp.in_(self.groups))
        if self.drains:
            known_drains = set(tx.execute(select(drain.c.id).where(drain.c.queue == queue)).scalars())
            if missing := sorted(set(self.drains) - known_drains):
                raise ConfigError(
                    f"queue {queue} has no drain {missing[0]}; `dlq status {queue}` names the last one"
                )
            wanted.append(or_(entry.c.taken_drain.in_(self.drains), entry.c.settled_drain.in_(self.drains)))
        if self.since or self.until:
            taken = select(drain.c.id).where(drain.c.queue == queue)
            if self.since:
                taken = taken.where(drain.c.opened_at >= clock.iso(self.since))
            if self.until:
                taken = taken.where(drain.c.opened_at < clock.iso(self.until))
            wanted.append(entry.c.taken_drain.in_(taken))
        return and_(*wanted)
