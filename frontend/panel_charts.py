"""The panels of result files in a browser: lines as Vega-Lite charts, bars and legends as HTML that wraps.

`kvarena.panels` computes what is drawn, as it does for reports. Texts are escaped.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

import altair as alt
import streamlit as st

import state
from kvarena.panels.panel import Axis, Bar, Panel, Series

Record = dict[str, Any]
HEIGHT = 360
DASHES: tuple[tuple[int, ...], ...] = ((1, 0), (6, 4), (2, 3), (8, 3, 2, 3))
SHAPES = ("circle", "square", "diamond", "triangle-up")
"""For lines of one colour, since single points have no dashes."""
MIN_SPAN = 10.0  # of a percentage axis, so that equal figures look equal
NARROW_PX = (300, 250)  # a chart on a phone
NOTE_PX = (36, 13)
BIG_LETTERS_PX = 22
IN_THOUSANDS = "datum.value >= 1000 ? format(datum.value / 1000, '.3~g') + 'k' : format(datum.value, '.3~g')"


def draw_panels(drawn: Sequence[Panel]) -> None:
    """Two in a row."""
    for place in range(0, len(drawn), 2):
        for column, panel in zip(st.columns(2, gap="large"), drawn[place : place + 2], strict=False):
            with column:
                st.markdown(f"**{panel.title}**")
                if panel.bars:
                    st.html(bars_html(panel.bars) + legend_html(panel))
                else:
                    draw_chart(panel_chart(panel))
                    st.html(legend_html(panel))


def draw_chart(chart: alt.LayerChart) -> None:
    """As wide as there is room; with large type on a big screen."""
    if state.is_big_screen():
        chart = chart.configure_axis(labelFontSize=BIG_LETTERS_PX, titleFontSize=BIG_LETTERS_PX)
        chart = chart.configure_text(fontSize=BIG_LETTERS_PX)
    st.altair_chart(chart, width="stretch")


def panel_chart(panel: Panel) -> alt.LayerChart:
    """Of a panel of lines: levels behind, then whiskers, lines and points, and notes where they have room."""
    records = [record for series in panel.series for record in _records(series)]
    names = list(dict.fromkeys([*(level.name for level in panel.levels), *(s.name for s in panel.series)]))
    colour = alt.Color(
        "name:N", scale=alt.Scale(domain=names, range=[panel.colours[name] for name in names]), legend=None
    )
    x, y = alt.X("x:Q", **_x_axis(panel)), alt.Y("y:Q", **_y_axis(panel))
    levels = [vars(level) | {"tip": ""} for level in panel.levels]
    across = alt.Chart(alt.Data(values=levels)).encode(color=colour, tooltip=_tooltip(panel))
    chart = alt.Chart(alt.Data(values=records)).encode(x=x, color=colour, detail="label:N")
    dash = alt.StrokeDash("variant:O", scale=alt.Scale(domain=list(range(len(DASHES))), range=DASHES), legend=None)
    shape = alt.Shape("variant:O", scale=alt.Scale(domain=list(range(len(SHAPES))), range=SHAPES), legend=None)
    points = chart.encode(
        y=y, shape=shape, tooltip=[alt.Tooltip("x:Q", title=panel.x.title, format=",.3~f"), *_tooltip(panel)]
    )
    noted = [record for record in _with_room(records, panel) if record["note"]]
    return alt.LayerChart(
        layer=[
            across.mark_rect(opacity=0.12, clip=True).encode(y=alt.Y("low:Q", **_y_axis(panel)), y2="high:Q"),
            across.mark_rule(strokeWidth=2, strokeDash=[6, 4]).encode(y=y),
            chart.mark_rule(opacity=0.45, strokeWidth=1.5).encode(y=alt.Y("low:Q", **_y_axis(panel)), y2="high:Q"),
            chart.mark_line(strokeWidth=2).encode(
                y=y, strokeDash=dash, order="x:Q" if panel.x.at_points else "order:Q"
            ),
            points.transform_filter("!datum.is_mark").mark_point(size=60, filled=True, opacity=1),
            points.transform_filter("datum.is_mark").mark_point(size=320, strokeWidth=3, filled=False, opacity=1),
            alt.Chart(alt.Data(values=noted))
            .mark_text(dx=5, dy=-8, align="left")
            .encode(x=x, y=y, color=colour, text="note:N"),
        ]
    ).properties(height=HEIGHT)


def _records(series: Series) -> list[Record]:
    own = {
        "name": series.name,
        "label": series.label,
        "variant": series.variant % len(DASHES),
        "is_mark": series.is_mark,
    }
    return [
        own | {"order": order, "x": x, "y": y, "low": low, "high": high, "note": note, "tip": tip}
        for order, (x, y, low, high, note, tip) in enumerate(
            zip(
                series.x,
                series.y,
                series.low,
                series.high,
                series.notes or [""] * len(series.x),
                series.tips or [""] * len(series.x),
                strict=True,
            )
        )
    ]


def _tooltip(panel: Panel) -> list[alt.Tooltip]:
    title = " ".join(panel.y.title.split("\n"))
    return [
        alt.Tooltip("label:N", title="line"),
        alt.Tooltip("y:Q", title=title, format=",.3~f"),
        alt.Tooltip("low:Q", title="from", format=",.3~f"),
        alt.Tooltip("high:Q", title="to", format=",.3~f"),
        alt.Tooltip("tip:N", title="of"),
    ]


def _x_axis(panel: Panel) -> Record:
    values = sorted({x for series in panel.series for x in series.x})
    axis = alt.Axis(tickCount=6, labelOverlap="greedy", title=panel.x.title)
    if panel.x.at_points:
        axis = alt.Axis(values=values, labelExpr=IN_THOUSANDS, labelOverlap="greedy", title=panel.x.title)
    domain = list(x_domain(panel.x, values))
    return {"axis": axis, "scale": alt.Scale(type="log" if panel.x.is_log else "linear", domain=domain, nice=False)}


def _y_axis(panel: Panel) -> Record:
    low, high = y_domain(panel)
    title = panel.y.title.split("\n")[0]
    if panel.y.is_log:
        axis = alt.Axis(values=_round_values(low, high), labelExpr=IN_THOUSANDS, labelOverlap="greedy", title=title)
        return {"axis": axis, "scale": alt.Scale(type="log", domain=[low, high], nice=False)}
    return {"axis": alt.Axis(title=title, format=",.4~f"), "scale": alt.Scale(domain=[low, high], nice=False)}


def x_domain(axis: Axis, values: Sequence[float]) -> tuple[float, float]:
    least, most = (values[0], values[-1]) if values else (0.0, 1.0)
    if axis.is_log:
        return least / 1.1, most * 1.2
    if axis.at_points:
        return least - 0.3, most + 0.3
    return 0.0, min(1.12 * most or 1.0, axis.limits[1] if axis.limits else math.inf)


def y_domain(panel: Panel) -> tuple[float, float]:
    """From the lowest to the highest end of an interval with some margin, within what the figure can be."""
    ends = [end for line in panel.series for ends in (line.low, line.y, line.high) for end in ends]
    ends += [end for level in panel.levels for end in (level.low, level.y, level.high)]
    low, high = min(ends, default=0.0), max(ends, default=1.0)
    if panel.y.is_log:
        return low / 1.15, high * 1.25
    least, most = panel.y.limits or (0.0, math.inf)
    if math.isinf(most):
        return least, 1.1 * high or 1.0
    air = max(0.05 * (high - low), (MIN_SPAN - (high - low)) / 2)
    return max(least, low - air), min(most, high + air)


def _round_values(low: float, high: float) -> list[float]:
    """1, 2 and 5 times each power of ten in between."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [value for power in powers for step in (1, 2, 5) if low <= (value := step * 10.0**power) <= high]


