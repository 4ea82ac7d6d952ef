"""Quality against what it costs: charts of the points that `eval_tables.points` makes of a result's rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import altair as alt

from eval_tables import Lines, Metric, Record
from kvarena.palette import colours_of

HEIGHT = 420
PERCENT = "~%"  # d3's: with as many digits as it takes to tell the ticks of a short axis apart
MIN_SPAN = 0.1  # of the axis, in the metric's unit: equal figures shall look equal


def recomputed_chart(records: Sequence[Record], metric: Metric, lines: Lines) -> alt.LayerChart:
    """A line per policy; those that don't blend, and what all are compared with, are levels across."""
    blending = alt.Chart(_data(record for record in records if not record["level"])).encode(
        x=alt.X(
            "recomputed:Q",
            title="Share of the chunks' tokens recomputed",
            axis=alt.Axis(format=PERCENT),
            scale=alt.Scale(domain=[0, _most_recomputed(records)]),
        ),
        color=_colour(records, lines),
    )
    levels = alt.Chart(_data(_levels(records))).encode(color=_colour(records, lines))
    band = levels.transform_filter("datum.reference").mark_rect(opacity=0.12, clip=True)
    return _finished(
        band.encode(y=_quality(records, metric, "low"), y2="high:Q"),
        levels.mark_rule(strokeWidth=2, strokeDash=[6, 4]).encode(
            y=_quality(records, metric), tooltip=_tooltip(metric)
        ),
        *_lines_with_intervals(blending, records, metric),
    )


def time_chart(records: Sequence[Record], metric: Metric, lines: Lines) -> alt.LayerChart:
    """The same lines, a point labelled with its ratio; those that don't blend are points of their own."""
    timed = [record for record in records if record["ttft_ms"] is not None]
    longest_ms = max((record["ttft_ms"] for record in timed), default=1.0)
    x = alt.X(
        "ttft_ms:Q",
        title="Time to first token, median, ms",
        axis=alt.Axis(tickCount=8),
        scale=alt.Scale(domain=[0, 1.08 * longest_ms]),
    )
    blending, levels = (
        alt.Chart(_data(part)).encode(x=x, color=_colour(records, lines))
        for part in ([record for record in timed if not record["level"]], _levels(timed))
    )
    level_points = levels.mark_point(shape="diamond", size=130, filled=True, opacity=1)
    return _finished(
        _intervals(levels, records, metric),
        level_points.encode(y=_quality(records, metric), tooltip=_tooltip(metric)),
        *_lines_with_intervals(blending, records, metric),
        *_labels(blending, records, metric, lines),
    )


def _levels(records: Iterable[Record]) -> list[Record]:
    """The reference last, on top of the others."""
    found = [record for record in records if record["level"] or record["reference"]]
    return sorted(found, key=lambda record: bool(record["reference"]))


def _data(records: Iterable[Record]) -> alt.Data:
    return alt.Data(values=list(records))


def _finished(*layers: alt.Chart) -> alt.LayerChart:
    return alt.LayerChart(layer=layers).properties(height=HEIGHT)


def _lines_with_intervals(chart: alt.Chart, records: Sequence[Record], metric: Metric) -> tuple[alt.Chart, ...]:
    y = _quality(records, metric)
    return (
        _intervals(chart, records, metric),
        chart.mark_line(strokeWidth=2).encode(y=y, order="recomputed:Q"),
        chart.mark_point(size=60, filled=True, opacity=1).encode(y=y, tooltip=_tooltip(metric)),
    )


def _labels(chart: alt.Chart, records: Sequence[Record], metric: Metric, lines: Lines) -> tuple[alt.Chart, ...]:
    """Above every other line and below the rest, for lines lie close together; beside a line that rises or falls."""
    left: tuple[int, Literal["right"]] = (-6, "right")
    right: tuple[int, Literal["left"]] = (6, "left")
    above, below = (left, right) if metric.is_share else (right, left)
    sides = ((lines.blending[::2], -8, *above), (lines.blending[1::2], 10, *below))
    return tuple(
        chart.transform_filter(alt.FieldOneOfPredicate("line", side))
        .mark_text(fontSize=11, dx=dx, dy=dy, align=align)
        .encode(y=_quality(records, metric), text="label:N")
        for side, dy, dx, align in sides
    )


def _intervals(chart: alt.Chart, records: Sequence[Record], metric: Metric) -> alt.Chart:
    bars: alt.Chart = chart.mark_rule(opacity=0.45, strokeWidth=1.5)
    return bars.encode(y=_quality(records, metric, "low"), y2="high:Q")


def _colour(records: Sequence[Record], lines: Lines) -> alt.Color:
    """A line keeps its colour whatever is shown of the file."""
    shown = {record["line"] for record in records}
    names = [*lines.levels, *lines.blending]
    colours = colours_of(names)
    legend = alt.Legend(
        title=None,
        orient="top",
        columns=4,
        symbolType="circle",
        symbolOpacity=1,
        labelLimit=260,
        values=[name for name in names if name in shown],
    )
    return alt.Color("line:N", scale=alt.Scale(domain=names, range=[colours[name] for name in names]), legend=legend)


def _quality(records: Sequence[Record], metric: Metric, field: str = "mean") -> alt.Y:
    title = metric.title if metric.is_share else f"{metric.title} (lower is better)"
    axis = alt.Axis(format=PERCENT) if metric.is_share else alt.Axis()
    return alt.Y(f"{field}:Q", title=title, axis=axis, scale=alt.Scale(domain=_span(records, metric)))


def _span(records: Sequence[Record], metric: Metric) -> list[float]:
    """From the lowest to the highest end of an interval with some air, within what the metric can be."""
    ends = [record[end] for record in records for end in ("low", "mean", "high")]
    low, high = min(ends), max(ends)
    air = max(0.05 * (high - low), (MIN_SPAN - (high - low)) / 2)
    top = high + air
    return [max(0.0, low - air), min(1.0, top) if metric.is_share else top]


def _most_recomputed(records: Sequence[Record]) -> float:
    shares = [record["recomputed"] or 0.0 for record in records if not record["level"]]
    return min(1.0, 1.05 * max(shares, default=1.0)) or 1.0


def _tooltip(metric: Metric) -> list[alt.Tooltip]:
    form = ".1%" if metric.is_share else ".4f"
    return [
        alt.Tooltip("line:N", title="line"),
        alt.Tooltip("label:N", title="ratio"),
        alt.Tooltip("recomputed:Q", title="recomputed", format=".1%"),
        alt.Tooltip("mean:Q", title=metric.title, format=form),
        alt.Tooltip("low:Q", title="from", format=form),
        alt.Tooltip("high:Q", title="to", format=form),
        alt.Tooltip("ttft_ms:Q", title="first token, ms", format=",.0f"),
        alt.Tooltip("questions:Q", title="questions"),
        alt.Tooltip("failed:Q", title="failed"),
        alt.Tooltip("cut:Q", title="cut"),
    ]
