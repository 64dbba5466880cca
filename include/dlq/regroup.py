"""Merge and split groups: decisions of people, append-only, honoured whenever an entry is classified.

A merge says that two groups are one failure: what would come into the first goes into the second, and is handled as
that is. A split takes those of a group whose message a regular expression is found in for a group of their own. What
is open in custody follows when the queue is categorized next. The newest decision on a group counts.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping

from sqlalchemy import ColumnElement, Connection, func, select, update

from dlq.drain import Drain
from dlq.entry import Group
from dlq.errors import ConfigError
from dlq.grouping.regrouping import Regrouping
from dlq.ledger import Ledger, custody
from dlq.ledger.jobs import record_decision
from dlq.ledger.schema import decision, entry, event, grp, segment
from dlq.ledger.schema import drain as drains

_MERGE, _SPLIT, _KEEP = "merge", "split", "keep"
_SUBJECT = "group "
_STAGE = "regroup"
_LONGEST = 500
# An entry that waits for what its group's remedy needs waits for what its new group's needs.
_OF_REMEDY = ("new", "ready", "waiting_for_fix", "waiting_for_person", "hold")


def merge(ledger: Ledger, queue: str, number: int, into: int, *, who: str, why: str) -> int:
    """Decide that group ``number`` is the failure that group ``into`` is; returns the decision's number.

    :raises ConfigError: when there is no such group, or ``into`` goes into ``number`` already.
    """
    with ledger.write(queue, None) as tx:
        saw = f"{_seen(tx, queue, number)}; {_seen(tx, queue, into)}; {why}"
        groups, merges = _groups(tx, (number, into)), dict(decided(tx, queue).merges)
        at = groups[into].fingerprint
        while at != groups[number].fingerprint and at in merges:
            at = merges.pop(at).fingerprint
        if at == groups[number].fingerprint:
            raise ConfigError(f"group {into} is or goes into group {number}: a group can't go into itself")
        return record_decision(tx, queue, who, _MERGE, f"{_SUBJECT}{number}", saw, f"{_SUBJECT}{into}")


def split(ledger: Ledger, queue: str, number: int, pattern: str, *, who: str, why: str) -> int:
    """Decide that what of group ``number`` has ``pattern`` in its message is a failure of its own; returns the
    decision's number.

    :raises ConfigError: when there is no such group, or ``pattern`` is no regular expression.
    """
    if not 0 < len(pattern) <= _LONGEST:
        raise ConfigError(f"a pattern has 1 to {_LONGEST} characters, this one has {len(pattern)}")
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{pattern!r} is not a regular expression: {error}") from None
    with ledger.write(queue, None) as tx:
        saw = f"{_seen(tx, queue, number)}; {why}"
        return record_decision(tx, queue, who, _SPLIT, f"{_SUBJECT}{number}", saw, pattern)


def keep(ledger: Ledger, queue: str, number: int, *, who: str, why: str) -> int:
    """Take back what was decided of group ``number``, for entries that come from now on; returns the decision's number.

    :raises ConfigError: when there is no such group.
    """
    with ledger.write(queue, None) as tx:
        saw = f"{_seen(tx, queue, number)}; {why}"
        return record_decision(tx, queue, who, _KEEP, f"{_SUBJECT}{number}", saw, "as it is")


def decided(tx: Connection, queue: str) -> Regrouping:
    """What people decided of a queue's groups so far."""
    merged: dict[int, int] = {}
    split: dict[int, list[str]] = defaultdict(list)
    rows = tx.execute(
        select(decision.c.kind, decision.c.subject, decision.c.choice)
        .where(_decisions(queue))
        .order_by(decision.c.id)
    )
    for kind, subject, choice in rows:
        number = int(subject.removeprefix(_SUBJECT))
        if kind == _MERGE:
            merged[number] = int(choice.removeprefix(_SUBJECT))
        elif kind == _SPLIT:
            split[number].append(choice)
        else:
            merged.pop(number, None)
            split.pop(number, None)
    groups = _groups(tx, {*merged, *merged.values(), *split})
    return Regrouping(
        {groups[number].fingerprint: groups[into] for number, into in merged.items()},
        {groups[number].fingerprint: [re.compile(p) for p in patterns] for number, patterns in split.items()},
    )


