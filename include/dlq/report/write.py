"""The report of a drain: one HTML file to read, one JSON beside it, and a dozen lines for a terminal."""

from __future__ import annotations

import os
import re
from base64 import b64encode
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from upath import UPath

from dlq.report import plots
from dlq.report.account import ReportData
from dlq.report.tally import build_report

if TYPE_CHECKING:
    from dlq.drain import Drain

__all__ = ["ReportData", "build_report", "page", "put", "render", "summarise", "write_report"]

_HERE = Path(__file__).parent
_GROUPS, _NOTES = 25, 200
_SECONDS = {"escalate_after", "window", "budget", "grace", "deadline", "within"}

_REASONS = {
    "new": "not looked at yet",
    "ready": "ready to be replayed",
    "hold": "on hold",
    "start_probe_failed": "the start probe failed: nothing was replayed",
    "first_intake": "was there before the first drain; waits for a decision",
    "waiting_for_fix": "waits for a fix",
    "waiting_for_person": "waits for a person",
    "repair_failed": "a repair was tried, and it can't be done to it",
    "returned": "failed again after its replay",
    "returns_limit": "failed again too often",
    "handed_back_again": "was handed back to the queue, and is here again",
    "pointer": "only points to its original, which can't be fetched",
    "newer_of_its_key": "the target has a newer record of its key",
    "place_on_target_unknown": "nobody knows whether the target has a newer record of its key",
    "conflict": "says it is our replay, but carries something else",
    "twin_not_sent": "is a copy of one that was not sent yet",
    "earlier_entry_of_key": "waits for an earlier entry of its key",
    "gate_failed": "its job stopped: too many came back",
    "canary_failed": "its canary failed",
    "outcome_unknown": "its job stopped: no outcome came in time",
    "nobody_consumes": "nobody consumes the target",
    "consumers_lag": "the target's consumers lag too far behind",
    "target_not_allowed": "its origin names no allowed target",
    "unrepresentable_headers": "has headers a client cannot represent",
}
"""Reasons of the ledger, in words."""

_SEEN_ONCE = {
    "read_committed": "The target's consumers read committed records only: each replay was seen once.",
    "read_uncommitted": (
        "The target's consumers read uncommitted records: a batch that was aborted and sent again may have "
        "been seen twice. The dedupe key and the dlq-key header tell the copies."
    ),
    "unknown": (
        "Replays are on the target once for consumers that read committed records only; how the target's "
        "consumers read is not known (target.origin_consumers)."
    ),
}


def write_report(drain: Drain) -> dict[str, Any]:
    """Write ``<drain id>.html`` and ``.json`` where the queue's file says, each at once or not at all.

    Returns where they are and a summary of at most 12 lines. A dry run writes nothing.
    """
    if drain.dry_run:
        return {
            "html": None,
            "json": None,
            "summary": f"{drain.queue}: a dry run changed nothing; no report was written",
        }
    data = build_report(drain)
    folder = UPath(drain.config.report)
    html, json = folder / f"{drain.id}.html", folder / f"{drain.id}.json"
    put(json, msgspec.json.format(msgspec.json.encode(data), indent=2) + b"\n")
    put(html, render(data).encode())
    drain.note("write_report", f"the report is at {html}")
    return {"html": str(html), "json": str(json), "summary": summarise(data)}


def page(template: str, **values: Any) -> str:
    """A template of this folder as an HTML page: self-contained, without script, all values escaped."""
    environment = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        moment=_moment,
        duration=duration,
        share=_share,
        words=_words,
        reason=lambda code: _REASONS.get(code, _words(code)),
        told=_told,
        brief=lambda text: text if len(text) <= 300 else f"{text[:300]}…",
        after=lambda text, prefix: text.removeprefix(prefix),
    )
    style = (_HERE / "report.css").read_text(encoding="utf-8")
    digest = b64encode(sha256(style.encode()).digest()).decode()
    return environment.get_template(template).render(
        style=Markup(style),  # noqa: S704 - our own file
        style_hash=f"sha256-{digest}",
        **values,
    )


def render(data: ReportData) -> str:
    """A drain's report as an HTML page."""
    drawn = {"groups": plots.outcome_by_group(data.groups), "timeline": plots.timeline(data.timeline)}
    return page(
        "report.html.j2",
        r=data,
        title=f"{data.kind.capitalize()} of {data.queue}",
        headline=_headline(data),
        sentence=_sentence(data),
        seen_once=_SEEN_ONCE[data.proof.seen_once_by],
        plots={name: Markup(svg) if svg else None for name, svg in drawn.items()},  # noqa: S704 - drawn by us, text escaped
        groups_shown=_GROUPS,
        notes=_shown_notes(data),
    )


