"""The panels of the benchmarks: times, speedups, throughput, and where the time goes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from kvarena.panels.panel import (
    BLUE,
    GREY,
    ORANGE,
    REFERENCE,
    Axis,
    Bar,
    Colours,
    Ends,
    Level,
    Panel,
    Result,
    Row,
    Series,
    drawn_name,
    grouped,
    readable_ms,
    series_of,
    times_ms,
    to_p95,
    variant_label,
)

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
    return series_of(rows, variant_label, "context_tokens", figures)


def ttft_panels(result: Result, colours: Colours) -> list[Panel]:
    """A pair of panels for each store and each number of requests at once; bars where there is one context only."""
    panels: list[Panel] = []
    for condition, rows in grouped((row for row in result["rows"] if row["ttft_ms"]), conditions).items():
        contexts = {row["context_tokens"] for row in rows}
        if len(contexts) > 1:
            panels += _over_context(rows, condition, speedup, AS_PLAIN, colours)
        else:
            where = f"at {min(contexts):,} tokens, {condition}"
            title = f"Time to first token {where}; medians, with the speedup over plain at the end"
            panels.append(Panel(title, Axis("time to first token (ms)"), bars=ttft_bars(rows, colours)))
    return panels


def ttft_bars(rows: Sequence[Row], colours: Colours) -> list[Bar]:
    def note(row: Row) -> str:
        ratio, median = speedup(row), readable_ms(row["ttft_ms"]["median"])
        return f"{median} ({ratio[0]:.3g}x)" if ratio else median

    return [
        Bar(variant_label(row), [("", row["ttft_ms"]["median"], colours[drawn_name(row)])], note(row)) for row in rows
    ]


def speedup(row: Row) -> Ends | None:
    return _ends(row["speedup_vs_plain"]) if row["contender"] != REFERENCE else None


def _ends(ratio: Mapping[str, float] | None) -> Ends | None:
    return (ratio["median"], ratio["low"], ratio["high"]) if ratio else None


CONTEXT = Axis("context (tokens)", is_log=True, at_points=True)
AS_PLAIN = Level(REFERENCE, REFERENCE, 1.0, 1.0, 1.0)
AS_FULL = replace(AS_PLAIN, label="full prefill")


def _over_context(
    rows: Sequence[Row], where: str, ratio: Callable[[Row], Ends | None], reference: Level, colours: Colours
) -> list[Panel]:
    """Times, and the speedup over the reference where there is any."""
    title = f"Time to first token against context length, {where}; medians, whiskers to p95"
    axis = Axis("time to first token (ms)", is_log=True)
    panels = [Panel(title, CONTEXT, axis, over_context(rows, times_ms), colours=colours)]
    if ratios := over_context(rows, ratio):
        what = f"speedup over {reference.label}"
        against = f"against context length, {where}; medians of pairs, whiskers from the least to the greatest"
        axis = Axis(what, is_log=True)
        panels.append(Panel(f"{what.capitalize()} {against}", CONTEXT, axis, ratios, [reference], colours=colours))
    return panels


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
    def note(row: Row) -> str:
        rate, times = f"{_middle(row['requests_per_s']):.3g}/s", row.get("throughput_vs_plain")
        return f"{rate} ({_middle(times):.3g}x)" if times and row["contender"] != REFERENCE else rate

    return [
        Bar(variant_label(row), [("", _middle(row["requests_per_s"]), colours[drawn_name(row)])], note(row))
        for row in rows
    ]


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
    return _time_splits(result["rows"], conditions, "medians, the sum at the end")


def _time_splits(rows: Iterable[Row], where: Callable[[Row], str], note: str) -> list[Panel]:
    timed = (row for row in rows if row.get("stages_ms"))
    return [
        Panel(f"Time split at {at}; {note}", SHARE_OF_TIME, bars=time_bars(own))
        for at, own in grouped(timed, lambda row: f"{row['context_tokens']:,} tokens, {where(row)}").items()
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

    def speedup_vs_full(row: Row) -> Ends | None:
        return _ends(row["speedup_vs_full"]) if row["policy"] else None

    panels = []
    for shape, rows in grouped((row for row in result["rows"] if row.get("ttft_ms")), lambda row: row["shape"]).items():
        panels += _over_context(rows, shape, speedup_vs_full, AS_FULL, colours)
        panels += _time_splits(rows, lambda row: str(row["shape"]), "the sum at the end")
    return panels


def sustained_panels(result: Result, colours: Colours) -> list[Panel]:
    """Fifth by fifth, at the middle of each."""
    rows = [
        row | {"middle": row["first_request"] + row["num_requests"] / 2}
        for row in result["rows"]
        if row["contender"] != REFERENCE
    ]

    def median(row: Row) -> Ends | None:
        found = row["speedup_vs_plain"]
        return (found["median"],) * 3 if found else None

    def share(name: str) -> Callable[[Row], Ends | None]:
        return lambda row: None if row[name] is None else (100 * row[name],) * 3

    def panel(title: str, y: Axis, figures: Callable[[Row], Ends | None], *levels: Level) -> Panel:
        series = series_of(rows, variant_label, "middle", figures)
        return Panel(title, Axis("request"), y, series, levels, colours=colours)

    speedups = Axis("speedup over plain", limits=(0, math.inf))
    panels = [panel("Speedup over plain in the course of the run; medians of each fifth", speedups, median, AS_PLAIN)]
    if any(row["hit_ratio"] is not None for row in rows):
        found = Axis("chunks found (%)", limits=(0, 100))
        title = "Chunks that the store had, of those that were looked up"
        return [*panels, panel(title, found, share("hit_ratio"))]
    reused = Axis("prompt tokens reused (%)", limits=(0, 100))
    return [*panels, panel("Prompt tokens that were reused", reused, share("reused_ratio"))]


PREFIX_COLOURS = {"no KV cache": GREY, "KV cache": BLUE, "prefix cache": ORANGE}


def prefix_panels(result: Result, colours: Colours) -> list[Panel]:
    def label(row: Row) -> str:
        return f"{row['level']}, {row['scenario']}"

    return [
        Panel(
            "Time to first token over prompt length, by level of caching; whiskers to p95",
            Axis("prompt tokens", is_log=True, at_points=True),
            Axis("time to first token (ms), median", is_log=True),
            series_of(result["rows"], label, "context_tokens", times_ms, lambda row: str(row["level"])),
            colours=PREFIX_COLOURS,
            height_in=5,
        )
    ]


def _lines(rows: Sequence[Row], x: str, times: Mapping[str, str]) -> list[Series]:
    """A line for each of the rows' times, by its name."""
    return [
        line
        for name, key in times.items()
        for line in series_of(rows, lambda row: name, x, to_p95(key), lambda row: name)  # noqa: B023  used at once
    ]


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
            _lines(turns, "turn", TTFT_KEYS),
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
            _lines(result["rows"], "num_tasks", {"wall time": "lookup_ms", "CPU time": "lookup_cpu_ms"}),
            colours={"CPU time": ORANGE, "wall time": GREY},
        )
    ]


