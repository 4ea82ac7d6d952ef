"""The picture of an eval: quality against the recomputed share, and against time to first token, a line per policy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvarena.bench.panels import Panel, save_png
from kvarena.bench.quality.setups import Setup
from kvarena.bench.results import Row, grouped, load_results
from kvarena.bench.series import Series, Styles, drawn_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ITSELF = {"mean": 1.0, "low": 1.0, "high": 1.0}
"""How full prefill agrees with full prefill."""


def plot(result_path: Path, image_path: Path, metric: str = "exact_match") -> None:
    """A row of pictures for each kind of question. Raises `ValueError` when the file holds no eval."""
    result = load_results(result_path)
    if result.get("settings", {}).get("benchmark") != "eval" or not result["rows"]:
        raise ValueError(f"{result_path} holds no eval")
    styles = Styles(map(drawn_name, result["rows"]))
    pairs = zip(by_share(result, metric, styles), by_time(result, metric, styles), strict=True)
    save_png([panel for pair in pairs for panel in pair], image_path, width_in=11, num_columns=2)


def by_share(result: Mapping[str, Any], metric: str, styles: Styles) -> list[Panel]:
    """A panel for each kind of question: the metric against what was recomputed, full prefill as a line across."""

    def draw(rows: Sequence[Row], kind: str, axes: Axes) -> None:
        styles.draw(axes, lines([row for row in rows if row["policy"]], metric, _share))
        for row in rows:
            if row["policy"] is None:
                _draw_level(axes, row, row[metric] or ITSELF, styles)
        _label(axes, "chunk tokens recomputed (%)", metric, kind)

    return _panels(result, metric, draw, "against the share of recomputed tokens; full prefill as a line across")


def by_time(result: Mapping[str, Any], metric: str, styles: Styles) -> list[Panel]:
    """A panel for each kind of question: the metric against the median time to the first token."""

    def draw(rows: Sequence[Row], kind: str, axes: Axes) -> None:
        styles.draw(axes, lines([row for row in rows if row[metric] and row["ttft_ms"]], metric, _ttft))
        _label(axes, "time to first token (ms), median", metric, kind)

    return _panels(result, metric, draw, "against time to first token")


def lines(rows: Sequence[Row], metric: str, x: Callable[[Row], float]) -> list[Series]:
    """A line for each contender, policy and check layer, in the order of what was recomputed; in percent."""
    found: list[Series] = []
    for label, of_line in grouped(rows, _line_label).items():
        line = sorted(of_line, key=_share)
        name = drawn_name(line[0])
        y, low, high = ([100 * row[metric][end] for row in line] for end in ("mean", "low", "high"))
        variant = sum(other.name == name for other in found)
        found.append(Series(name, label, [x(row) for row in line], y, low, high, variant))
    return found


def _panels(
    result: Mapping[str, Any], metric: str, draw: Callable[[Sequence[Row], str, Axes], None], against: str
) -> list[Panel]:
    rows = [row for row in result["rows"] if row[metric] or (metric == "agreement" and _is_reference(row))]
    shown = metric.replace("_", " ").capitalize()
    return [
        Panel(f"{shown} ({kind} questions) {against}; whiskers are 95 % intervals", partial(draw, of_kind, kind))
        for kind, of_kind in grouped(rows, lambda row: str(row["kind"])).items()
    ]


def _is_reference(row: Row) -> bool:
    """Whether other answers were compared with this contender's."""
    return row["policy"] is None and row["exact_match"] is not None and row["agreement"] is None


def _label(axes: Axes, x: str, metric: str, kind: str) -> None:
    axes.set(xlabel=x, ylabel=f"{metric.replace('_', ' ')} (%), {kind}", ylim=(-3, 103))
    axes.grid(visible=True, alpha=0.3)


def _share(row: Row) -> float:
    return 100 * float(row["recomputed_ratio"] or 0.0)


def _ttft(row: Row) -> float:
    return float(row["ttft_ms"]["median"])


def _line_label(row: Row) -> str:
    layer = "" if row["check_layer"] is None else f"layer {row['check_layer']}"
    return " ".join(part for part in (row["contender"], Setup.of_row(row).policy_label, layer) if part)


def _draw_level(axes: Axes, row: Row, interval: Mapping[str, float], styles: Styles) -> None:
    mean, low, high = (100 * interval[end] for end in ("mean", "low", "high"))
    colour = styles.colour(drawn_name(row))
    axes.axhline(mean, color=colour, linestyle="--", linewidth=1.3, label=_line_label(row))
    axes.axhspan(low, high, color=colour, alpha=0.12, linewidth=0)
