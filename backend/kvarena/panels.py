"""What is to be seen in a result file: panels of lines or bars, as data.

Draws nothing and knows nothing of how figures were measured: `bench/plotting.py` draws panels with matplotlib for
pictures and reports, the page draws the same ones in the browser. A name (a policy, a contender, a mode) has one colour
and one marker wherever it is drawn; lines of one name differ by their dashes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from kvarena.palette import BLUE, COLOURS, GREEN, GREY, ORANGE, colours_of

Row = dict[str, Any]
Result = Mapping[str, Any]
Colours = Mapping[str, str]
Ends = tuple[float, float, float]
"""A figure's middle, and where its whiskers end."""
Group = TypeVar("Group", bound=Hashable)

REFERENCE = "plain"
"""The contender that the others are compared with."""
ALL_KINDS = "all"
"""The `kind` of a row about questions of every kind."""
NO_REUSE = "no reuse"
"""The mode of a row of Sim-LLM beside which the others are shown."""


@dataclass(frozen=True)
class Axis:
    """`limits` are those of what the figure can be. `at_points`: a tick at each value that was measured."""

    title: str
    is_log: bool = False
    at_points: bool = False
    limits: tuple[float, float] | None = None


@dataclass(frozen=True)
class Series:
    """A line. `low` and `high` are its whiskers' ends. `variant` counts the lines of one name.

    A word of `notes` stands at its point; `tips` are told of it on demand. `is_mark`: points to be seen first.
    """

    name: str
    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    variant: int = 0
    notes: Sequence[str] = ()
    tips: Sequence[str] = ()
    is_mark: bool = False


@dataclass(frozen=True)
class Level:
    """A line across, with its interval as a band."""

    name: str
    label: str
    y: float
    low: float
    high: float


@dataclass(frozen=True)
class Bar:
    """`parts` are stacked from the left: name, length, colour. All bars of a panel have the same names."""

    label: str
    parts: Sequence[tuple[str, float, str]]
    note: str


@dataclass(frozen=True)
class Panel:
    """Lines and levels, or bars from the top down. `title` says what is to be seen."""

    title: str
    x: Axis
    y: Axis = field(default_factory=lambda: Axis(""))
    series: Sequence[Series] = ()
    levels: Sequence[Level] = ()
    bars: Sequence[Bar] = ()
    colours: Colours = field(default_factory=lambda: COLOURS)
    height_in: float = 3.1


def grouped(rows: Iterable[Row], by: Callable[[Row], Group]) -> dict[Group, list[Row]]:
    """In the order in which groups first appear."""
    groups: dict[Group, list[Row]] = {}
    for row in rows:
        groups.setdefault(by(row), []).append(row)
    return groups


def policy_label(row: Mapping[str, Any]) -> str:
    """Such as `kv_deviation (deviation values)`; empty where there is none."""
    options = ", ".join(f"{name} {value}" for name, value in (row.get("options") or {}).items())
    return f"{row.get('policy') or ''}{options and f' ({options})'}"


def variant_label(row: Mapping[str, Any]) -> str:
    """Such as `blend kv_deviation 15 % @2` or `blend kv_deviation 300 ms @2 sink 1`, where 2 is the check layer."""
    ratio, max_ttft_ms = row.get("ratio"), row.get("max_ttft_ms")
    parts = [row["contender"], policy_label(row), None if ratio is None else f"{100 * ratio:g} %"]
    parts.append(None if max_ttft_ms is None else f"{max_ttft_ms:g} ms")
    parts += _layer_and_sink(row)
    return " ".join(part for part in parts if part)


def _layer_and_sink(row: Mapping[str, Any]) -> list[str]:
    layer, sink_tokens = row.get("check_layer"), row.get("sink_tokens")
    return [f"@{layer}"] * (layer is not None) + [f"sink {sink_tokens}"] * (sink_tokens is not None)


