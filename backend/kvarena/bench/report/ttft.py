"""Time to first token against context length, and how many times sooner than plain: `kvarena bench ttft`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvarena.bench.panels import Panel, log_x, log_y
from kvarena.bench.report.bars import Bar, draw_bars, height_in, readable_ms
from kvarena.bench.report.files import ResultFile
from kvarena.bench.report.parts import Part
from kvarena.bench.report.setups import conditions, over_context, setup_label
from kvarena.bench.report.tables import rows_table
from kvarena.bench.results import Row, grouped
from kvarena.bench.series import Series, Styles, drawn_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SETUP_KEYS = ("contender", "policy", "ratio", "check_layer", "max_ttft_ms", "options")
RUN_KEYS = ("context_tokens", "store", "prompts", "concurrency", "num_requests", "num_failed")


def make(file: ResultFile, styles: Styles) -> Part:
    """A pair of panels for each store and each number of requests at once; bars where there is one context only."""
    panels: list[Panel] = []
    for condition, rows in grouped((row for row in file.rows if row["ttft_ms"]), conditions).items():
        contexts = {row["context_tokens"] for row in rows}
        if len(contexts) > 1:
            panels += _over_context(rows, condition, styles)
        else:
            panels.append(_at_one_context(rows, f"at {min(contexts):,} tokens, {condition}", styles))
    but_stages = ({key: value for key, value in row.items() if key != "stages_ms"} for row in file.rows)
    return Part(panels, [rows_table("Time to first token, and what it took", but_stages)])


def ttft_bars(rows: Sequence[Row], styles: Styles) -> list[Bar]:
    return [
        Bar(setup_label(row), [("", row["ttft_ms"]["median"], styles.colour(drawn_name(row)))], _note(row))
        for row in rows
    ]


def times_ms(row: Row) -> tuple[float, float, float]:
    """The whisker goes from the median up to p95."""
    ttft = row["ttft_ms"]
    return ttft["median"], ttft["median"], ttft["p95"]


def speedup(row: Row) -> tuple[float, float, float] | None:
    ratio = row["speedup_vs_plain"] if row["contender"] != "plain" else None
    return (ratio["median"], ratio["low"], ratio["high"]) if ratio else None


def _over_context(rows: Sequence[Row], condition: str, styles: Styles) -> list[Panel]:
    times, ratios = over_context(rows, times_ms), over_context(rows, speedup)

    def draw_times(axes: Axes) -> None:
        _draw_lines(axes, times, styles)
        axes.set(ylabel="time to first token (ms)")

    def draw_ratios(axes: Axes) -> None:
        axes.axhline(1.0, color=styles.colour("plain"), linestyle="--", linewidth=1.3)
        _draw_lines(axes, ratios, styles)
        axes.set(ylabel="times sooner than plain")

    against = f"against context length, {condition}"
    panels = [Panel(f"Time to first token {against}; medians, whiskers to p95", draw_times)]
    if ratios:
        title = f"Times sooner than plain {against}; medians of pairs, whiskers from the least to the greatest"
        panels.append(Panel(title, draw_ratios))
    return panels


def _draw_lines(axes: Axes, lines: Sequence[Series], styles: Styles) -> None:
    styles.draw(axes, lines)
    log_x(axes, (x for line in lines for x in line.x))
    log_y(axes)
    axes.set(xlabel="context (tokens)")
    axes.grid(visible=True, which="major", alpha=0.3)


def _at_one_context(rows: Sequence[Row], where: str, styles: Styles) -> Panel:
    bars = ttft_bars(rows, styles)

    def draw(axes: Axes) -> None:
        draw_bars(axes, bars)
        axes.set(xlabel="time to first token (ms)")

    title = f"Time to first token {where}; medians, times sooner than plain at the end"
    return Panel(title, draw, height_in(bars))


def _note(row: Row) -> str:
    ratio, median = speedup(row), readable_ms(row["ttft_ms"]["median"])
    return f"{median} ({ratio[0]:.3g}x)" if ratio else median