def _with_room(records: Sequence[Record], panel: Panel) -> list[Record]:
    """Those whose notes don't overlap even on a phone; the tooltip has the others."""
    x_ends = x_domain(panel.x, sorted({record["x"] for record in records}))
    y_ends = y_domain(panel)
    kept: list[tuple[float, float]] = []
    found = []
    for record in records:
        x = NARROW_PX[0] * (record["x"] - x_ends[0]) / (x_ends[1] - x_ends[0])
        y = NARROW_PX[1] * (record["y"] - y_ends[0]) / (y_ends[1] - y_ends[0])
        if record["note"] and all(abs(x - a) >= NOTE_PX[0] or abs(y - b) >= NOTE_PX[1] for a, b in kept):
            kept.append((x, y))
            found.append(record)
    return found


def legend_html(panel: Panel) -> str:
    """A key for every line and level, or for every part of the bars."""
    if panel.bars:
        parts = {name: colour for name, _, colour in panel.bars[0].parts if name}
        keys = [f'<i style="background:{colour}"></i>{escape(name)}' for name, colour in parts.items()]
    else:
        keys = [_stroke(panel.colours[level.name], DASHES[1]) + escape(level.label) for level in panel.levels]
        keys += [
            _line_key(line, panel.colours[line.name]) + escape(line.label) for line in panel.series if not line.is_mark
        ]
        keys += [
            f'<i class="ka-ring" style="border-color:{panel.colours[s.name]}"></i>{escape(s.label)}'
            for s in panel.series
            if s.is_mark
        ]
    return f'<div class="ka-legend">{"".join(f"<span class=ka-key>{key}</span>" for key in keys)}</div>' if keys else ""


