"""Lines of figures: what is drawn, in which colour, with which whiskers. The same for every picture of the project.

A name (a policy, a contender, a mode) has one colour and one marker wherever it is drawn; lines of one name differ by
their dashes. The colours keep apart for red-green blindness, and from a white and from a dark page (3:1 or more).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvarena.bench.results import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GREY, ORANGE, BLUE, GREEN = "#808691", "#C8480A", "#0068B5", "#009E73"
PURPLE, OCHRE, SKY, BROWN = "#A0408A", "#B58900", "#3D9BD2", "#8C564B"
PALETTE = (ORANGE, BLUE, GREEN, PURPLE, OCHRE, SKY, BROWN)
COLOURS = {
    "plain": GREY,
    "kv_deviation": ORANGE,
    "chunk_head": BLUE,
    "query_attention": GREEN,
    "random": PURPLE,
    "none": OCHRE,
    "all": SKY,
    "hf": BROWN,
}
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
    """Colour and marker by name. Names without a colour of their own get those that no other of `names` has."""

    def __init__(self, names: Iterable[str] = (), colours: Mapping[str, str] = COLOURS) -> None:
        names = list(dict.fromkeys(names))
        taken = {colours[name] for name in names if name in colours}
        free = [colour for colour in PALETTE if colour not in taken] or PALETTE
        others = [name for name in names if name not in colours]
        self._colours = {**colours, **dict(zip(others, itertools.cycle(free), strict=False))}
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
