"""From which context length on a contender is faster than plain, by the rows of `kvarena bench ttft`.

A length counts as faster or slower only if the whole interval of the median speedup is on one side of 1; else it is a
tie. Nothing is said of lengths that weren't measured. Reads rows; draws nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from figures import Figures, Tone
from kvarena.panels.panel import REFERENCE, Result, Row, grouped, variant_label
from settings import Contender

STATE = "warm"
LEAST_PAIRS = 3
"""Fewer pairs say nothing of a median."""
DIGITS = 2


@dataclass(frozen=True)
class Point:
    """`speedup` is the median over plain at this length, between `low` and `high`."""

    num_tokens: int
    speedup: float
    low: float
    high: float

    @property
    def tone(self) -> Tone:
        return "gain" if self.low > 1 else "loss" if self.high < 1 else "tie"


@dataclass(frozen=True)
class LengthVerdict:
    """On a contender with one setting. `points` are in ascending order of length, none if nothing was answered;
    `failure` then says why. `failed` are the lengths without an answer.
    """

    label: str
    points: tuple[Point, ...]
    failure: str = ""
    failed: tuple[int, ...] = ()

    @property
    def paying(self) -> tuple[Point, ...]:
        """The lengths at which it is faster, and stays faster at all longer ones."""
        num = 0
        while num < len(self.points) and self.points[-1 - num].tone == "gain":
            num += 1
        return self.points[len(self.points) - num :]

    @property
    def before(self) -> Point | None:
        """The longest length at which it isn't faster."""
        num_others = len(self.points) - len(self.paying)
        return self.points[num_others - 1] if num_others else None

    @property
    def crossing_tokens(self) -> int | None:
        """Where it becomes faster, if that is between a length at which it is slower and the next one: on the straight
        line between the two medians, both axes logarithmic as in the chart.
        """
        if not self.paying or not self.before or self.before.tone != "loss":
            return None
        return crossing(self.before, self.paying[0])

    @property
    def tone(self) -> Tone:
        return self.points[-1].tone if self.points else "tie"

    def text(self) -> str:
        """What follows the name."""
        if not self.points:
            return f"nothing to compare: {self.failure}" if self.failure else "no answers beside plain's to compare"
        return self._text_of_points() + (f"; no answers at {_listed(self.failed)} tokens" if self.failed else "")

    def _text_of_points(self) -> str:
        if self.paying:
            return self._text_of_gain()
        lengths = at_lengths(self.points)
        tones = {point.tone for point in self.points}
        if tones == {"tie"}:
            return f"no difference from plain can be told {lengths}"
        if tones == {"loss"}:
            return f"slower than plain {lengths}"
        if "gain" not in tones:
            return "faster than plain at no measured length"
        faster = _listed([point.num_tokens for point in self.points if point.tone == "gain"])
        return f"faster than plain at {faster} tokens, but not at the longest measured length"

    def _text_of_gain(self) -> str:
        if not self.before:
            return f"faster than plain {at_lengths(self.points)}"
        longest = f"up to {self.points[-1].num_tokens:,}, the longest measured"
        if tokens := self.crossing_tokens:
            return f"faster than plain from about {tokens:,} tokens on, {longest}"
        if len(self.paying) == 1:
            return f"faster than plain at {self.paying[0].num_tokens:,} tokens, the longest measured"
        return f"faster than plain from {self.paying[0].num_tokens:,} tokens on, {longest}"

    def note(self) -> str:
        """What the text is based on."""
        if not self.paying or not self.before:
            return ""
        before, first = self.before, self.paying[0]
        if before.tone == "loss":
            return f"Slower at {before.num_tokens:,} tokens, faster at {first.num_tokens:,}; interpolated in between."
        return f"At {before.num_tokens:,} tokens no difference can be told."


def crossing(slower: Point, faster: Point) -> int:
    """Where the speedup is 1, to two digits, and between the two."""
    share = -math.log(slower.speedup) / (math.log(faster.speedup) - math.log(slower.speedup))
    tokens = math.exp((1 - share) * math.log(slower.num_tokens) + share * math.log(faster.num_tokens))
    rounded = round(tokens, DIGITS - 1 - math.floor(math.log10(tokens)))
    return int(min(max(rounded, slower.num_tokens), faster.num_tokens))


def at_lengths(points: Sequence[Point]) -> str:
    shortest, longest = points[0].num_tokens, points[-1].num_tokens
    if len(points) == 1:
        return f"at the only measured length, {shortest:,} tokens"
    return f"at every measured length, {shortest:,} to {longest:,} tokens"


def length_verdicts(result: Result) -> list[LengthVerdict]:
    """One for each contender and setting besides plain; empty if plain wasn't measured."""
    groups = grouped(measured_rows(result), variant_label)
    if not any(rows[0]["contender"] == REFERENCE for rows in groups.values()):
        return []
    return [verdict_of(label, rows) for label, rows in groups.items() if rows[0]["contender"] != REFERENCE]


