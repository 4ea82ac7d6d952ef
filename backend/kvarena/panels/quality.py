"""The panels of `kvarena eval` and `calibrate`, and of Sim-LLM's quality beside its speed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from kvarena.panels.panel import (
    ALL_KINDS,
    BLUE,
    GREEN,
    GREY,
    NO_REUSE,
    ORANGE,
    Axis,
    Colours,
    Level,
    Panel,
    Result,
    Row,
    Series,
    colours_of,
    drawn_name,
    grouped,
    layer_and_sink,
    policy_label,
    variant_label,
)

WITH_ITSELF = {"agreement": 1.0, "token_agreement": 1.0, "kl_along_answer": 0.0}
"""How full prefill compares with full prefill."""
IN_NATS = ("kl_along_answer", "first_token_kl")
"""The other metrics are shares, and drawn in percent."""
METRICS = {
    "correct": "right answers",
    "exact_match": "exact match",
    "f1": "F1",
    "agreement": "agreement",
    "token_agreement": "token agreement",
    "kl_along_answer": "KL along the answer",
    "first_token_kl": "KL of the first token",
}
"""The groups of figures of a row, by the names that people read."""


def metric_title(metric: str) -> str:
    """With a capital letter."""
    return METRICS[metric][0].upper() + METRICS[metric][1:]


def main_metric(result: Result) -> str:
    """Right answers as the file counts them: older ones have only exact matches."""
    return "correct" if any(row.get("correct") for row in result["rows"]) else "exact_match"


def share_panel(rows: Sequence[Row], metric: str, asked: str, colours: Colours) -> Panel:
    """The metric against what was recomputed, full prefill as a line across. All rows are of one kind of question."""
    series, levels = lines_over_share(rows, metric)
    return Panel(
        _quality_title(metric, asked, "against the share of recomputed tokens; full prefill as a line across"),
        Axis("chunk tokens recomputed (%)", limits=(0, 100)),
        _quality_axis(metric, asked),
        series,
        levels,
        colours=colours,
    )


def lines_over_share(rows: Sequence[Row], metric: str, scale: float | None = None) -> tuple[list[Series], list[Level]]:
    """Of those that blend, and of those that have no share to choose."""
    blending = lines([row for row in rows if not _is_level(row)], metric, _share, scale=scale)
    return blending, [_level(row, metric, scale) for row in rows if _is_level(row)]


def time_panel(rows: Sequence[Row], metric: str, asked: str, colours: Colours) -> Panel:
    """The metric against the median time to the first token."""
    return Panel(
        _quality_title(metric, asked, "against time to first token"),
        Axis("time to first token (ms), median"),
        _quality_axis(metric, asked),
        lines([row for row in rows if row.get(metric) and row["ttft_ms"]], metric, _ttft, noted=True),
        colours=colours,
    )


def by_share(result: Result, metric: str, colours: Colours) -> list[Panel]:
    """A panel for each kind of question."""
    return [share_panel(rows, metric, asked, colours) for asked, rows in _by_questions(result, metric).items()]


def by_time(result: Result, metric: str, colours: Colours) -> list[Panel]:
    """A panel for each kind of question."""
    return [time_panel(rows, metric, asked, colours) for asked, rows in _by_questions(result, metric).items()]


def eval_panels(result: Result, colours: Colours) -> list[Panel]:
    """Right answers, a row of pictures for each kind of question; token agreement and KL over all of them."""

    def pairs(metric: str) -> list[tuple[Panel, Panel]]:
        return list(zip(by_share(result, metric, colours), by_time(result, metric, colours), strict=True))

    shown = [*pairs(main_metric(result)), *pairs("token_agreement")[:1], *pairs("kl_along_answer")[:1]]
    return [panel for pair in shown for panel in pair]


def lines(
    rows: Sequence[Row], metric: str, x: Callable[[Row], float], noted: bool = False, scale: float | None = None
) -> list[Series]:
    """A line for each contender, policy and check layer, in the order of what was recomputed; `noted`: with ratios."""
    found: list[Series] = []
    scale = _scale(metric) if scale is None else scale
    for label, of_line in grouped(rows, _line_label).items():
        line = sorted(of_line, key=_share)
        name = drawn_name(line[0])
        y, low, high = ([scale * row[metric][end] for row in line] for end in ("mean", "low", "high"))
        variant = sum(other.name == name for other in found)
        notes = [f"{100 * row['ratio']:g} %" if noted and row["ratio"] is not None else "" for row in line]
        tips = [f"{row['num_questions']} questions, {row['num_failed']} failed" for row in line]
        found.append(Series(name, label, [x(row) for row in line], y, low, high, variant, notes, tips))
    return found


def rows_with(rows: Sequence[Row], metric: str) -> list[Row]:
    """Those that have the metric; full prefill's too, where others are compared with it."""
    is_compared = metric in WITH_ITSELF and any(row.get(metric) for row in rows)
    return [row for row in rows if row.get(metric) or (is_compared and _is_reference(row))]


def _by_questions(result: Result, metric: str) -> dict[str, list[Row]]:
    return grouped(rows_with(_shown(result["rows"]), metric), _asked)


def _quality_title(metric: str, asked: str, against: str) -> str:
    return f"{metric_title(metric)} ({asked}) {against}; whiskers are 95 % intervals"


