"""Pictures of any figures: panels, lines, bars. Nothing here knows which benchmark is drawn.

A panel is one pair of axes; panels become one PNG file, or each an SVG for a page. An SVG has the page's text
colour, scales with its width, and stays text. A name (a policy, a contender, a mode) has one colour and one marker
wherever it is drawn; lines of one name differ by their dashes. matplotlib is imported inside the functions.
"""

from __future__ import annotations

import html
import io
import itertools
import math
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvarena.bench.results import Row
from kvarena.palette import COLOURS, colours_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.typing import RcKeyType


INK = "#010203"
"""Drawn where the page's own text colour shall be."""
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
"""Narrow, so that its text can still be read on a phone."""
LEGEND_LINE_IN = 0.2
LEGEND_CHARS = 28
"""Of the longest label where two columns have room."""


@dataclass(frozen=True)
class Panel:
    """`draw` fills empty axes, and labels what belongs into a legend. `title` says what is to be seen."""

    title: str
    draw: Callable[[Axes], None]
    height_in: float = 3.1


def save_png(
    panels: Sequence[Panel], path: Path, *, width_in: float, num_columns: int = 1, width_ratios: Sequence[float] = ()
) -> None:
    """Row by row, `num_columns` panels in each."""
    from matplotlib.figure import Figure

    num_rows = max(1, math.ceil(len(panels) / num_columns))
    height_in = num_rows * max((panel.height_in for panel in panels), default=1.0)
    figure = Figure(figsize=(width_in, height_in), layout="constrained")
    grid = figure.subplots(num_rows, num_columns, squeeze=False, width_ratios=width_ratios or None)
    for axes, panel in zip(grid.flat, panels, strict=False):
        panel.draw(axes)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def to_svg(panel: Panel) -> str:
    """An `<svg>` element to be put into HTML, its title as the alternative text, the legend below the axes."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**SVG_SETTINGS, "svg.hashsalt": panel.title}):
        figure = Figure(figsize=(SVG_WIDTH_IN, panel.height_in), layout="constrained")
        axes = figure.subplots()
        panel.draw(axes)
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


def log_y(axes: Axes) -> None:
    """A logarithmic scale with plain numbers at 1, 2 and 5."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def log_x(axes: Axes, values: Iterable[float]) -> None:
    """A logarithmic scale with a tick at each of the values, in thousands from 1,000 on."""
    ticks = sorted(set(values))
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{tick / 1000:.3g}k" if tick >= 1000 else f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.margins(x=0.08)


def _for_html(svg: str, title: str) -> str:
    """Without XML's prologue and namespaces, the size, and ids that a page with several figures would have twice."""
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg, count=2)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    view_box = re.search(r'viewBox="[^"]*"', svg)
    assert view_box, "matplotlib's SVG has a view box"
    head = f'<svg role="img" aria-label="{html.escape(title)}" {view_box.group()}>'
    return head + f"<title>{html.escape(title)}</title>" + svg[svg.index(">") + 1 :]


MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class Series:
    """A line. `low` and `high` are its whiskers' ends. `variant` counts the lines of one name."""

    name: str
    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    variant: int = 0


class Styles:
    """Colour and marker by name."""

    def __init__(self, names: Iterable[str] = (), colours: Mapping[str, str] = COLOURS) -> None:
        self._colours = colours_of(names, colours)
        self._markers = dict(zip(self._colours, itertools.cycle(MARKERS), strict=False))

    def colour(self, name: str) -> str:
        return self._colours[name]

    def draw(self, axes: Axes, series: Iterable[Series]) -> None:
        for one in series:
            axes.errorbar(
                one.x,
                one.y,
                yerr=[
                    [max(0.0, y - low) for y, low in zip(one.y, one.low, strict=True)],
                    [max(0.0, high - y) for y, high in zip(one.y, one.high, strict=True)],
                ],
                linestyle=DASHES[one.variant % len(DASHES)],
                marker=self._markers[one.name],
                markersize=4.5,
                capsize=2,
                linewidth=1.3,
                color=self._colours[one.name],
                label=one.label,
            )


def drawn_name(row: Row) -> str:
    """Whose colour a row has: the policy's where our blend ran, else the contender's and the policy's."""
    contender, policy = row["contender"], row.get("policy")
    return (
        str(policy) if policy and contender == "blend" else " ".join(str(part) for part in (contender, policy) if part)
    )


BAR_IN = 0.3
FRAME_IN = 0.9
ROOM_FOR_NOTES = 1.45
LABEL_CHARS = 26


@dataclass(frozen=True)
class Bar:
    """`parts` are stacked from the left: name, length, colour. All bars of a panel have the same names."""

    label: str
    parts: Sequence[tuple[str, float, str]]
    note: str


def height_in(bars: Sequence[Bar]) -> float:
    return FRAME_IN + BAR_IN * len(bars)


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


def readable_ms(ms: float) -> str:
    """Three digits, in seconds from one second on."""
    return f"{ms / 1000:.3g} s" if ms >= 1000 else f"{ms:.3g} ms"
