"""The picture of a prefix benchmark: time to first token over context length, a line per level and scenario."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvarena.bench.panels import Panel, log_x, log_y, save_png
from kvarena.bench.results import Row, load_results
from kvarena.bench.series import BLUE, GREY, ORANGE, Series, Styles

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STYLES = Styles(colours={"no KV cache": GREY, "KV cache": BLUE, "prefix cache": ORANGE})
SCENARIOS = ("cold", "new question", "repeat")


def plot(result_path: Path, image_path: Path) -> None:
    """Raises `ValueError` when the file holds no prefix benchmark."""
    result = load_results(result_path)
    if not result["rows"] or "scenario" not in result["rows"][0]:
        raise ValueError(f"{result_path} holds no prefix benchmark")
    save_png(panels(result), image_path, width_in=8)


def panels(result: Mapping[str, Any]) -> list[Panel]:
    rows: list[Row] = result["rows"]

    def draw(axes: Axes) -> None:
        STYLES.draw(axes, (_line(rows, *pair) for pair in dict.fromkeys((r["level"], r["scenario"]) for r in rows)))
        log_x(axes, (row["context_tokens"] for row in rows))
        log_y(axes)
        axes.set(xlabel="prompt tokens", ylabel="time to first token (ms), median")
        axes.grid(visible=True, which="major", alpha=0.3)

    return [Panel("Time to first token over prompt length, by level of caching; whiskers to p95", draw, height_in=5)]


def _line(rows: list[Row], level: str, scenario: str) -> Series:
    own = [row for row in rows if (row["level"], row["scenario"]) == (level, scenario)]
    medians = [row["ttft_ms"]["median"] for row in own]
    return Series(
        level,
        f"{level}, {scenario}",
        x=[row["context_tokens"] for row in own],
        y=medians,
        low=medians,
        high=[row["ttft_ms"]["p95"] for row in own],
        variant=SCENARIOS.index(scenario),
    )
