"""The picture of a Sim-LLM benchmark: quality against speed, a line of thresholds for each mode."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kvarena.bench.results import Row, load_results
from kvarena.bench.simllm.contenders import NO_REUSE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {"aligned": "#c2571a", "top_layer": "#1f6fb4"}
GREY = "#666666"
METRICS = {"exact_match": "exact match (%)", "agreement": "same answer as full prefill (%)"}


def plot(result_path: Path, image_path: Path) -> None:
    """Speed is the shape's, quality the trained model's. Raises `ValueError` when the file holds no such benchmark."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    result = load_results(result_path)
    if result.get("settings", {}).get("benchmark") != "simllm" or not result["rows"]:
        raise ValueError(f"{result_path} holds no Sim-LLM benchmark")
    points = joined(result["rows"])
    figure, axes = pyplot.subplots(1, len(METRICS), figsize=(11, 4.4), layout="constrained")
    for own, (metric, label) in zip(axes, METRICS.items(), strict=True):
        _draw(own, points, metric)
        own.set(xlabel="throughput, times that without reuse", ylabel=label, ylim=(-3, 115))
        own.grid(visible=True, alpha=0.3)
        own.legend(fontsize=8, loc="center right")
    figure.savefig(image_path, dpi=130)
    pyplot.close(figure)


def joined(rows: list[Row]) -> list[tuple[Row, Row]]:
    """Speed and quality of the same mode and threshold, of two models where there are two."""
    speed = {_setup(row): row for row in reversed(rows)}
    quality = {_setup(row): row for row in rows}
    return [(speed[setup], quality[setup]) for setup in quality]


def _setup(row: Row) -> tuple[str | None, float | None]:
    return row["mode"], row["similarity_threshold"]


def _draw(axes: Axes, points: list[tuple[Row, Row]], metric: str) -> None:
    for mode in dict.fromkeys(quality["mode"] for _, quality in points):
        line = [point for point in points if point[1]["mode"] == mode]
        x = [speed["throughput_vs_no_reuse"] for speed, _ in line]
        y = [100 * quality[metric]["mean"] for _, quality in line]
        errors = [[100 * abs(q[metric]["mean"] - q[metric][end]) for _, q in line] for end in ("low", "high")]
        axes.errorbar(
            x,
            y,
            yerr=errors,
            capsize=2,
            linewidth=1.2,
            color=COLOURS.get(mode, GREY),
            marker="o" if mode else "*",
            markersize=5 if mode else 11,
            label=mode or NO_REUSE,
        )
        for (_, quality), place in zip(line, zip(x, y, strict=True), strict=True):
            if mode:
                text = f"{quality['similarity_threshold']:g}"
                axes.annotate(text, place, textcoords="offset points", xytext=(1, 6), fontsize=7, rotation=55)
