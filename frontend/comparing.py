"""Two result files of one kind: how the second differs from the first, on what both have measured.

Evals that keep single answers are compared question by question, with intervals, older ones by their means. All other
kinds are compared by ratios of times or rates, row by row. Makes panels; draws nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from kvarena.panels.kinds import EVAL, RESULT_KINDS, VARIANT
from kvarena.panels.panel import (
    BLUE,
    Axis,
    Bar,
    Colours,
    Level,
    Panel,
    Result,
    Row,
    colours_in,
    grouped,
    readable_ms,
    series_of,
    variant_label,
)
from kvarena.panels.quality import IN_NATS, lines_over_share, metric_title
from kvarena.panels.speed import CONTEXT, conditions

SURE = 1.96
"""Standard errors of a 95 % interval."""


def comparison(first: Result, second: Result, metric: str) -> list[Panel]:
    """Empty if they have measured nothing in common. `metric` is an eval's."""
    if first["settings"]["benchmark"] == EVAL:
        return _differences(first, second, metric)
    return _ratios(first, second)


# -- differences of evals ----------------------------------------------------------------------------------------------


def _differences(first: Result, second: Result, metric: str) -> list[Panel]:
    scale = 1.0 if metric in IN_NATS else 100.0
    rows = [row | {"difference": found} for row, found in _compared_rows(first, second, metric, scale)]
    if not rows:
        return []
    unit = "nats" if metric in IN_NATS else "percentage points"
    asked = rows[0]["num_questions"]
    how = f"over {asked} questions in both, whiskers are 95 % intervals" if _is_paired(rows) else "of the means"
    series, levels = lines_over_share(rows, "difference", 1.0)
    return [
        Panel(
            f"{metric_title(metric)}: the second file less the first, {how}",
            Axis("chunk tokens recomputed (%)", limits=(0, 100)),
            Axis(f"difference ({unit})", limits=(-100, 100)),
            series,
            levels,
            colours=colours_in([first, second]),
        )
    ]


def _is_paired(rows: Sequence[Row]) -> bool:
    return all(row["difference"]["is_paired"] for row in rows)


def _compared_rows(first: Result, second: Result, metric: str, scale: float) -> Iterator[tuple[Row, Row]]:
    """The first file's rows over all questions with the difference, for the variants that both have."""
    answers, others = _answers(first, metric), _answers(second, metric)
    means = {variant_label(row): row.get(metric) for row in _overall(second)}
    for row in _overall(first):
        label = variant_label(row)
        both = [(answers[key], others[key]) for key in answers if key[0] == label and key in others]
        if both:
            differences = [scale * (theirs - ours) for ours, theirs in both]
            yield row | {"num_questions": len(both)}, _interval(differences) | {"is_paired": True}
        elif (here := row.get(metric)) and (there := means.get(label)):
            difference = scale * (there["mean"] - here["mean"])
            yield row, dict.fromkeys(("mean", "low", "high"), difference) | {"is_paired": False}


def _overall(result: Result) -> list[Row]:
    return [row for row in result["rows"] if row["kind"] == "all" and row.get("subset", "all") == "all"]


def _answers(result: Result, metric: str) -> dict[tuple[str, str, int], float]:
    """The metric by variant, question, and how often that question came before: shuffled ones come several times."""
    questions, seen = result.get("questions") or (), Counter[str]()
    places = []
    for question in questions:
        places.append((question["question"], seen[question["question"]]))
        seen[question["question"]] += 1
    return {
        (variant_label(answer), *places[answer["question"]]): float(answer[metric])
        for answer in result.get("answers") or ()
        if answer.get(metric) is not None
    }


def _interval(values: Sequence[float]) -> Row:
    """Of a mean, from its standard error."""
    middle = mean(values)
    error = SURE * stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return {"mean": middle, "low": max(-100.0, middle - error), "high": min(100.0, middle + error)}


# -- ratios of times ---------------------------------------------------------------------------------------------------


def _ratios(first: Result, second: Result) -> list[Panel]:
    kind = RESULT_KINDS[first["settings"]["benchmark"]]
    keys, figure = kind.keys, kind.time
    theirs = {_key(row, keys): row[figure] for row in second["rows"] if row.get(figure)}
    rows = [
        row | {"before": row[figure]["median"], "after": theirs[_key(row, keys)]["median"]}
        for row in first["rows"]
        if row.get(figure) and _key(row, keys) in theirs
    ]
    rows = [row | {"times": row["after"] / row["before"]} for row in rows if row["before"]]
    groups = grouped(rows, conditions) if rows and "store" in rows[0] else {"": rows}
    colours = colours_in([first, second])
    return [_ratio_panel(own, keys, figure, condition, colours) for condition, own in groups.items() if own]


def _ratio_panel(rows: Sequence[Row], keys: Sequence[str], figure: str, condition: str, colours: Colours) -> Panel:
    what = {"ttft_ms": "Time to first token", "tpot_ms": "Time per output token", "lookup_ms": "Search"}
    title = f"{what.get(figure, 'Time to first token with KV slots')} of the second file, times the first's"
    title += f", {condition}" * bool(condition)
    if len({row.get("context_tokens") for row in rows}) == 1 or not condition:
        bars = [Bar(_told(row, keys), [("", row["times"], BLUE)], _note(row)) for row in rows]
        return Panel(f"{title}; medians", Axis("ratio"), bars=bars)
    return Panel(
        f"{title}; medians",
        CONTEXT,
        Axis("ratio of medians", is_log=True),
        series_of(rows, variant_label, "context_tokens", lambda row: (row["times"],) * 3),
        [Level("plain", "as long as in the first", 1.0, 1.0, 1.0)],
        colours=colours,
    )


def _key(row: Mapping[str, Any], keys: Sequence[str]) -> tuple[str, ...]:
    return tuple(repr(row.get(key) or None) for key in keys)


def _told(row: Row, keys: Sequence[str]) -> str:
    """What distinguishes the row, in words."""
    names = [variant_label(row)] if "contender" in row else []
    others = [key for key in keys if key not in VARIANT and row.get(key) is not None]
    return ", ".join([*names, *(f"{key.replace('_', ' ')} {row[key]}" for key in others)]) or "no reuse"


def _note(row: Row) -> str:
    return f"{row['times']:.3g}x ({readable_ms(row['before'])} → {readable_ms(row['after'])})"