def decode_panels(result: Result, colours: Colours) -> list[Panel]:
    title = "Time per output token against context length; medians, whiskers to p95"
    axis = Axis("time per output token (ms)", limits=(0, math.inf))
    return [Panel(title, CONTEXT, axis, over_context(result["rows"], to_p95("tpot_ms")), colours=colours)]


NO_OUTCOME = ("num_requests", "num_compared_tokens", "num_without_report")


def soak_panels(result: Result, colours: Colours) -> list[Panel]:
    """How each contender's requests ended, and how soon they began; how long services were away after a fault."""
    rows = result["rows"]
    outcomes = dict.fromkeys(key for row in rows for key in row if key.startswith("num_") and key not in NO_OUTCOME)
    tints = dict(zip(outcomes, itertools.cycle(colour for _, colour in STAGES.values()), strict=False))

    def ends(row: Row) -> list[tuple[str, float, str]]:
        return [(key[len("num_") :].replace("_", " "), row.get(key, 0), tint) for key, tint in tints.items()]

    def ttft(row: Row) -> Bar:
        median, p95 = row["ttft_ms"]["median"], row["ttft_ms"]["p95"]
        note = f"{readable_ms(median)} (p95 {readable_ms(p95)})"
        return Bar(row["contender"], [("", median, colours[row["contender"]])], note)

    away = [
        (f"{fault['service']}, {fault['kind']}", fault["back_s"] - fault["at_s"])
        for fault in result.get("faults") or ()
        if fault["back_s"] is not None
    ]
    panels = [
        Panel(
            "How the requests ended; their number at the end",
            Axis("requests"),
            bars=[Bar(row["contender"], ends(row), f"{row['num_requests']:,}") for row in rows],
        ),
        Panel(
            "Time to first token under load; medians",
            Axis("time to first token (ms)"),
            bars=[ttft(row) for row in rows if row["ttft_ms"]],
        ),
        Panel(
            "From a fault until the service is healthy again",
            Axis("seconds"),
            bars=[Bar(what, [("", seconds, GREY)], f"{seconds:.1f} s") for what, seconds in away],
        ),
    ]
    return [panel for panel in panels if panel.bars]
