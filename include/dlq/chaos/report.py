"""The report of a chaos run: what was broken, and whether all of it works again; a page to read, and JSON beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import msgspec
from upath import UPath

from dlq import clock
from dlq.chaos.recovery import Recovered
from dlq.report.write import page, put


@dataclass(frozen=True)
class Row:
    """One fault in the report. ``doubled`` is None where nobody counts effects."""

    fault: str
    broke: str
    failed: int
    recovered: int
    waiting: int
    lost: int
    doubled: int | None
    whole: bool
    why: tuple[str, ...] = ()


def row(found: Recovered) -> Row:
    """What became of a fault of the queue's file."""
    why = found.why if found.skipped is None else (f"not injected: {found.skipped}",)
    return Row(
        found.fault,
        found.broke,
        found.failed,
        found.recovered,
        found.waiting,
        found.lost,
        None,
        found.whole,
        why,
    )


def write(folder: str, name: str, queue: str, run: str, rows: Sequence[Row]) -> dict[str, Any]:
    """Write ``<name>.html`` and ``.json``; returns where they are and the sentence they begin with."""
    broken = [one for one in rows if not one.whole]
    lost, counted = sum(one.lost for one in rows), [one.doubled for one in rows if one.doubled is not None]
    doubled = f"{sum(counted):,} doubled" if counted else "effects not counted"
    sentence = (
        f"{len(rows)} faults, {sum(one.failed for one in rows):,} dead letters, "
        f"{sum(one.recovered for one in rows):,} recovered, {lost:,} lost, {doubled}"
    )
    whole = bool(rows) and not broken
    headline = (
        "Recovered in full"
        if whole
        else f"Not recovered: {', '.join(one.fault for one in broken) or 'nothing ran'}"
    )
    data = {"queue": queue, "run": run, "at": clock.now(), "whole": whole, "said": sentence}
    faults = [asdict(one) for one in rows]
    html, json = UPath(folder) / f"{name}.html", UPath(folder) / f"{name}.json"
    put(json, msgspec.json.format(msgspec.json.encode({**data, "faults": faults}), indent=2) + b"\n")
    put(html, page("chaos.html.j2", **data, headline=headline, sentence=sentence, faults=faults).encode())
    return {"html": str(html), "json": str(json), "whole": whole, "said": f"{headline}: {sentence}"}