def regrouping(drain: Drain) -> Regrouping:
    """The same, for a drain's queue."""
    with drain.ledger.read() as tx:
        return decided(tx, drain.queue)


def apply(drain: Drain) -> int:
    """Move open entries in custody to the groups that people decided on since this was done last; returns how many."""
    with drain.ledger.read() as tx:
        newest = tx.execute(select(func.max(decision.c.id)).where(_decisions(drain.queue))).scalar()
        if newest is None or newest <= _applied(tx, drain.queue):
            return 0
        decisions = decided(tx, drain.queue)
        names = {*decisions.merges, *decisions.splits}
        numbers = tx.execute(
            select(grp.c.id).where(grp.c.queue == drain.queue, grp.c.fingerprint.in_(names))
        ).scalars()
        groups = _groups(tx, [int(number) for number in numbers])
    moved = 0
    for number, group in groups.items():
        if group.fingerprint in decisions.splits:
            moved += _moved_by_message(drain, number, group, decisions)
        else:
            moved += _moved(drain, group, decisions.regrouped(group, None), entry.c.grp == number)
    drain.note(
        _STAGE,
        f"{moved} open entries follow what people decided of their groups",
        decision=newest,
        moved=moved,
    )
    return moved


def _decisions(queue: str) -> ColumnElement[bool]:
    return (decision.c.queue == queue) & decision.c.kind.in_((_MERGE, _SPLIT, _KEEP))


def _applied(tx: Connection, queue: str) -> int:
    """The newest decision that was applied to custody."""
    found = tx.execute(
        select(event.c.data)
        .join(drains, drains.c.id == event.c.drain)
        .where(drains.c.queue == queue, event.c.stage == _STAGE)
        .order_by(event.c.id.desc())
        .limit(1)
    ).scalar()
    return int(json.loads(found)["decision"]) if found else 0


def _groups(tx: Connection, numbers: Iterable[int]) -> Mapping[int, Group]:
    rows = tx.execute(select(grp).where(grp.c.id.in_(tuple(numbers)))).mappings()
    return {int(row["id"]): Group(**{name: row[name] for name in Group.__struct_fields__}) for row in rows}


def _seen(tx: Connection, queue: str, number: int) -> str:
    """What a person sees of a group, without what its messages say."""
    found = tx.execute(
        select(grp.c.error_type, grp.c.component, grp.c.category, grp.c.remedy).where(
            grp.c.id == number, grp.c.queue == queue
        )
    ).first()
    if found is None:
        raise ConfigError(f"queue {queue} has no group {number}; `dlq plan {queue}` lists them")
    return f"{found.error_type} in {found.component}: {found.category}, {found.remedy}"


def _open(drain: Drain) -> ColumnElement[bool]:
    return (entry.c.queue == drain.queue) & (entry.c.state == "open")


def _moved_by_message(drain: Drain, number: int, group: Group, decisions: Regrouping) -> int:
    """Of a group that is split: by what the archive has as its entries' messages, segment by segment."""
    with drain.ledger.read() as tx:
        rows = tx.execute(
            select(segment.c.uri, entry.c.id, entry.c.row_no)
            .join(segment, segment.c.id == entry.c.segment)
            .where(_open(drain), entry.c.grp == number)
        ).all()
    by_segment: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for uri, identity, row in rows:
        by_segment[uri].append((identity, row))
    moved = 0
    for uri, entries in by_segment.items():
        messages = drain.archive.read(uri, ["message"])["message"]
        into: dict[Group, list[int]] = defaultdict(list)
        for identity, row in entries:
            into[decisions.regrouped(group, messages[row].as_py())].append(identity)
        for target, ids in into.items():
            moved += _moved(drain, group, target, entry.c.id.in_(ids))
    return moved


def _moved(drain: Drain, group: Group, target: Group, which: ColumnElement[bool]) -> int:
    if target == group:
        return 0
    known: dict[Group, int] = {}
    custody.group_ids(drain.ledger, drain.queue, drain.epoch, [target], known)
    ours = _open(drain) & which
    with drain.ledger.write(drain.queue, drain.epoch) as tx:
        tx.execute(update(entry).where(ours, entry.c.reason.in_(_OF_REMEDY)).values(reason="new"))
        moved = tx.execute(update(entry).where(ours).values(grp=known[target], owner=target.owner))
        return int(moved.rowcount)
