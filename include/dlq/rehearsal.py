"""What a dry run shows: the oldest entries of the queue, looked at and not taken, held against the taxonomy."""

from __future__ import annotations

from collections import Counter
from typing import Any

from dlq.destination import Destination
from dlq.drain import Drain
from dlq.entry import Group
from dlq.grouping.classify import Classifier
from dlq.redact import redact
from dlq.regroup import regrouping
from dlq.sample import Looked, oldest

MOST = 1_000
"""Entries looked at; a deeper queue is judged by these."""


def look(drain: Drain, most: int = MOST) -> list[Looked]:
    """The oldest entries that a drain would take; none of a queue in which looking is a touch (SQS counts receives)."""
    if not drain.source.has_log:
        return []
    classifier = Classifier.load(drain.config, regrouping(drain))
    found = oldest(drain.source, drain.positions(), most)
    return [Looked(record, *classifier.classify(record)) for record in found]


def groups(drain: Drain) -> list[dict[str, Any]]:
    """Their groups, largest first, as :func:`dlq.triage.groups` gives those in custody."""
    found: Counter[Group] = Counter()
    ids: dict[Group, list[str]] = {}
    for each in look(drain):
        found[each.group] += 1
        if each.understood.correlation_id and len(ids.setdefault(each.group, [])) < 5:
            ids[each.group].append(each.understood.correlation_id)
    return [
        {
            "id": None,
            "fingerprint": group.fingerprint,
            "category": group.category,
            "remedy": group.remedy,
            "rule": group.rule,
            "component": group.component,
            "error_type": group.error_type,
            "owner": group.owner,
            "count": count,
            "correlation_ids": ids.get(group, []),
        }
        for group, count in found.most_common()
    ]


def plan(drain: Drain) -> list[dict[str, Any]]:
    """What a replay would take of them: retryable, and to a target that is allowed."""
    destination = Destination(drain.config)
    found: Counter[tuple[str, str, str]] = Counter()
    for each in look(drain):
        target = destination.of(each.understood)
        if each.group.remedy == "retry" and target is not None and each.record.flaw is None:
            found[each.group.error_type, each.group.component, target] += 1
    return [
        {"group": None, "error_type": kind, "component": component, "target": target, "entries": n}
        for (kind, component, target), n in found.most_common()
    ]


def shown(drain: Drain, most: int) -> list[dict[str, Any]]:
    """The runbook's sample, redacted."""
    return [
        {
            "place": f"{each.record.part}/{each.record.place}",
            "error_type": each.group.error_type,
            "component": each.group.component,
            "category": each.group.category,
            "correlation_id": each.understood.correlation_id,
            "failed_at": None,
            "bytes": len(each.record.key or b"") + len(each.record.value or b""),
            "replays": each.understood.retry_count,
            "message": redact(each.understood.message or "")[:200],
        }
        for each in look(drain, most)
    ]
