"""A report's plots as SVG text, without script; axes take the page's colour and read in light and dark."""

from __future__ import annotations

import re
from collections.abc import Sequence

from dlq.report.account import Group, Point

# Okabe and Ito's palette: told apart with colour-blind eyes, and on white as on black.
COLOURS = {
    "confirmed": "#009e73",
    "no outcome": "#56b4e9",
    "returned": "#d55e00",
    "open": "#e69f00",
    "set aside": "#8c8c8c",
}
_LINES = {"taken": "#8c8c8c", "replayed": "#56b4e9", "confirmed": "#009e73", "returned": "#d55e00"}
_FONT = "system-ui, sans-serif"
_SHOWN = 10
_WIDTH = 920
_LABELS = 340  # room for the groups' names: the page's font is not the one they were measured with


def outcome_by_group(groups: Sequence[Group]) -> str | None:
    """Stacked bars of what became of the ten largest groups; None where there is nothing to show."""
    import altair as alt

    rows = []
    names = []
    for position, group in enumerate(groups[:_SHOWN]):
        # The number keeps two groups of one name apart; the table beside the plot has the same numbers.
        name = f"{position + 1}  {_short(group.error_type, 22)} · {_short(group.component, 24)}"
        names.append(name)
        counts = (group.confirmed, group.unconfirmed, group.returned, group.open, group.aside)
        rows += [
            {"group": name, "outcome": outcome, "entries": count, "order": order}
            for order, (outcome, count) in enumerate(zip(COLOURS, counts, strict=True))
            if count
        ]
    if not rows:
        return None
    chart = (
        alt.Chart(alt.InlineData(values=rows))
        .mark_bar(size=16)
        .encode(
            x=alt.X("entries:Q", title="entries", axis=alt.Axis(tickCount=6, tickMinStep=1, format=",d")),
            y=alt.Y("group:N", sort=names, title=None, axis=alt.Axis(minExtent=_LABELS)),
            color=alt.Color(
                "outcome:N",
                scale=alt.Scale(domain=list(COLOURS), range=list(COLOURS.values())),
                legend=alt.Legend(title=None, orient="top"),
            ),
            order=alt.Order("order:Q"),
        )
        .properties(width=_WIDTH - _LABELS, height=alt.Step(26))
    )
    return _svg(chart)


def timeline(points: Sequence[Point]) -> str | None:
    """Taken, replayed, confirmed and returned entries over the drain; None where nothing moved."""
    import altair as alt

    last = points[-1]
    shown = [name for name in _LINES if getattr(last, name)]
    if not shown or len(points) < 2:
        return None
    rows = [{"at": p.at, "what": name, "entries": getattr(p, name)} for p in points for name in shown]
    chart = (
        alt.Chart(alt.InlineData(values=rows))
        .mark_line(interpolate="step-after", strokeWidth=2)
        .encode(
            x=alt.X(
                "at:T",
                title="time (UTC)",
                scale=alt.Scale(type="utc"),
                axis=alt.Axis(format="%H:%M:%S", tickCount=8, grid=False),
            ),
            y=alt.Y(
                "entries:Q", title="entries so far", axis=alt.Axis(tickCount=5, tickMinStep=1, format=",d")
            ),
            color=alt.Color(
                "what:N",
                scale=alt.Scale(domain=shown, range=[_LINES[name] for name in shown]),
                legend=alt.Legend(title=None, orient="top"),
            ),
        )
        .properties(width=_WIDTH - 60, height=200)
    )
    return _svg(chart)


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _svg(chart: object) -> str:
    import vl_convert

    spec = chart.to_dict()  # type: ignore[attr-defined]
    ink = "currentColor"
    spec["config"] = {
        "background": None,
        "font": _FONT,
        "view": {"stroke": None},
        "axis": {
            "labelColor": ink,
            "titleColor": ink,
            "titleFontWeight": "normal",
            "tickColor": ink,
            "tickOpacity": 0.4,
            "domainColor": ink,
            "domainOpacity": 0.4,
            "gridColor": ink,
            "gridOpacity": 0.12,
            "labelFontSize": 12,
            "titleFontSize": 12,
            "labelLimit": 320,
        },
        "axisY": {"grid": True},
        "legend": {"labelColor": ink, "labelFontSize": 12, "symbolType": "square"},
    }
    return re.sub(r"^<\?xml[^>]*>\s*", "", vl_convert.vegalite_to_svg(spec))
