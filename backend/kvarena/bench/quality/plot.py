"""The picture of an eval: quality against the recomputed share, and against time to first token, a line per policy."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kvarena.bench.quality.setups import Setup
from kvarena.bench.results import Row, load_results

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#c2571a", "#1f6fb4", "#3a8f4d", "#8a4fb0", "#b08a1f")
GREY = "#666666"


def plot(result_path: Path, image_path: Path, metric: str = "exact_match") -> None:
    """A row of pictures for each kind of question. Raises `ValueError` when the file holds no eval."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    result = load_results(result_path)
    if result.get("settings", {}).get("benchmark") != "eval" or not result["rows"]:
        raise ValueError(f"{result_path} holds no eval")
    rows = [row for row in result["rows"] if row[metric] and row["ttft_ms"]]
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    height = 3.1 * max(1, len(kinds))
    figure, grid = pyplot.subplots(max(1, len(kinds)), 2, figsize=(11, height), layout="constrained", squeeze=False)
    for (by_share, by_time), kind in zip(grid, kinds, strict=False):
        of_kind = [row for row in rows if row["kind"] == kind]
        _draw(by_share, [row for row in of_kind if row["policy"]], metric, _share)
        _draw(by_time, of_kind, metric, _ttft)
        _draw_reference(by_share, of_kind, metric)
        by_share.set(ylabel=f"{metric.replace('_', ' ')}, {kind}", xlabel="chunk tokens recomputed (%)")
        by_time.set(xlabel="time to first token (ms), median")
        for axes in (by_share, by_time):
            axes.set_ylim(-3, 103)
            axes.grid(visible=True, alpha=0.3)
        by_time.legend(fontsize=7)
    figure.savefig(image_path, dpi=130)
    pyplot.close(figure)


def _share(row: Row) -> float:
    return 100 * float(row["recomputed_ratio"] or 0.0)


def _ttft(row: Row) -> float:
    return float(row["ttft_ms"]["median"])


def _draw(axes: Axes, rows: Sequence[Row], metric: str, x: Callable[[Row], float]) -> None:
    names = [_line_name(row) for row in rows if row["policy"]]
    colours = dict(zip(dict.fromkeys(names), itertools.cycle(COLOURS), strict=False))
    for name in dict.fromkeys(map(_line_name, rows)):
        line = sorted((row for row in rows if _line_name(row) == name), key=_share)
        means = [100 * row[metric]["mean"] for row in line]
        errors = [[100 * abs(row[metric]["mean"] - row[metric][end]) for row in line] for end in ("low", "high")]
        axes.errorbar(
            [x(row) for row in line],
            means,
            yerr=errors,
            marker="o",
            markersize=4,
            capsize=2,
            linewidth=1.2,
            color=colours.get(name, GREY),
            label=name,
        )


def _line_name(row: Row) -> str:
    layer = "" if row["check_layer"] is None else f"layer {row['check_layer']}"
    return " ".join(part for part in (row["contender"], Setup.of_row(row).policy_label, layer) if part)


def _draw_reference(axes: Axes, rows: Sequence[Row], metric: str) -> None:
    for row in rows:
        if row["policy"] is None:
            axes.axhline(100 * row[metric]["mean"], color=GREY, linestyle="--", linewidth=1)
            axes.axhspan(100 * row[metric]["low"], 100 * row[metric]["high"], color=GREY, alpha=0.1, linewidth=0)