def drawn_name(row: Row) -> str:
    """Whose colour a row has: the policy's where our blend ran, else the contender's and the policy's."""
    contender, policy = row["contender"], row.get("policy")
    return (
        str(policy) if policy and contender == "blend" else " ".join(str(part) for part in (contender, policy) if part)
    )


def readable_ms(ms: float) -> str:
    """Three digits, in seconds from one second on."""
    return f"{ms / 1000:.3g} s" if ms >= 1000 else f"{ms:.3g} ms"


def series_of(
    rows: Sequence[Row], label: Callable[[Row], str], x: str, figures: Callable[[Row], Ends | None]
) -> list[Series]:
    """A line for each label over the rows' `x`; rows without figures are left out."""
    found: list[Series] = []
    for of_line in grouped(rows, label).values():
        points = sorted((row[x], *ends) for row in of_line if (ends := figures(row)))
        if points:
            name, (xs, y, low, high) = drawn_name(of_line[0]), zip(*points, strict=True)
            variant = sum(other.name == name for other in found)
            found.append(Series(name, label(of_line[0]), xs, y, low, high, variant))
    return found


def to_p95(key: str) -> Callable[[Row], Ends | None]:
    """The whisker goes from the median up to p95."""

    def ends(row: Row) -> Ends | None:
        spread = row.get(key)
        return (spread["median"], spread["median"], spread["p95"]) if spread else None

    return ends


times_ms = to_p95("ttft_ms")


# -- time to first token -----------------------------------------------------------------------------------------------

UNKNOWN = "unknown"
STORES = {"half": "half-warm store", "none": "no known chunk", UNKNOWN: "store not known"}


def conditions(row: Row) -> str:
    """Such as `warm store` or `warm store, 8 requests at once`.

    What is known of a server's store may be nothing; `prompts` says what it was sent, the same for all contenders.
    """
    state = row["store"] if row["store"] != UNKNOWN else row.get("prompts", UNKNOWN)
    at_once = f", {row['concurrency']} requests at once" if row["concurrency"] > 1 else ""
    return STORES.get(state, f"{state} store") + at_once


def over_context(rows: Sequence[Row], figures: Callable[[Row], Ends | None]) -> list[Series]:
    """A line for each variant."""
    return series_of(rows, variant_label, "context_tokens", figures)


def ttft_panels(result: Result, colours: Colours) -> list[Panel]:
    """A pair of panels for each store and each number of requests at once; bars where there is one context only."""
    panels: list[Panel] = []
    for condition, rows in grouped((row for row in result["rows"] if row["ttft_ms"]), conditions).items():
        contexts = {row["context_tokens"] for row in rows}
        if len(contexts) > 1:
            panels += _over_context(rows, condition, colours)
        else:
            where = f"at {min(contexts):,} tokens, {condition}"
            title = f"Time to first token {where}; medians, with the speedup over plain at the end"
            panels.append(Panel(title, Axis("time to first token (ms)"), bars=ttft_bars(rows, colours)))
    return panels


def ttft_bars(rows: Sequence[Row], colours: Colours) -> list[Bar]:
    return [
        Bar(variant_label(row), [("", row["ttft_ms"]["median"], colours[drawn_name(row)])], _ttft_note(row))
        for row in rows
    ]


def speedup(row: Row) -> Ends | None:
    ratio = row["speedup_vs_plain"] if row["contender"] != REFERENCE else None
    return (ratio["median"], ratio["low"], ratio["high"]) if ratio else None


CONTEXT = Axis("context (tokens)", is_log=True, at_points=True)
AS_PLAIN = Level(REFERENCE, REFERENCE, 1.0, 1.0, 1.0)