def summarise(data: ReportData) -> str:
    """The report in at most 12 lines of plain text."""
    n = data.numbers
    verdict = (data.verdict or "not closed").upper()
    lines = [
        f"{data.kind} of {data.queue}: {verdict} after {duration(data.seconds)} ({data.drain})",
        f"taken {n.taken:,}, replayed {n.replayed:,}: "
        f"confirmed {n.confirmed:,}, returned {n.returned:,}, no outcome {n.unconfirmed:,}",
        f"drain success {_share(n.success)} (asked {_share(n.success_asked)})",
        f"conservation {_proven(data)}: open before {n.open_before:,} + taken {n.taken:,} "
        f"{'=' if n.balanced else '≠'} settled {n.settled:,} + unsettled {n.unsettled:,}",
        f"golden flows {_golden(data)}",
    ]
    lines += [f"because: {reason}" for reason in data.reasons[:2]]
    lines.append(f"still open: {n.unsettled:,}")
    most = 12 - len(lines)
    shown = data.open if len(data.open) <= most else data.open[: most - 1]
    lines += [
        _cut(f"  {o.count:>7,}  {o.owner}: {_REASONS.get(o.reason, _words(o.reason))} · {o.signature}", 110)
        for o in shown
    ]
    if len(shown) < len(data.open):
        lines.append(f"  {n.unsettled - sum(o.count for o in shown):>7,}  more, in the report")
    return "\n".join(_one_line(line) for line in lines)


def duration(seconds: float | None) -> str:
    """``< 0.1 s``, ``0.4 s``, ``12 s``, ``4 min 05 s``, ``1 h 02 min``; a dash where it is not known."""
    if seconds is None:
        return "–"
    if seconds < 0.05:
        return "< 0.1 s"
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def _headline(data: ReportData) -> str:
    broken = len(data.proof.laws)
    if data.verdict == "green":
        return "Green: done, and proven" if data.proof.proven else "Green: done"
    if data.verdict != "red":
        return (
            f"Closed: {data.verdict}" if data.verdict else f"Not closed: in {_words(data.phase or 'opened')}"
        )
    if data.proof.proven is None:
        return "Red: nothing is proven"
    if broken:
        return f"Red: {broken} law{'' if broken == 1 else 's'} of conservation broken"
    return "Red: nothing is lost, but not all is done" if data.proof.proven else "Red: not proven"


def _sentence(data: ReportData) -> str:
    n = data.numbers
    parts = [f"{_letters(n.taken)} taken into custody"]
    if n.replayed:
        outcome = [f"{n.confirmed:,} did well"]
        outcome += [f"{n.returned:,} came back"] if n.returned else []
        outcome += [f"{n.unconfirmed:,} have no outcome yet"] if n.unconfirmed else []
        parts.append(f"{n.replayed:,} replayed ({', '.join(outcome)})")
    aside = n.duplicate + n.discarded + n.handed_back
    parts += [f"{aside:,} settled without a replay"] if aside else []
    owners = [f"{owner} ({count:,})" for owner, count in list(data.open_by_owner.items())[:4]]
    more = len(data.open_by_owner) - len(owners)
    owners += [f"{more} more"] if more > 0 else []
    parts.append(f"{n.unsettled:,} open, with {_listed(owners)}" if owners else "none open")
    return f"{_listed(parts)}."


def _letters(n: int) -> str:
    return "1 dead letter was" if n == 1 else f"{n:,} dead letters were"


def _listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _proven(data: ReportData) -> str:
    if data.proof.proven is None:
        return "UNPROVEN"
    return "proven" if data.proof.proven else f"BROKEN ({', '.join(data.proof.laws[:3]) or 'an expectation'})"


def _golden(data: ReportData) -> str:
    golden = data.golden or {}
    passed = golden.get("passed")
    if passed and (already := golden.get("broken_before")):
        return f"none broke in this drain; before it already: {', '.join(already)}"
    return {True: "green", False: "FAILED"}.get(passed, "not run") if isinstance(passed, bool) else "not run"


def _shown_notes(data: ReportData) -> list[Any]:
    if len(data.notes) <= _NOTES:
        return data.notes
    half = _NOTES // 2
    odd = [note for note in data.notes[half:-half] if note.level != "info"]
    return [*data.notes[:half], *odd[:half], *data.notes[-half:]]


def _moment(at: str) -> str:
    return f"{at[:10]} {at[11:19]}"


def _share(part: float | None) -> str:
    if part is None:
        return "no outcome"
    shown = f"{part * 100:.2f}".rstrip("0").rstrip(".")
    return f"{'< 100' if shown == '100' and part < 1 else shown} %"


def _words(name: str) -> str:
    return name.replace("_", " ")


def _told(value: Any) -> str:
    """A small JSON value in words: ``name: value`` pairs, lists with commas."""
    if isinstance(value, dict):
        return ", ".join(
            f"{_words(str(k))} {duration(v) if k in _SECONDS else _told(v)}"
            for k, v in value.items()
            if v not in (None, {}, [])
        )
    if isinstance(value, (list, tuple)):
        return ", ".join(_told(v) for v in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.6g}"
    return "–" if value is None else str(value)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _one_line(text: str) -> str:
    return re.sub(r"[^\S ]+|[\x00-\x1f\x7f-\x9f]+", " ", text)


def put(path: UPath, data: bytes) -> None:
    """Object stores put a file at once; a local one is written beside and renamed."""
    if path.protocol not in ("", "file"):
        path.write_bytes(data)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.part")
    with beside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
