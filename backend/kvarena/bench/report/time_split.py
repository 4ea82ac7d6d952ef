"""Where the time of a request goes, stage by stage: `stages_ms` of `kvarena bench ttft`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvarena.bench.panels import Panel
from kvarena.bench.report.bars import Bar, draw_bars, height_in, readable_ms
from kvarena.bench.report.files import ResultFile
from kvarena.bench.report.parts import Part
from kvarena.bench.report.setups import conditions, setup_label
from kvarena.bench.report.tables import rows_table
from kvarena.bench.report.ttft import SETUP_KEYS
from kvarena.bench.results import Row, grouped
from kvarena.bench.series import Styles

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STAGES = {
    "fetch": ("fetch", "#77AADD"),
    "prefill_chunks": ("prefill missing chunks", "#AAAA00"),
    "move": ("rotate", "#99DDFF"),
    "write": ("write", "#44BB99"),
    "select": ("select", "#EEDD88"),
    "recompute": ("recompute", "#EE8866"),
    "prefill": ("prefill", "#BBBBBB"),
    "decode": ("decode", "#FFAABB"),
}
"""In the order of a request; others follow. Light colours, so that no stage looks like a policy: Paul Tol's."""
OTHER_COLOUR = "#BBCC33"


def make(file: ResultFile, styles: Styles) -> Part:
    """A panel for each context and store."""
    timed = [row for row in file.rows if row.get("stages_ms")]
    groups = grouped(timed, lambda row: (row["context_tokens"], conditions(row)))
    panels = [_panel(rows, context, condition) for (context, condition), rows in groups.items()]
    keys = (*SETUP_KEYS, "context_tokens", "store", "concurrency", "stages_ms")
    return Part(panels, [rows_table("Milliseconds by stage, medians", timed, keys)])


def time_bars(rows: Sequence[Row]) -> list[Bar]:
    """Shares of the whole in percent, so that bars of very different times can be compared; the whole as a note.

    Every bar has every stage of these rows, if only with nothing, so that the legend is in the order of a request.
    """
    found = dict.fromkeys(stage for row in rows for stage in row["stages_ms"])
    stages = [*(stage for stage in STAGES if stage in found), *(stage for stage in found if stage not in STAGES)]
    shown = {stage: STAGES.get(stage, (stage, OTHER_COLOUR)) for stage in stages}
    bars = []
    for row in rows:
        times_ms = [row["stages_ms"].get(stage) or 0.0 for stage in stages]
        total_ms = sum(times_ms) or 1.0
        parts = [
            (name, 100 * ms / total_ms, colour) for (name, colour), ms in zip(shown.values(), times_ms, strict=True)
        ]
        bars.append(Bar(setup_label(row), parts, readable_ms(sum(times_ms))))
    return bars


def _panel(rows: Sequence[Row], context: int, condition: str) -> Panel:
    bars = time_bars(rows)

    def draw(axes: Axes) -> None:
        draw_bars(axes, bars)
        axes.set(xlabel="share of the request's time (%)", xticks=range(0, 101, 25))

    return Panel(f"Time split at {context:,} tokens, {condition}; medians, the sum at the end", draw, height_in(bars))