def _over_context(rows: Sequence[Row], condition: str, colours: Colours) -> list[Panel]:
    against = f"against context length, {condition}"
    times, ratios = over_context(rows, times_ms), over_context(rows, speedup)
    title = f"Time to first token {against}; medians, whiskers to p95"
    panels = [Panel(title, CONTEXT, Axis("time to first token (ms)", is_log=True), times, colours=colours)]
    if ratios:
        title = f"Speedup over plain {against}; medians of pairs, whiskers from the least to the greatest"
        panels.append(
            Panel(title, CONTEXT, Axis("speedup over plain", is_log=True), ratios, [AS_PLAIN], colours=colours)
        )
    return panels


def _ttft_note(row: Row) -> str:
    ratio, median = speedup(row), readable_ms(row["ttft_ms"]["median"])
    return f"{median} ({ratio[0]:.3g}x)" if ratio else median


def throughput_rows(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if row["concurrency"] > 1 and row.get("requests_per_s")]


def throughput_panels(result: Result, colours: Colours) -> list[Panel]:
    """A panel for each context, store and number of requests at once."""
    groups = grouped(throughput_rows(result["rows"]), lambda row: (row["context_tokens"], conditions(row)))
    return [
        Panel(
            f"Throughput at {context:,} tokens, {condition}; times plain's at the end",
            Axis("requests per second"),
            bars=throughput_bars(rows, colours),
        )
        for (context, condition), rows in groups.items()
    ]


def throughput_bars(rows: Sequence[Row], colours: Colours) -> list[Bar]:
    return [
        Bar(
            variant_label(row),
            [("", _middle(row["requests_per_s"]), colours[drawn_name(row)])],
            _throughput_note(row),
        )
        for row in rows
    ]


def _throughput_note(row: Row) -> str:
    rate, times = f"{_middle(row['requests_per_s']):.3g}/s", row.get("throughput_vs_plain")
    return f"{rate} ({_middle(times):.3g}x)" if times and row["contender"] != REFERENCE else rate


def _middle(figure: float | dict[str, float]) -> float:
    """A figure that may come with its spread."""
    return float(figure["median"] if isinstance(figure, dict) else figure)


STAGES = {
    "fetch": ("fetch", "#77AADD"),
    "prefill_chunks": ("prefill missing chunks", "#AAAA00"),
    "move": ("rotate", "#99DDFF"),
    "write": ("write", "#44BB99"),
    "select": ("select", "#EEDD88"),
    "recompute": ("recompute", "#EE8866"),
    "prefill": ("prefill", "#BBBBBB"),
    "decode": ("decode", "#FFAABB"),
}
"""In the order of a request; others follow. Light colours, so that no stage looks like a policy: Paul Tol's."""
OTHER_COLOUR = "#BBCC33"
SHARE_OF_TIME = Axis("share of the request's time (%)", limits=(0, 100))


def time_split_panels(result: Result) -> list[Panel]:
    """A panel for each context and store."""
    timed = [row for row in result["rows"] if row.get("stages_ms")]
    groups = grouped(timed, lambda row: (row["context_tokens"], conditions(row)))
    return [
        Panel(
            f"Time split at {context:,} tokens, {condition}; medians, the sum at the end",
            SHARE_OF_TIME,
            bars=time_bars(rows),
        )
        for (context, condition), rows in groups.items()
    ]


def time_bars(rows: Sequence[Row]) -> list[Bar]:
    """Shares of the whole in percent, so that bars of very different times can be compared; the whole as a note.

    Every bar has every stage of these rows, if only with nothing, so that the legend is in the order of a request.
    """
    found = dict.fromkeys(stage for row in rows for stage in row["stages_ms"])
    stages = [*(stage for stage in STAGES if stage in found), *(stage for stage in found if stage not in STAGES)]
    shown = {stage: STAGES.get(stage, (stage, OTHER_COLOUR)) for stage in stages}
    bars = []
    for row in rows:
        times_ms = [row["stages_ms"].get(stage) or 0.0 for stage in stages]
        total_ms = sum(times_ms) or 1.0
        parts = [
            (name, 100 * ms / total_ms, colour) for (name, colour), ms in zip(shown.values(), times_ms, strict=True)
        ]
        bars.append(Bar(variant_label(row), parts, readable_ms(sum(times_ms))))
    return bars


