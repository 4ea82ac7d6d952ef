"""Panels drawn with matplotlib: all into one PNG file, or each as an SVG for a page.

An SVG takes the page's text colour, scales with its width, and keeps its text as text. matplotlib is imported inside
the functions.
"""

from __future__ import annotations

import html
import io
import itertools
import math
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvarena.bench.results import load_results
from kvarena.panels.kinds import RESULT_KINDS, Picture, panels_of
from kvarena.panels.panel import Bar, Panel, Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.typing import RcKeyType


INK = "#010203"
"""Stands for the page's own text colour."""
SVG_SETTINGS: dict[RcKeyType, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": INK,
}
SVG_WIDTH_IN = 4.6
"""Narrow enough to be read on a phone."""
LEGEND_LINE_IN = 0.2
LEGEND_CHARS = 28
"""The longest label of a legend in two columns."""


def save_png(panels: Sequence[Panel], path: Path, picture: Picture) -> None:
    from matplotlib.figure import Figure

    num_rows = max(1, math.ceil(len(panels) / picture.num_columns))
    total_in = num_rows * max((height_in(panel) for panel in panels), default=1.0)
    figure = Figure(figsize=(picture.width_in, total_in), layout="constrained")
    grid = figure.subplots(num_rows, picture.num_columns, squeeze=False, width_ratios=picture.width_ratios or None)
    for axes, panel in zip(grid.flat, panels, strict=False):
        draw(axes, panel)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def to_svg(panel: Panel) -> str:
    """An `<svg>` element to be put into HTML, its title as the alternative text, the legend below the axes."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**SVG_SETTINGS, "svg.hashsalt": panel.title}):
        figure = Figure(figsize=(SVG_WIDTH_IN, height_in(panel)), layout="constrained")
        axes = figure.subplots()
        draw(axes, panel)
        _put_legend_below(figure, axes)
        file = io.StringIO()
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=no_metadata)
    return _for_html(file.getvalue(), panel.title)


def _put_legend_below(figure: Figure, axes: Axes) -> None:
    """The figure grows by the legend's height."""
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        num_columns = 2 if max(map(len, labels)) <= LEGEND_CHARS else 1
        num_lines = math.ceil(len(labels) / num_columns)
        figure.set_figheight(figure.get_figheight() + LEGEND_LINE_IN * num_lines)
        figure.legend(handles, labels, loc="outside lower center", ncols=num_columns, fontsize=8.5, frameon=False)


def _for_html(svg: str, title: str) -> str:
    """Drops XML's prologue and namespaces, the size, and ids that a page with several figures would have twice."""
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg, count=2)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    view_box = re.search(r'viewBox="[^"]*"', svg)
    assert view_box, "matplotlib's SVG has a view box"
    head = f'<svg role="img" aria-label="{html.escape(title)}" {view_box.group()}>'
    return head + f"<title>{html.escape(title)}</title>" + svg[svg.index(">") + 1 :]


MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", ":", "-.")
BAR_IN = 0.3
FRAME_IN = 0.9
ROOM_FOR_NOTES = 1.45
LABEL_CHARS = 26


def height_in(panel: Panel) -> float:
    return FRAME_IN + BAR_IN * len(panel.bars) if panel.bars else panel.height_in


def draw(axes: Axes, panel: Panel) -> None:
    if panel.bars:
        draw_bars(axes, panel.bars)
        axes.set(xlabel=panel.x.title)
        return
    for level in panel.levels:
        colour = panel.colours[level.name]
        axes.axhline(level.y, color=colour, linestyle="--", linewidth=1.3, label=level.label)
        axes.axhspan(level.low, level.high, color=colour, alpha=0.12, linewidth=0)
    markers = dict(zip(panel.colours, itertools.cycle(MARKERS), strict=False))
    for series in panel.series:
        draw_line(axes, series, panel.colours[series.name], markers[series.name])
    _scale_axes(axes, panel)
    axes.set(xlabel=panel.x.title, ylabel=panel.y.title)
    axes.grid(visible=True, which="major", alpha=0.3)


def _scale_axes(axes: Axes, panel: Panel) -> None:
    """A logarithmic x has a tick at each point, in thousands from 1,000 on; a logarithmic y at 1, 2 and 5."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    points = sorted({x for series in panel.series for x in series.x})
    if panel.x.is_log:
        axes.set_xscale("log")
        axes.set_xticks(points, [f"{x / 1000:.3g}k" if x >= 1000 else f"{x:g}" for x in points])
        axes.set_xticks([], minor=True)
        axes.margins(x=0.08)
    elif panel.x.at_points:
        axes.set_xticks(points)
    if panel.y.is_log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif panel.y.limits:
        low, high = panel.y.limits
        air = 0.03 * (high - low)
        axes.set_ylim(low, None) if math.isinf(high) else axes.set_ylim(low - air, high + air)


def draw_line(axes: Axes, series: Series, colour: str, marker: str) -> None:
    axes.errorbar(
        series.x,
        series.y,
        yerr=[
            [max(0.0, y - low) for y, low in zip(series.y, series.low, strict=True)],
            [max(0.0, high - y) for y, high in zip(series.y, series.high, strict=True)],
        ],
        linestyle=DASHES[series.variant % len(DASHES)],
        marker=marker,
        markersize=11 if series.is_mark else 4.5,
        markerfacecolor="none" if series.is_mark else colour,
        capsize=2,
        linewidth=1.3,
        color=colour,
        label=series.label,
    )
    for note, place in zip(series.notes, zip(series.x, series.y, strict=True), strict=False):
        axes.annotate(note, place, textcoords="offset points", xytext=(1, 6), fontsize=7, rotation=55)


def draw_bars(axes: Axes, bars: Sequence[Bar]) -> None:
    """From the top down; parts with a name go into the legend."""
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    ends = [0.0] * len(bars)
    for parts in zip(*(bar.parts for bar in bars), strict=True):
        names, lengths, colours = zip(*parts, strict=True)
        axes.barh(range(len(bars)), lengths, 0.7, ends, color=colours, label=names[0] or None)
        ends = [end + length for end, length in zip(ends, lengths, strict=True)]
    longest = max(ends)
    for place, (bar, end) in enumerate(zip(bars, ends, strict=True)):
        axes.text(end + 0.01 * longest, place, bar.note, va="center", fontsize=8.5)
    axes.set_yticks(range(len(bars)), [textwrap.fill(bar.label, LABEL_CHARS) for bar in bars], fontsize=8.5)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.set(xlim=(0, ROOM_FOR_NOTES * longest), ylim=(len(bars) - 0.4, -0.6))


def save_picture(result_path: Path, image_path: Path, benchmark: str) -> None:
    """Raises `ValueError` where the file holds another benchmark, or no rows."""
    result = load_results(result_path)
    if result.get("settings", {}).get("benchmark") != benchmark or not result["rows"]:
        raise ValueError(f"{result_path} holds no {benchmark} benchmark")
    picture = RESULT_KINDS[benchmark].picture
    assert picture, f"{benchmark} has no picture"
    save_png(panels_of(result), image_path, picture)