def measured_rows(result: Result) -> list[Row]:
    """Of known chunks, one request at a time."""
    return [row for row in result["rows"] if row.get("prompts", row["store"]) == STATE and row["concurrency"] == 1]


def verdict_of(label: str, rows: Sequence[Row]) -> LengthVerdict:
    points = sorted((point for row in rows if (point := point_of(row))), key=lambda point: point.num_tokens)
    failure = next((str(row["failure"]) for row in rows if row.get("failure")), "")
    failed = {row["context_tokens"] for row in rows} - {point.num_tokens for point in points}
    return LengthVerdict(label, tuple(points), failure, tuple(sorted(failed)))


def _listed(lengths: Sequence[int]) -> str:
    return " and ".join(f"{length:,}" for length in lengths)


def point_of(row: Row) -> Point | None:
    """None without a pair of answers. Without an interval, or with too few pairs for one, the range stands in."""
    speedup = row.get("speedup_vs_plain")
    if not speedup:
        return None
    if row.get("num_pairs", row["num_requests"] - (row.get("num_failed") or 0)) < LEAST_PAIRS:
        return Point(row["context_tokens"], speedup["median"], 0.0, math.inf)
    interval = row.get("speedup_interval") or speedup
    return Point(row["context_tokens"], speedup["median"], interval["low"], interval["high"])


def verdicts_html(verdicts: Sequence[LengthVerdict]) -> str:
    return "".join(_line_html(verdict) for verdict in verdicts)


def _line_html(verdict: LengthVerdict) -> str:
    note = f"<small>{escape(verdict.note())}</small>" if verdict.note() else ""
    return (
        f'<div class="ka-verdict" data-testid="length-verdict" data-tone="{verdict.tone}" '
        f'data-crossing="{verdict.crossing_tokens or ""}">'
        f'<b class="ka-tone-{verdict.tone}">{escape(f"{verdict.label}: {verdict.text()}")}</b>{note}</div>'
    )


def lengths_table(result: Result) -> list[Row]:
    """A line for each contender, setting and length. Plain has no speedup over itself."""
    return [_table_row(row) for row in measured_rows(result)]


def _table_row(row: Row) -> Row:
    ttft_ms = row["ttft_ms"] or {}
    point = point_of(row) if row["contender"] != REFERENCE else None
    return {
        "Variant": variant_label(row),
        "Context": row["context_tokens"],
        "TTFT median": ttft_ms.get("median"),
        "TTFT p95": ttft_ms.get("p95"),
        "Speedup": point and point.speedup,
        "Low": point and (point.low or None),
        "High": point and (None if math.isinf(point.high) else point.high),
        "Reused": row.get("reused_ratio"),
        "Recomputed": row.get("recomputed_ratio"),
        "Asked": row["num_requests"],
        "Failed": row.get("num_failed") or 0,
    }


def failures(result: Result) -> list[str]:
    """For each contender and setting with failed requests: how many, and the first reason."""
    found = []
    for label, rows in grouped([row for row in result["rows"] if row.get("num_failed")], variant_label).items():
        failed, asked = (sum(row[key] for row in rows) for key in ("num_failed", "num_requests"))
        found.append(f"{label}: {failed} of {asked} requests failed, the first with: {rows[0]['failure']}")
    return found


def note_of(result: Result, contender: Contender, figures: Figures, model: str) -> str:
    """What a measurement of this server with this model says on an answer's setting; empty if nothing.

    Any other server is another machine, and a file of another form is somebody else's.
    """
    try:
        servers = result["settings"].get("contenders") or {}
        measured = servers.get(contender.name) or {}
        is_same_server = (measured.get("url"), measured.get("model")) == (contender.url, model)
        if not model or REFERENCE not in servers or not is_same_server:
            return ""
        rows = [row for row in measured_rows(result) if row["contender"] == contender.name and _is_of(row, figures)]
        verdict = verdict_of("", rows)
        if not verdict.points or figures.task or len({variant_label(row) for row in rows}) > 1:
            return ""
        return f"Measured over context lengths: {verdict.text()}. {verdict.note()}".strip()
    except (KeyError, TypeError, AttributeError, ValueError):
        return ""


def _is_of(row: Row, figures: Figures) -> bool:
    """By what an answer says of its setting, which leaves out check layers and options."""
    mine, theirs = (row.get("policy"), row.get("max_ttft_ms")), (figures.policy, figures.max_ttft_ms)
    return mine == theirs and (figures.max_ttft_ms is not None or _is_same(row.get("ratio"), figures.ratio))


def _is_same(ratio: float | None, other: float | None) -> bool:
    return ratio == other if ratio is None or other is None else math.isclose(ratio, other)