def all_ttft_panels(result: Result, colours: Colours) -> list[Panel]:
    return [*ttft_panels(result, colours), *time_split_panels(result), *throughput_panels(result, colours)]


def device_panels(result: Result, colours: Colours) -> list[Panel]:
    """Of each shape: times and speedups over context length, and the stages at each."""
    panels = []
    for shape, rows in grouped((row for row in result["rows"] if row.get("ttft_ms")), lambda row: row["shape"]).items():
        times, ratios = over_context(rows, times_ms), over_context(rows, speedup_vs_full)
        time, gain = Axis("time to first token (ms)", is_log=True), Axis("speedup over full prefill", is_log=True)
        title = f"Time to first token against context length, {shape}; medians, whiskers to p95"
        panels.append(Panel(title, CONTEXT, time, times, colours=colours))
        title = f"Speedup over full prefill, {shape}; medians of pairs, whiskers from the least to the greatest"
        level = replace(AS_PLAIN, label="full prefill")
        panels.append(Panel(title, CONTEXT, gain, ratios, [level], colours=colours))
        staged = grouped((row for row in rows if row.get("stages_ms")), lambda row: row["context_tokens"])
        panels += [
            Panel(f"Time split at {context:,} tokens, {shape}; the sum at the end", SHARE_OF_TIME, bars=time_bars(own))
            for context, own in staged.items()
        ]
    return panels


def speedup_vs_full(row: Row) -> Ends | None:
    ratio = row["speedup_vs_full"] if row["policy"] else None
    return (ratio["median"], ratio["low"], ratio["high"]) if ratio else None


def sustained_panels(result: Result, colours: Colours) -> list[Panel]:
    """Fifth by fifth, at the middle of each."""
    rows = [
        row | {"middle": row["first_request"] + row["num_requests"] / 2}
        for row in result["rows"]
        if row["contender"] != REFERENCE
    ]

    def ratio(row: Row) -> Ends | None:
        found = row["speedup_vs_plain"]
        return (found["median"],) * 3 if found else None

    def hits(row: Row) -> Ends | None:
        return None if row["hit_ratio"] is None else (100 * row["hit_ratio"],) * 3

    def panel(title: str, y: Axis, figures: Callable[[Row], Ends | None], *levels: Level) -> Panel:
        series = series_of(rows, variant_label, "middle", figures)
        return Panel(title, Axis("request"), y, series, levels, colours=colours)

    speedups, shares = Axis("speedup over plain", limits=(0, math.inf)), Axis("chunks found (%)", limits=(0, 100))
    return [
        panel("Speedup over plain in the course of the run; medians of each fifth", speedups, ratio, AS_PLAIN),
        panel("Chunks that the store had, of those that were looked up", shares, hits),
    ]


# -- quality -----------------------------------------------------------------------------------------------------------

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
    """As a sentence begins with it."""
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
    """Every kind of all questions, and all kinds together of those that full prefill answers right, if it's fewer."""
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
    return " ".join(part for part in (row["contender"], policy_label(row), *_layer_and_sink(row)) if part)


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


# -- the others --------------------------------------------------------------------------------------------------------

PREFIX_COLOURS = {"no KV cache": GREY, "KV cache": BLUE, "prefix cache": ORANGE}
PREFIX_SCENARIOS = ("cold", "new question", "repeat")


def prefix_panels(result: Result, colours: Colours) -> list[Panel]:
    lines_of = grouped(result["rows"], lambda row: (row["level"], row["scenario"]))
    title = "Time to first token over prompt length, by level of caching; whiskers to p95"
    return [
        Panel(
            title,
            Axis("prompt tokens", is_log=True, at_points=True),
            Axis("time to first token (ms), median", is_log=True),
            [
                _line(
                    level, f"{level}, {scenario}", rows, "context_tokens", "ttft_ms", PREFIX_SCENARIOS.index(scenario)
                )
                for (level, scenario), rows in lines_of.items()
            ],
            colours=PREFIX_COLOURS,
            height_in=5,
        )
    ]


