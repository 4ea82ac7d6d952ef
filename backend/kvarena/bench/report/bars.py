"""Bars across, one for each setup, with a text at its end."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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