def _line_key(line: Series, colour: str) -> str:
    number = line.variant % len(DASHES)
    return f'{_stroke(colour, DASHES[number])}<i class="ka-shape-{SHAPES[number]}" style="background:{colour}"></i>'


def _stroke(colour: str, dash: Iterable[int]) -> str:
    """A piece of the line, with its dashes as stripes."""
    lengths = list(dash)
    stops, at = [], 0
    for place, length in enumerate(lengths):
        stops.append(f"{'transparent' if place % 2 else colour} {at}px {at + length}px")
        at += length
    return f'<i class="ka-stroke" style="background:repeating-linear-gradient(90deg,{",".join(stops)})"></i>'


def bars_html(bars: Sequence[Bar]) -> str:
    """From top to bottom, each under its label, with its note at the end."""
    longest = max((sum(length for _, length, _ in bar.parts) for bar in bars), default=1.0) or 1.0
    return f'<div class="ka-bars">{"".join(_bar_html(bar, longest) for bar in bars)}</div>'


def _bar_html(bar: Bar, longest: float) -> str:
    at, cells = 0.0, ""
    for name, length, colour in bar.parts:
        told = f' title="{escape(name)}: {length:.3g}"' if name else ""
        place = f"left:{100 * at / longest:.3f}%;width:{100 * length / longest:.3f}%"
        cells += f'<i style="{place};background:{colour}"{told}></i>'
        at += length
    return (
        f'<div class="ka-lane"><b>{escape(bar.label)}</b>'
        f'<div class="ka-track">{cells}</div><span>{escape(bar.note)}</span></div>'
    )


def ttft_chart(records: Sequence[Record]) -> alt.LayerChart:
    """A point for every answer, a bar at the median and a tick at the 95th percentile; a line per variant."""
    chart = alt.Chart(alt.Data(values=list(records))).encode(
        y=alt.Y("variant:N", title=None, sort=None, axis=alt.Axis(labelLimit=300)),
        x=alt.X(
            "ttft_ms:Q",
            title="Time to first token, ms (blue: median, brown: 95th percentile)",
            scale=alt.Scale(zero=True),
        ),
    )
    stages = chart.transform_aggregate(median="median(ttft_ms)", groupby=["variant"])
    p95 = chart.transform_quantile("ttft_ms", probs=[0.95], groupby=["variant"])
    return alt.LayerChart(
        layer=[
            chart.mark_circle(size=45, opacity=0.35).encode(tooltip=["question:N", "ttft_ms:Q"]),
            stages.mark_tick(thickness=3, size=26, color="#3b82f6").encode(x="median:Q", tooltip=["median:Q"]),
            p95.mark_tick(thickness=2, size=16, color="#b45309").encode(x="value:Q", tooltip=["value:Q"]),
        ]
    ).properties(height=alt.Step(44))