def _quality_axis(metric: str, asked: str) -> Axis:
    unit, limits = ("nats", (0, math.inf)) if metric in IN_NATS else ("%", (0, 100))
    return Axis(f"{METRICS[metric]} ({unit})\n{asked}", limits=limits)


def _shown(rows: Sequence[Row]) -> list[Row]:
    """All questions by kind; and those that full prefill answers right, all kinds together, where these are fewer."""
    has_fewer = len({row["num_questions"] for row in rows if row["kind"] == ALL_KINDS}) > 1
    return [row for row in rows if not _is_answered(row) or (row["kind"] == ALL_KINDS and has_fewer)]


def _asked(row: Row) -> str:
    return "questions that full prefill answers right" if _is_answered(row) else f"{row['kind']} questions"


def _is_answered(row: Row) -> bool:
    return str(row.get("subset", "all")) == "answered"


def _is_reference(row: Row) -> bool:
    """Whether other answers were compared with this contender's."""
    return _is_level(row) and row["num_failed"] < row["num_questions"] and row["agreement"] is None


def _is_level(row: Row) -> bool:
    """Whether it has no share to choose: it doesn't blend, or recomputes everything."""
    return row["policy"] in (None, "all")


def _scale(metric: str) -> float:
    return 1.0 if metric in IN_NATS else 100.0


def _share(row: Row) -> float:
    share = row["recomputed_ratio"]
    return 100 * float((row["ratio"] if share is None else share) or 0.0)


def _ttft(row: Row) -> float:
    return float(row["ttft_ms"]["median"])


def _line_label(row: Row) -> str:
    return " ".join(part for part in (row["contender"], policy_label(row), *layer_and_sink(row)) if part)


def _level(row: Row, metric: str, scale: float | None = None) -> Level:
    interval = row.get(metric) or dict.fromkeys(("mean", "low", "high"), WITH_ITSELF.get(metric, 0.0))
    scale = _scale(metric) if scale is None else scale
    return Level(drawn_name(row), _line_label(row), *(scale * interval[end] for end in ("mean", "low", "high")))


WANTED = "wanted"


def calibrate_panels(result: Result, colours: Colours) -> list[Panel]:
    """Closeness to full prefill against time, a panel for each policy and a line for each check layer and sink.

    With the agreement that was wanted, and the setting that was chosen.
    """
    settings = result["settings"]
    rows = [row for row in result["rows"] if row["token_agreement"] and row["ttft_ms"]]
    is_met = bool(settings["chosen"])
    told = "" if is_met else "; no setting reaches what was wanted"
    wanted = 100 * settings["agreement"]
    panels = []
    for label, own in grouped(rows, policy_label).items():
        series = [replace(one, name=one.label, variant=0) for one in lines(own, "token_agreement", _ttft, noted=True)]
        chosen = [row for row in own if is_met and _choices(row) == settings["chosen"]]
        series += [
            replace(mark, name=mark.label, label=f"chosen: {variant_label(row)}", is_mark=True)
            for row in chosen
            for mark in lines([row], "token_agreement", _ttft)
        ]
        title = f"Token agreement against time to first token, {label}; whiskers are 95 % intervals{told}"
        panels.append(
            Panel(
                title,
                Axis("time to first token (ms), median"),
                Axis("token agreement (%)", limits=(0, 100)),
                series,
                [Level(WANTED, f"wanted: {wanted:g} %", wanted, wanted, wanted)],
                colours=colours_of([one.name for one in series], {WANTED: GREY}),
            )
        )
    return panels


def _choices(row: Row) -> dict[str, Any]:
    chosen = {name: row.get(name) for name in ("policy", "ratio", "check_layer", "max_ttft_ms", "sink_tokens")}
    return {name: value for name, value in (chosen | (row.get("options") or {})).items() if value is not None}


SIMLLM_COLOURS = colours_of((), {NO_REUSE: GREY, "aligned": ORANGE, "top_layer": BLUE, "sandwich": GREEN})
SIMLLM_METRICS = {"exact_match": "exact match (%)", "agreement": "same answer as full prefill (%)"}


def simllm_panels(result: Result, colours: Colours) -> list[Panel]:
    """Quality against speed. Speed is the shape's, quality the trained model's."""
    points = speed_and_quality(result["rows"])
    return [
        Panel(
            f"{label[0].upper()}{label[1:]} against throughput, by mode; points: thresholds, whiskers: 95 % intervals",
            Axis("throughput, times that without reuse"),
            Axis(label, limits=(0, 100)),
            [_simllm_line(mode, points, metric) for mode in dict.fromkeys(quality["mode"] for _, quality in points)],
            colours=SIMLLM_COLOURS,
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


def _simllm_line(mode: str | None, points: list[tuple[Row, Row]], metric: str) -> Series:
    line = [point for point in points if point[1]["mode"] == mode]
    x = [speed["throughput_vs_no_reuse"] for speed, _ in line]
    y, low, high = ([100 * quality[metric][end] for _, quality in line] for end in ("mean", "low", "high"))
    notes = [f"{quality['similarity_threshold']:g}" if mode else "" for _, quality in line]
    return Series(mode or NO_REUSE, mode or NO_REUSE, x, y, low, high, notes=notes)
