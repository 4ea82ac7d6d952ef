"""The picture of each benchmark, from its result file: eval, prefix, ai100, simllm.

Eval: quality against the recomputed share and against time to first token, a line per policy. Prefix: time to
first token over context length, a line per level and scenario. AI 100: time to first token turn by turn, and
throughput. Sim-LLM: quality against speed, a line of thresholds for each mode.
`kvarena bench ttft` is drawn by `report/page.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvarena.bench.plotting import Panel, Series, Styles, drawn_name, log_x, log_y, save_png
from kvarena.bench.results import ALL_KINDS, NO_REUSE, Row, grouped, load_results
from kvarena.bench.variants import Variant
from kvarena.palette import BLUE, GREY, ORANGE

if TYPE_CHECKING:
    from matplotlib.axes import Axes


WITH_ITSELF = {"agreement": 1.0, "token_agreement": 1.0, "kl_along_answer": 0.0}
"""How full prefill compares with full prefill."""
IN_NATS = ("kl_along_answer",)
"""The other metrics are shares, and drawn in percent."""


def main_metric(result: Mapping[str, Any]) -> str:
    """Right answers as the file counts them: older ones have only exact matches."""
    return "correct" if any(row.get("correct") for row in result["rows"]) else "exact_match"


def plot_eval(result_path: Path, image_path: Path) -> None:
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
    return " ".join(part for part in (row["contender"], Variant.of_row(row).policy_label, layer) if part)


def _draw_level(axes: Axes, row: Row, metric: str, styles: Styles) -> None:
    interval = row.get(metric) or dict.fromkeys(("mean", "low", "high"), WITH_ITSELF[metric])
    mean, low, high = (_scale(metric) * interval[end] for end in ("mean", "low", "high"))
    colour = styles.colour(drawn_name(row))
    axes.axhline(mean, color=colour, linestyle="--", linewidth=1.3, label=_line_label(row))
    axes.axhspan(low, high, color=colour, alpha=0.12, linewidth=0)


PREFIX_STYLES = Styles(colours={"no KV cache": GREY, "KV cache": BLUE, "prefix cache": ORANGE})
PREFIX_SCENARIOS = ("cold", "new question", "repeat")


def plot_prefix(result_path: Path, image_path: Path) -> None:
    """Raises `ValueError` when the file holds no prefix benchmark."""
    result = load_results(result_path)
    if not result["rows"] or "scenario" not in result["rows"][0]:
        raise ValueError(f"{result_path} holds no prefix benchmark")
    save_png(prefix_panels(result), image_path, width_in=8)


def prefix_panels(result: Mapping[str, Any]) -> list[Panel]:
    rows: list[Row] = result["rows"]

    def draw(axes: Axes) -> None:
        PREFIX_STYLES.draw(
            axes, (_prefix_line(rows, *pair) for pair in dict.fromkeys((r["level"], r["scenario"]) for r in rows))
        )
        log_x(axes, (row["context_tokens"] for row in rows))
        log_y(axes)
        axes.set(xlabel="prompt tokens", ylabel="time to first token (ms), median")
        axes.grid(visible=True, which="major", alpha=0.3)

    return [Panel("Time to first token over prompt length, by level of caching; whiskers to p95", draw, height_in=5)]


def _prefix_line(rows: list[Row], level: str, scenario: str) -> Series:
    own = [row for row in rows if (row["level"], row["scenario"]) == (level, scenario)]
    medians = [row["ttft_ms"]["median"] for row in own]
    return Series(
        level,
        f"{level}, {scenario}",
        x=[row["context_tokens"] for row in own],
        y=medians,
        low=medians,
        high=[row["ttft_ms"]["p95"] for row in own],
        variant=PREFIX_SCENARIOS.index(scenario),
    )


AI100_STYLES = Styles(colours={"no cache": GREY, "KV slots": ORANGE})
TTFT_KEYS = {"no cache": "no_cache_ttft_ms", "KV slots": "slots_ttft_ms"}


def plot_ai100(result_path: Path, image_path: Path) -> None:
    """Raises `ValueError` when the file holds no AI 100 benchmark."""
    result = load_results(result_path)
    if result.get("settings", {}).get("benchmark") != "ai100":
        raise ValueError(f"{result_path} holds no ai100 benchmark")
    save_png(ai100_panels(result), image_path, width_in=9, num_columns=2, width_ratios=(2, 1))


def ai100_panels(result: Mapping[str, Any]) -> list[Panel]:
    turns = [row for row in result["rows"] if row["measure"] == "first token"]
    modes = [row for row in result["rows"] if row["measure"] == "throughput"]

    def draw_turns(axes: Axes) -> None:
        for name, key in TTFT_KEYS.items():
            medians, p95 = ([row[key][figure] for row in turns] for figure in ("median", "p95"))
            AI100_STYLES.draw(axes, [Series(name, name, [row["turn"] for row in turns], medians, medians, p95)])
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


SIMLLM_STYLES = Styles(colours={NO_REUSE: GREY, "aligned": ORANGE, "top_layer": BLUE})
SIMLLM_METRICS = {"exact_match": "exact match (%)", "agreement": "same answer as full prefill (%)"}


def plot_simllm(result_path: Path, image_path: Path) -> None:
    """Speed is the shape's, quality the trained model's. Raises `ValueError` when the file holds no such benchmark."""
    result = load_results(result_path)
    if result.get("settings", {}).get("benchmark") != "simllm" or not result["rows"]:
        raise ValueError(f"{result_path} holds no Sim-LLM benchmark")
    save_png(simllm_panels(result), image_path, width_in=11, num_columns=len(SIMLLM_METRICS))


def simllm_panels(result: Mapping[str, Any]) -> list[Panel]:
    points = speed_and_quality(result["rows"])
    return [
        Panel(
            f"{label[0].upper()}{label[1:]} against throughput, by mode; points: thresholds, whiskers: 95 % intervals",
            partial(_draw_simllm, points, metric),
            height_in=4.4,
        )
        for metric, label in SIMLLM_METRICS.items()
    ]


def speed_and_quality(rows: list[Row]) -> list[tuple[Row, Row]]:
    """Speed and quality of the same mode and threshold, of two models where there are two."""
    speed = {_mode_and_threshold(row): row for row in reversed(rows)}
    quality = {_mode_and_threshold(row): row for row in rows}
    return [(speed[variant], quality[variant]) for variant in quality]


def _mode_and_threshold(row: Row) -> tuple[str | None, float | None]:
    return row["mode"], row["similarity_threshold"]


def _draw_simllm(points: list[tuple[Row, Row]], metric: str, axes: Axes) -> None:
    for mode in dict.fromkeys(quality["mode"] for _, quality in points):
        line = [point for point in points if point[1]["mode"] == mode]
        x = [speed["throughput_vs_no_reuse"] for speed, _ in line]
        y, low, high = ([100 * quality[metric][end] for _, quality in line] for end in ("mean", "low", "high"))
        SIMLLM_STYLES.draw(axes, [Series(mode or NO_REUSE, mode or NO_REUSE, x, y, low, high)])
        for (_, quality), place in zip(line, zip(x, y, strict=True), strict=True):
            if mode:
                text = f"{quality['similarity_threshold']:g}"
                axes.annotate(text, place, textcoords="offset points", xytext=(1, 6), fontsize=7, rotation=55)
    axes.set(xlabel="throughput, times that without reuse", ylabel=SIMLLM_METRICS[metric], ylim=(-3, 115))
    axes.grid(visible=True, alpha=0.3)
