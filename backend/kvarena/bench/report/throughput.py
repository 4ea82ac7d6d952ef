"""Requests per second with several requests at once: `kvarena bench ttft --concurrency`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvarena.bench.panels import Panel
from kvarena.bench.report.bars import Bar, draw_bars, height_in
from kvarena.bench.report.files import ResultFile
from kvarena.bench.report.parts import Part
from kvarena.bench.report.setups import conditions, setup_label
from kvarena.bench.report.tables import rows_table
from kvarena.bench.report.ttft import RUN_KEYS, SETUP_KEYS
from kvarena.bench.results import Row, grouped
from kvarena.bench.series import Styles, drawn_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def make(file: ResultFile, styles: Styles) -> Part:
    """A panel for each context, store and number of requests at once."""
    rows = [row for row in file.rows if row["concurrency"] > 1 and row.get("requests_per_s")]
    groups = grouped(rows, lambda row: (row["context_tokens"], conditions(row)))
    panels = [_panel(own, context, condition, styles) for (context, condition), own in groups.items()]
    keys = (*SETUP_KEYS, *RUN_KEYS, "requests_per_s", "throughput_vs_plain", "peak_rss_bytes")
    return Part(panels, [rows_table("Throughput", rows, keys)])


def throughput_bars(rows: Sequence[Row], styles: Styles) -> list[Bar]:
    return [
        Bar(setup_label(row), [("", _middle(row["requests_per_s"]), styles.colour(drawn_name(row)))], _note(row))
        for row in rows
    ]


def _panel(rows: Sequence[Row], context: int, condition: str, styles: Styles) -> Panel:
    bars = throughput_bars(rows, styles)

    def draw(axes: Axes) -> None:
        draw_bars(axes, bars)
        axes.set(xlabel="requests per second")

    return Panel(f"Throughput at {context:,} tokens, {condition}; times plain's at the end", draw, height_in(bars))


def _note(row: Row) -> str:
    rate, times = f"{_middle(row['requests_per_s']):.3g}/s", row.get("throughput_vs_plain")
    return f"{rate} ({_middle(times):.3g}x)" if times and row["contender"] != "plain" else rate


def _middle(figure: float | dict[str, float]) -> float:
    """A figure that may come with its spread."""
    return float(figure["median"] if isinstance(figure, dict) else figure)
