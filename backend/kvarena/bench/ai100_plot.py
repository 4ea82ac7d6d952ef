"""The picture of an AI 100 benchmark: time to first token turn by turn, and throughput."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvarena.bench.panels import Panel, log_y, save_png
from kvarena.bench.results import load_results
from kvarena.bench.series import GREY, ORANGE, Series, Styles

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STYLES = Styles(colours={"no cache": GREY, "KV slots": ORANGE})
TTFT_KEYS = {"no cache": "no_cache_ttft_ms", "KV slots": "slots_ttft_ms"}


def plot(result_path: Path, image_path: Path) -> None:
    """Raises `ValueError` when the file holds no AI 100 benchmark."""
    result = load_results(result_path)
    if result.get("settings", {}).get("benchmark") != "ai100":
        raise ValueError(f"{result_path} holds no ai100 benchmark")
    save_png(panels(result), image_path, width_in=9, num_columns=2, width_ratios=(2, 1))


def panels(result: Mapping[str, Any]) -> list[Panel]:
    turns = [row for row in result["rows"] if row["measure"] == "first token"]
    modes = [row for row in result["rows"] if row["measure"] == "throughput"]

    def draw_turns(axes: Axes) -> None:
        for name, key in TTFT_KEYS.items():
            medians, p95 = ([row[key][figure] for row in turns] for figure in ("median", "p95"))
            STYLES.draw(axes, [Series(name, name, [row["turn"] for row in turns], medians, medians, p95)])
        log_y(axes)
        axes.set(xlabel="turn", ylabel="time to first token (ms), median")
        axes.set_xticks([row["turn"] for row in turns])
        axes.grid(visible=True, which="major", alpha=0.3)

    def draw_throughput(axes: Axes) -> None:
        names = [row["mode"].replace(" the other", "\nthe other") for row in modes]
        axes.bar(names, [row["tokens_per_s"]["median"] for row in modes], color=[ORANGE, GREY])
        axes.set(ylabel=f"tokens per second, {modes[0]['num_conversations']} conversations")

    return [
        Panel("Time to first token, turn by turn, with KV slots and without; whiskers to p95", draw_turns, height_in=4),
        Panel("Throughput of conversations at once and one after the other", draw_throughput, height_in=4),
    ]
