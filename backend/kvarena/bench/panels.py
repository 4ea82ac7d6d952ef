"""Pictures: a panel is one pair of axes; panels become one PNG file, or each an SVG for a page.

An SVG has the page's text colour, scales with its width, and stays text. Nothing here knows what is drawn.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
