"""The picture of a prefix benchmark: time to first token over context length, a line per level and scenario."""

from __future__ import annotations

from pathlib import Path

from kvarena.bench.results import load_results

COLOURS = {"no KV cache": "#8a8a8a", "KV cache": "#1f6fb4", "prefix cache": "#c2571a"}
LINES = {"cold": "-", "repeat": ":", "new question": "--"}


def plot(result_path: Path, image_path: Path) -> None:
    """Raises `ValueError` when the file holds no prefix benchmark."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = load_results(result_path)["rows"]
    if not rows or "scenario" not in rows[0]:
        raise ValueError(f"{result_path} holds no prefix benchmark")
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for level, scenario in dict.fromkeys((row["level"], row["scenario"]) for row in rows):
        line = [row for row in rows if (row["level"], row["scenario"]) == (level, scenario)]
        axes.plot(
            [row["context_tokens"] for row in line],
            [row["ttft_ms"]["median"] for row in line],
            LINES[scenario],
            color=COLOURS[level],
            marker="o",
            markersize=4,
            label=f"{level}, {scenario}",
        )
    axes.set(xscale="log", yscale="log", xlabel="prompt tokens", ylabel="time to first token (ms), median")
    axes.grid(visible=True, which="major", alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(image_path, dpi=150)
    pyplot.close(figure)