def _line(name: str, label: str, rows: Sequence[Row], x: str, times: str, variant: int = 0) -> Series:
    """Medians, with whiskers to p95."""
    medians, p95 = ([row[times][figure] for row in rows] for figure in ("median", "p95"))
    return Series(name, label, [row[x] for row in rows], medians, medians, p95, variant)


AI100_COLOURS = {"no cache": GREY, "KV slots": ORANGE}
TTFT_KEYS = {"no cache": "no_cache_ttft_ms", "KV slots": "slots_ttft_ms"}


def ai100_panels(result: Result, colours: Colours) -> list[Panel]:
    turns = [row for row in result["rows"] if row["measure"] == "first token"]
    modes = [row for row in result["rows"] if row["measure"] == "throughput"]
    rates = [row["tokens_per_s"]["median"] for row in modes]
    return [
        Panel(
            "Time to first token, turn by turn, with KV slots and without; whiskers to p95",
            Axis("turn", at_points=True),
            Axis("time to first token (ms), median", is_log=True),
            [_line(name, name, turns, "turn", key) for name, key in TTFT_KEYS.items()],
            colours=AI100_COLOURS,
            height_in=4,
        ),
        Panel(
            "Throughput of conversations at once and one after the other",
            Axis(f"tokens per second, {modes[0]['num_conversations']} conversations"),
            bars=[
                Bar(row["mode"], [("", rate, colour)], f"{rate:.3g}/s")
                for row, rate, colour in zip(modes, rates, (ORANGE, GREY), strict=False)
            ],
        ),
    ]


def tasks_panels(result: Result, colours: Colours) -> list[Panel]:
    return [
        Panel(
            "A search among earlier tasks, against their number; medians, whiskers to p95",
            Axis("earlier tasks", is_log=True, at_points=True),
            Axis("search (ms)", is_log=True),
            [
                _line(name, name, result["rows"], "num_tasks", key)
                for name, key in (("wall time", "lookup_ms"), ("CPU time", "lookup_cpu_ms"))
            ],
            colours={"CPU time": ORANGE, "wall time": GREY},
        )
    ]


def decode_panels(result: Result, colours: Colours) -> list[Panel]:
    title = "Time per output token against context length; medians, whiskers to p95"
    return [
        Panel(
            title,
            CONTEXT,
            Axis("time per output token (ms)", limits=(0, math.inf)),
            over_context(result["rows"], to_p95("tpot_ms")),
            colours=colours,
        )
    ]


NO_OUTCOME = ("num_requests", "num_compared_tokens", "num_without_report")


def soak_panels(result: Result, colours: Colours) -> list[Panel]:
    """How each contender's requests ended, and how soon they began; how long services were away after a fault."""
    rows, struck = result["rows"], result.get("faults") or ()
    outcomes = dict.fromkeys(key for row in rows for key in row if key.startswith("num_") and key not in NO_OUTCOME)
    tints = [colour for _, colour in STAGES.values()]
    panels = [
        Panel(
            "How the requests ended; their number at the end",
            Axis("requests"),
            bars=[
                Bar(
                    row["contender"],
                    [
                        (key.removeprefix("num_").replace("_", " "), row.get(key, 0), tints[place % len(tints)])
                        for place, key in enumerate(outcomes)
                    ],
                    f"{row['num_requests']:,}",
                )
                for row in rows
            ],
        ),
        Panel(
            "Time to first token under load; medians",
            Axis("time to first token (ms)"),
            bars=[
                Bar(row["contender"], [("", row["ttft_ms"]["median"], colours[row["contender"]])], _p95_note(row))
                for row in rows
                if row["ttft_ms"]
            ],
        ),
    ]
    back = [fault for fault in struck if fault["back_s"] is not None]
    if back:
        bars = [
            Bar(f"{one['service']}, {one['kind']}", [("", away, GREY)], f"{away:.1f} s")
            for one in back
            for away in [one["back_s"] - one["at_s"]]
        ]
        panels.append(Panel("From a fault until the service is healthy again", Axis("seconds"), bars=bars))
    return [panel for panel in panels if panel.bars]


