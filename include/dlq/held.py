"""Entries on hold: until when each waits, and the look that frees those whose time has come or whose probe passes.

Nothing sleeps on a hold. The next look is in the ledger (``entry.hold_until``); a drain looks when it categorizes and
in its last rounds, and the time between two looks grows with how long it has been held.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import ColumnElement, Connection, and_, func, select, update

from dlq import clock, limits, probes
from dlq import plan as planning
from dlq.config import HoldPolicy
from dlq.drain import Drain
from dlq.grouping.taxonomy import load_taxonomy
from dlq.ledger.schema import drain as drains
from dlq.ledger.schema import entry, event, grp

REASON = "hold"
FIRST_S, MOST_S = 60.0, 3_600.0
"""Between two looks lies as long as it has been held by then, within these: 1, 2, 4 … minutes, then every hour."""

Canary = Callable[[str, ColumnElement[bool]], bool | None]
"""Sends the one entry of the condition, in a stage of this name; returns whether it was confirmed, None: not known."""

_STAGE = "hold"
_NOTES = 100


@dataclass(frozen=True)
class _Kind:
    """What is held together: by the same words, and where they ask for the failed plugin's circuit, the same plugin."""

    policy: HoldPolicy
    plugin: str


def look(drain: Drain, canary: Canary | None = None) -> int:
    """Say of each entry on hold until when it waits, and free what is due and may go; returns how many are free.

    :param canary: how one entry is tried; without it what only a canary can tell waits for a stage that may send.
    """
    freed = 0
    for kind, groups in _kinds(drain).items():
        ours = and_(_held(drain.queue), entry.c.grp.in_(groups))
        _begin(drain, kind, groups, ours)
        due = and_(ours, entry.c.hold_until <= clock.now())
        if _count(drain, due) and limits.forbids(drain) is None:
            freed += _ask(drain, kind, groups, due, canary)
    return freed


def why(tx: Connection, queue: str) -> dict[int, str]:
    """By group, what the newest look at it said."""
    rows = tx.execute(
        select(event.c.text, event.c.data)
        .join(drains, drains.c.id == event.c.drain)
        .where(drains.c.queue == queue, event.c.stage == _STAGE)
        .order_by(event.c.id.desc())
        .limit(_NOTES)
    )
    said: dict[int, str] = {}
    for text, data in rows:
        for group in json.loads(data)["groups"]:
            said.setdefault(group, text)
    return said


def standing(tx: Connection, queue: str) -> list[dict[str, Any]]:
    """What is held, by group: how many, until when (the next look), and why."""
    rows = tx.execute(
        select(
            grp.c.id.label("group"),
            grp.c.error_type,
            grp.c.component,
            func.count().label("entries"),
            func.min(entry.c.hold_until).label("until"),
        )
        .join(grp, grp.c.id == entry.c.grp)
        .where(_held(queue))
        .group_by(grp.c.id, grp.c.error_type, grp.c.component)
        .order_by(func.count().desc(), grp.c.id)
    ).mappings()
    found = [dict(row) for row in rows]
    said = why(tx, queue) if found else {}
    return [{**each, "why": said.get(each["group"])} for each in found]


def _held(queue: str) -> ColumnElement[bool]:
    return and_(entry.c.queue == queue, entry.c.state == "open", entry.c.reason == REASON)


def _kinds(drain: Drain) -> dict[_Kind, list[int]]:
    with drain.ledger.read() as tx:
        rows = tx.execute(
            select(grp.c.id, grp.c.rule, grp.c.component)
            .where(grp.c.id.in_(select(entry.c.grp).where(_held(drain.queue))))
            .order_by(grp.c.id)
        ).all()
    kinds: dict[_Kind, list[int]] = defaultdict(list)
    holds = load_taxonomy().holds if rows else {}
    for group, rule, component in rows:
        policy = holds.get(rule, drain.config.hold)
        by_plugin = policy.probe is not None and policy.probe.circuit is True
        kinds[_Kind(policy, (component or "").split(".")[0] if by_plugin else "")].append(int(group))
    return kinds


def _begin(drain: Drain, kind: _Kind, groups: Sequence[int], ours: ColumnElement[bool]) -> None:
    """Give what was not looked at yet its time: a probe's is at once, or with those that it is asked for already.
    What came back waits longer each time.
    """
    policy, fresh = kind.policy, and_(ours, entry.c.hold_until.is_(None))
    with drain.ledger.write(drain.queue, drain.epoch) as tx:
        tries = tx.execute(
            select(entry.c.attempts, func.count()).where(fresh).group_by(entry.c.attempts)
        ).all()
        asked = tx.execute(select(func.min(entry.c.hold_until)).where(ours)).scalar()
        for attempts, _ in tries:
            if policy.until is not None:
                until = clock.iso(policy.until)
            elif policy.for_ is not None:
                until = clock.after(policy.for_ * 2**attempts)
            else:
                until = clock.after(min(FIRST_S * 2 ** (attempts - 1), MOST_S) if attempts else 0.0)
                until = max(until, asked or until)
            tx.execute(update(entry).where(fresh, entry.c.attempts == attempts).values(hold_until=until))
    if tries and policy.probe is None:
        count = sum(n for _, n in tries)
        until = (
            clock.iso(policy.until) if policy.until else f"{policy.for_:g} s from now, or more after returns"
        )
        drain.note(_STAGE, f"{count} entries are held until {until}", groups=list(groups), entries=count)


def _count(drain: Drain, condition: ColumnElement[bool]) -> int:
    with drain.ledger.read() as tx:
        return int(tx.execute(select(func.count()).select_from(entry).where(condition)).scalar_one())


def _ask(
    drain: Drain, kind: _Kind, groups: Sequence[int], due: ColumnElement[bool], canary: Canary | None
) -> int:
    probe = kind.policy.probe
    answer = (
        probes.Answer(True, "their time is over") if probe is None else probes.ask(drain, probe, kind.plugin)
    )
    passed, said = answer.passed, answer.said
    if passed is None:
        if canary is None or (one := _first(drain, due)) is None:
            return 0
        passed = canary(f"hold:{groups[0]}", entry.c.id == one) is True
        said = f"{said}; it {'passed' if passed else 'did not pass'}"
    with drain.ledger.write(drain.queue, drain.epoch) as tx:
        values = {"reason": "ready", "hold_until": None}
        if not passed:
            values = {"hold_until": clock.after(_pause_s(tx, due))}
        changed = tx.execute(update(entry).where(due).values(**values)).rowcount
    became = "are free" if passed else f"are held, the next look is after {values['hold_until']}"
    drain.note(
        _STAGE, f"{said}: {changed} entries {became}", groups=list(groups), entries=changed, passed=passed
    )
    return int(changed) if passed else 0


def _first(drain: Drain, due: ColumnElement[bool]) -> int | None:
    """The oldest that may be sent."""
    with drain.ledger.read() as tx:
        return tx.execute(
            select(func.min(entry.c.id)).where(due, planning.sendable(drain), planning.heads(drain))
        ).scalar()


def _pause_s(tx: Connection, due: ColumnElement[bool]) -> float:
    since = tx.execute(
        select(func.min(drains.c.opened_at)).join(entry, entry.c.taken_drain == drains.c.id).where(due)
    ).scalar()
    if since is None:  # the canary was the last of them
        return FIRST_S
    held_s = (datetime.now(UTC) - datetime.fromisoformat(since)).total_seconds()
    return min(max(held_s, FIRST_S), MOST_S)
