"""The picture of an eval: quality against the recomputed share, and against time to first token, a line per policy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvarena.bench.panels import Panel, save_png
from kvarena.bench.quality.rows import ALL_KINDS
from kvarena.bench.quality.setups import Setup
from kvarena.bench.results import Row, grouped, load_results
from kvarena.bench.series import Series, Styles, drawn_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WITH_ITSELF = {"agreement": 1.0, "token_agreement": 1.0, "kl_along_answer": 0.0}
"""How full prefill compares with full prefill."""
IN_NATS = ("kl_along_answer",)
"""The other metrics are shares, and drawn in percent."""


def main_metric(result: Mapping[str, Any]) -> str:
    """Right answers as the file counts them: older ones have only exact matches."""
    return "correct" if any(row.get("correct") for row in result["rows"]) else "exact_match"


def plot(result_path: Path, image_path: Path) -> None:
    """Right answers, a row of pictures for each kind of question; token agreement and KL over all of them.

    Raises `ValueError` when the file holds no eval.
    """
    result = load_results(result_path)
    if result.get("settings", {}).get("benchmark") != "eval" or not result["rows"]:
        raise ValueError(f"{result_path} holds no eval")
    styles = Styles(map(drawn_name, result["rows"]))

    def pairs(metric: str) -> list[tuple[Panel, Panel]]:
        return list(zip(by_share(result, metric, styles), by_time(result, metric, styles), strict=True))

    shown = [*pairs(main_metric(result)), *pairs("token_agreement")[:1], *pairs("kl_along_answer")[:1]]
    save_png([panel for pair in shown for panel in pair], image_path, width_in=11, num_columns=2)


def by_share(result: Mapping[str, Any], metric: str, styles: Styles) -> list[Panel]:
    """A panel for each kind of question: the metric against what was recomputed, full prefill as a line across."""

    def draw(rows: Sequence[Row], asked: str, axes: Axes) -> None:
        styles.draw(axes, lines([row for row in rows if row["policy"]], metric, _share))
        for row in rows:
            if row["policy"] is None:
                _draw_level(axes, row, metric, styles)
        _label(axes, "chunk tokens recomputed (%)", metric, asked)

    return _panels(result, metric, draw, "against the share of recomputed tokens; full prefill as a line across")


def by_time(result: Mapping[str, Any], metric: str, styles: Styles) -> list[Panel]:
    """A panel for each kind of question: the metric against the median time to the first token."""

    def draw(rows: Sequence[Row], asked: str, axes: Axes) -> None:
        styles.draw(axes, lines([row for row in rows if row.get(metric) and row["ttft_ms"]], metric, _ttft))
        _label(axes, "time to first token (ms), median", metric, asked)

    return _panels(result, metric, draw, "against time to first token")


def lines(rows: Sequence[Row], metric: str, x: Callable[[Row], float]) -> list[Series]:
    """A line for each contender, policy and check layer, in the order of what was recomputed."""
    found: list[Series] = []
    for label, of_line in grouped(rows, _line_label).items():
        line = sorted(of_line, key=_share)
        name = drawn_name(line[0])
        y, low, high = ([_scale(metric) * row[metric][end] for row in line] for end in ("mean", "low", "high"))
        variant = sum(other.name == name for other in found)
        found.append(Series(name, label, [x(row) for row in line], y, low, high, variant))
    return found


def _panels(
    result: Mapping[str, Any], metric: str, draw: Callable[[Sequence[Row], str, Axes], None], against: str
) -> list[Panel]:
    rows = [
        row
        for row in _shown(result["rows"])
        if row.get(metric) or (metric in WITH_ITSELF and _is_reference(row) and _is_compared(result, metric))
    ]
    shown = _name(metric)
    shown = shown[0].upper() + shown[1:]
    return [
        Panel(f"{shown} ({asked}) {against}; whiskers are 95 % intervals", partial(draw, of_kind, asked))
        for asked, of_kind in grouped(rows, _asked).items()
    ]


def _shown(rows: Sequence[Row]) -> list[Row]:
    """Every kind of all questions, and all kinds together of those that full prefill answers right, if it's fewer."""
    has_fewer = len({row["num_questions"] for row in rows if row["kind"] == ALL_KINDS}) > 1
    return [row for row in rows if not _is_answered(row) or (row["kind"] == ALL_KINDS and has_fewer)]


def _asked(row: Row) -> str:
    return "questions that full prefill answers right" if _is_answered(row) else f"{row['kind']} questions"


def _is_answered(row: Row) -> bool:
    return str(row.get("subset", "all")) == "answered"


def _is_compared(result: Mapping[str, Any], metric: str) -> bool:
    return any(row.get(metric) for row in result["rows"])


def _is_reference(row: Row) -> bool:
    """Whether other answers were compared with this contender's."""
    return row["policy"] is None and row["exact_match"] is not None and row["agreement"] is None


def _name(metric: str) -> str:
    return {"correct": "right answers", "kl_along_answer": "KL along the answer"}.get(metric, metric.replace("_", " "))


def _scale(metric: str) -> float:
    return 1.0 if metric in IN_NATS else 100.0


def _label(axes: Axes, x: str, metric: str, asked: str) -> None:
    unit = "nats" if metric in IN_NATS else "%"
    axes.set(xlabel=x, ylabel=f"{_name(metric)} ({unit})\n{asked}")
    axes.set_ylim(*((0, None) if metric in IN_NATS else (-3, 103)))
    axes.grid(visible=True, alpha=0.3)


def _share(row: Row) -> float:
    return 100 * float(row["recomputed_ratio"] or 0.0)


def _ttft(row: Row) -> float:
    return float(row["ttft_ms"]["median"])


def _line_label(row: Row) -> str:
    layer = "" if row["check_layer"] is None else f"layer {row['check_layer']}"
    return " ".join(part for part in (row["contender"], Setup.of_row(row).policy_label, layer) if part)


def _draw_level(axes: Axes, row: Row, metric: str, styles: Styles) -> None:
    interval = row.get(metric) or dict.fromkeys(("mean", "low", "high"), WITH_ITSELF[metric])
    mean, low, high = (_scale(metric) * interval[end] for end in ("mean", "low", "high"))
    colour = styles.colour(drawn_name(row))
    axes.axhline(mean, color=colour, linestyle="--", linewidth=1.3, label=_line_label(row))
    axes.axhspan(low, high, color=colour, alpha=0.12, linewidth=0)
