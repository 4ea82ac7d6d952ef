"""The picture of a Sim-LLM benchmark: quality against speed, a line of thresholds for each mode."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvarena.bench.panels import Panel, save_png
from kvarena.bench.results import Row, load_results
from kvarena.bench.series import BLUE, GREY, ORANGE, Series, Styles
from kvarena.bench.simllm.contenders import NO_REUSE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STYLES = Styles(colours={NO_REUSE: GREY, "aligned": ORANGE, "top_layer": BLUE})
METRICS = {"exact_match": "exact match (%)", "agreement": "same answer as full prefill (%)"}


def plot(result_path: Path, image_path: Path) -> None:
    """Speed is the shape's, quality the trained model's. Raises `ValueError` when the file holds no such benchmark."""
    result = load_results(result_path)
    if result.get("settings", {}).get("benchmark") != "simllm" or not result["rows"]:
        raise ValueError(f"{result_path} holds no Sim-LLM benchmark")
    save_png(panels(result), image_path, width_in=11, num_columns=len(METRICS))


def panels(result: Mapping[str, Any]) -> list[Panel]:
    points = joined(result["rows"])
    return [
        Panel(
            f"{label[0].upper()}{label[1:]} against throughput, by mode; points: thresholds, whiskers: 95 % intervals",
            partial(_draw, points, metric),
            height_in=4.4,
        )
        for metric, label in METRICS.items()
    ]


def joined(rows: list[Row]) -> list[tuple[Row, Row]]:
    """Speed and quality of the same mode and threshold, of two models where there are two."""
    speed = {_setup(row): row for row in reversed(rows)}
    quality = {_setup(row): row for row in rows}
    return [(speed[setup], quality[setup]) for setup in quality]


def _setup(row: Row) -> tuple[str | None, float | None]:
    return row["mode"], row["similarity_threshold"]


def _draw(points: list[tuple[Row, Row]], metric: str, axes: Axes) -> None:
    for mode in dict.fromkeys(quality["mode"] for _, quality in points):
        line = [point for point in points if point[1]["mode"] == mode]
        x = [speed["throughput_vs_no_reuse"] for speed, _ in line]
        y, low, high = ([100 * quality[metric][end] for _, quality in line] for end in ("mean", "low", "high"))
        STYLES.draw(axes, [Series(mode or NO_REUSE, mode or NO_REUSE, x, y, low, high)])
        for (_, quality), place in zip(line, zip(x, y, strict=True), strict=True):
            if mode:
                text = f"{quality['similarity_threshold']:g}"
                axes.annotate(text, place, textcoords="offset points", xytext=(1, 6), fontsize=7, rotation=55)
    axes.set(xlabel="throughput, times that without reuse", ylabel=METRICS[metric], ylim=(-3, 115))
    axes.grid(visible=True, alpha=0.3)
