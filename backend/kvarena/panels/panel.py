"""A panel of lines or bars, as data; how rows are named, grouped and coloured in it.

A name (a policy, a contender, a mode) has one colour wherever it is drawn. Colours are told apart with red-green
blindness, and stand out from a white and from a dark page (3:1 or more).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

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

Row = dict[str, Any]
Result = Mapping[str, Any]
Colours = Mapping[str, str]
Ends = tuple[float, float, float]
"""A figure's middle, and where its whiskers end."""
Group = TypeVar("Group", bound=Hashable)

REFERENCE = "plain"
"""The contender that the others are compared with."""
ALL_KINDS = "all"
"""The `kind` of a row about questions of every kind."""
NO_REUSE = "no reuse"
"""The mode of a row of Sim-LLM beside which the others are shown."""


@dataclass(frozen=True)
class Axis:
    """`limits`: what the figure can be. `at_points`: a tick at each measured value."""

    title: str
    is_log: bool = False
    at_points: bool = False
    limits: tuple[float, float] | None = None


@dataclass(frozen=True)
class Series:
    """A line. `low` and `high` are its whiskers' ends. `variant` counts the lines of one name.

    A word of `notes` stands at its point; `tips` are told of it on demand. `is_mark`: points to be seen first.
    """

    name: str
    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    variant: int = 0
    notes: Sequence[str] = ()
    tips: Sequence[str] = ()
    is_mark: bool = False


@dataclass(frozen=True)
class Level:
    """A line across, with its interval as a band."""

    name: str
    label: str
    y: float
    low: float
    high: float


@dataclass(frozen=True)
class Bar:
    """`parts` are stacked from the left: name, length, colour. All bars of a panel have the same names."""

    label: str
    parts: Sequence[tuple[str, float, str]]
    note: str


@dataclass(frozen=True)
class Panel:
    """Lines and levels, or bars from the top down. `title` says what is to be seen."""

    title: str
    x: Axis
    y: Axis = field(default_factory=lambda: Axis(""))
    series: Sequence[Series] = ()
    levels: Sequence[Level] = ()
    bars: Sequence[Bar] = ()
    colours: Colours = field(default_factory=lambda: COLOURS)
    height_in: float = 3.1


def grouped(rows: Iterable[Row], by: Callable[[Row], Group]) -> dict[Group, list[Row]]:
    """In the order in which groups first appear."""
    groups: dict[Group, list[Row]] = {}
    for row in rows:
        groups.setdefault(by(row), []).append(row)
    return groups


def policy_label(row: Mapping[str, Any]) -> str:
    """Such as `kv_deviation (deviation values)`; empty where there is none."""
    options = ", ".join(f"{name} {value}" for name, value in (row.get("options") or {}).items())
    return f"{row.get('policy') or ''}{options and f' ({options})'}"


def variant_label(row: Mapping[str, Any]) -> str:
    """Such as `blend kv_deviation 15 % @2` or `blend kv_deviation 300 ms @2 sink 1`, where 2 is the check layer."""
    ratio, max_ttft_ms = row.get("ratio"), row.get("max_ttft_ms")
    parts = [row["contender"], policy_label(row), None if ratio is None else f"{100 * ratio:g} %"]
    parts.append(None if max_ttft_ms is None else f"{max_ttft_ms:g} ms")
    parts += layer_and_sink(row)
    return " ".join(part for part in parts if part)


def layer_and_sink(row: Mapping[str, Any]) -> list[str]:
    layer, sink_tokens = row.get("check_layer"), row.get("sink_tokens")
    return [f"@{layer}"] * (layer is not None) + [f"sink {sink_tokens}"] * (sink_tokens is not None)


def drawn_name(row: Row) -> str:
    """Whose colour a row has: the policy's where our blend ran, else the contender's and the policy's."""
    contender, policy = row["contender"], row.get("policy")
    own = (policy,) if policy and contender == "blend" else (contender, policy)
    return " ".join(str(part) for part in own if part)


def readable_ms(ms: float) -> str:
    """Three digits, in seconds from one second on."""
    return f"{ms / 1000:.3g} s" if ms >= 1000 else f"{ms:.3g} ms"


def series_of(
    rows: Sequence[Row],
    label: Callable[[Row], str],
    x: str,
    figures: Callable[[Row], Ends | None],
    name_of: Callable[[Row], str] = drawn_name,
) -> list[Series]:
    """A line for each label over the rows' `x`; rows without figures are left out."""
    found: list[Series] = []
    for of_line in grouped(rows, label).values():
        points = sorted((row[x], *ends) for row in of_line if (ends := figures(row)))
        if points:
            name, (xs, y, low, high) = name_of(of_line[0]), zip(*points, strict=True)
            variant = sum(other.name == name for other in found)
            found.append(Series(name, label(of_line[0]), xs, y, low, high, variant))
    return found


def to_p95(key: str) -> Callable[[Row], Ends | None]:
    """The whisker goes from the median up to p95."""

    def ends(row: Row) -> Ends | None:
        spread = row.get(key)
        return (spread["median"], spread["median"], spread["p95"]) if spread else None

    return ends


times_ms = to_p95("ttft_ms")


def colours_of(names: Iterable[str], colours: Mapping[str, str] = COLOURS) -> dict[str, str]:
    """`colours`, and for names without one a colour that no other of `names` has, while there are any."""
    names = list(dict.fromkeys(names))
    taken = {colours[name] for name in names if name in colours}
    free = [colour for colour in PALETTE if colour not in taken] or PALETTE
    others = [name for name in names if name not in colours]
    return {**colours, **dict(zip(others, itertools.cycle(free), strict=False))}


def colours_in(results: Iterable[Result]) -> dict[str, str]:
    return colours_of(drawn_name(row) for result in results for row in result["rows"] if "contender" in row)