def _p95_note(row: Row) -> str:
    return f"{readable_ms(row['ttft_ms']['median'])} (p95 {readable_ms(row['ttft_ms']['p95'])})"


@dataclass(frozen=True)
class Picture:
    """How the panels are laid out in the image that is saved beside a result file."""

    width_in: float
    num_columns: int = 1
    width_ratios: Sequence[float] = ()


@dataclass(frozen=True)
class ResultKind:
    """What is to be known of a kind of result file, wherever it is drawn.

    `keys` tell its rows apart, and `time` is what two files are compared by; none of `eval`, which is compared question
    by question. `picture`: of those that have one beside the file.
    """

    panels: Callable[[Result, Colours], list[Panel]]
    keys: tuple[str, ...] = ()
    time: str = "ttft_ms"
    picture: Picture | None = None


TTFT, EVAL = "ttft", "eval"
VARIANT = ("contender", "policy", "ratio", "check_layer", "max_ttft_ms", "options")
RESULT_KINDS: dict[str, ResultKind] = {
    TTFT: ResultKind(all_ttft_panels, (*VARIANT, "context_tokens", "store", "prompts", "concurrency")),
    EVAL: ResultKind(eval_panels, picture=Picture(11, 2)),
    "calibrate": ResultKind(calibrate_panels, (*VARIANT, "sink_tokens")),
    "device": ResultKind(device_panels, ("shape", *VARIANT, "context_tokens")),
    "sustained": ResultKind(sustained_panels, (*VARIANT, "first_request")),
    "soak": ResultKind(soak_panels, ("contender",)),
    "decode": ResultKind(decode_panels, ("contender", "context_tokens"), "tpot_ms"),
    "prefix": ResultKind(prefix_panels, ("level", "scenario", "context_tokens"), picture=Picture(8)),
    "ai100": ResultKind(ai100_panels, ("measure", "turn"), "slots_ttft_ms", Picture(9, 2, (2, 1))),
    "simllm": ResultKind(simllm_panels, ("model", "mode", "similarity_threshold"), picture=Picture(11, 2)),
    "tasks": ResultKind(tasks_panels, ("num_tasks", "embedding_dim"), "lookup_ms"),
}
"""By `settings.benchmark`: every kind of file that the project writes."""


def panels_of(result: Result, colours: Colours | None = None) -> list[Panel]:
    """`colours`: those of the names of all files that are shown together. Raises `ValueError` for a file that isn't
    what it says, naming what is odd.
    """
    settings = result.get("settings") or {}
    benchmark = str(settings.get("benchmark", ""))
    if benchmark not in RESULT_KINDS:
        raise ValueError(f"the benchmark {benchmark!r} is none of {', '.join(RESULT_KINDS)}")
    try:
        return RESULT_KINDS[benchmark].panels(result, colours or colours_in([result])) if result["rows"] else []
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"other rows than the benchmark {benchmark} writes: {reason}") from error


def summary(result: Result) -> str:
    """Which benchmark, of what, where; such as `eval · town · Xeon · 2 cores`."""
    settings, machine = result.get("settings") or {}, result.get("machine") or {}
    cores = machine.get("num_cores")
    model = settings.get("shape") or settings.get("model")
    parts = (settings.get("benchmark"), model, machine.get("cpu"), f"{cores} cores" if cores else None)
    return " · ".join(str(part) for part in parts if part)


def colours_in(results: Iterable[Result]) -> dict[str, str]:
    return colours_of(drawn_name(row) for result in results for row in result["rows"] if "contender" in row)
