"""Where the time to the first token went: a lane for each contender, all on one time axis that begins at the request.

A server's report names the stages that it measured; vLLM without one tells its queue and its prefill with the answer.
What lies between their sum and the first token, which the client measured, is a stage too. What the rest of the answer
took stands beside it in words: on the axis it would leave the bars no room. Data and HTML only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

Stages = tuple[tuple[str, float], ...]

_REPORTED = {
    "http": ("tokenize_ms",),
    "queue": ("queue_ms", "queue_time_ms"),
    "lookup": ("lookup_ms", "cache_lookup_ms"),
    "fetch": ("fetch_ms", "transfer_ms"),
    "chunks": ("prefill_chunks_ms",),
    "move": ("move_ms", "write_ms"),
    "select": ("select_ms",),
    "recompute": ("recompute_ms",),
    "prefill": ("prefill_ms", "time_to_first_token_ms"),
}
"""The stages in their order, and the times of a request report that belong to each, or of vLLM's `metrics`, in which
the time to the first token is that from a request's turn on.
"""
LABELS = {
    "http": "HTTP and tokenizing",
    "queue": "queue",
    "lookup": "look-up",
    "fetch": "fetch",
    "chunks": "prefill of new chunks",
    "move": "move and write",
    "select": "choose",
    "recompute": "recompute",
    "question": "HTTP and the question's prefill",
    "prefill": "prefill",
    "rest": "HTTP, queue and prefill together",
}
"""Of the stages in a chart; `question` and `rest` are what a server didn't tell apart."""
MIN_SHOWN_MS = 0.05
MAX_STEPS = 5
WHOLE_MS = 10_000  # a tenth of so long a time says nothing


@dataclass(frozen=True)
class Row:
    """One contender's answer. `decode_ms`: from the first token to the end, None until then."""

    name: str
    title: str
    first_token_ms: float
    stages: Stages
    decode_ms: float | None = None


def read_stages(report: Mapping[str, Any]) -> Stages:
    times = {**report, **(report.get("timings") or {})}
    sums = {stage: sum(times.get(key) or 0.0 for key in keys) for stage, keys in _REPORTED.items()}
    return tuple((stage, ms) for stage, ms in sums.items() if ms >= MIN_SHOWN_MS)


def bars(row: Row) -> list[tuple[str, float, float]]:
    """Stage, begin and end in ms; the last one ends with the first token.

    A stage that has no room before the first token came after it, as the transfer of a prefix whose logits are kept
    does. What the server didn't measure is the question's prefill after a blend, and the way there and back; of an
    engine that measures its whole prefill it is that way alone.
    """
    stages, rest_ms = {}, row.first_token_ms
    for stage, ms in row.stages:
        if ms <= rest_ms:
            stages[stage] = ms
            rest_ms -= ms
    if "prefill" in stages:
        stages = {"http": stages.pop("http", 0.0) + rest_ms, **stages}
    elif rest_ms >= MIN_SHOWN_MS:
        stages["question" if stages else "rest"] = rest_ms
    placed, at_ms = [], 0.0
    for stage, ms in stages.items():
        placed.append((stage, at_ms, at_ms + ms))
        at_ms += ms
    return placed


def waterfall_html(rows: Sequence[Row]) -> str:
    """Empty without a first token."""
    if not rows:
        return ""
    axis_ms = max(row.first_token_ms for row in rows)
    lanes = "".join(_lane_html(row, axis_ms) for row in rows)
    used = {stage for row in rows for stage, _, _ in bars(row)}
    legend = "".join(
        f'<span class="ka-key"><i class="ka-stage-{stage}"></i>{escape(label)}</span>'
        for stage, label in LABELS.items()
        if stage in used
    )
    return (
        '<div class="ka-waterfall" data-testid="waterfall"><b>Where the time to the first token goes</b>'
        f'{lanes}<div class="ka-lane"><b></b><div class="ka-ticks">{_ticks_html(axis_ms)}</div></div>'
        f'<div class="ka-legend">{legend}</div></div>'
    )


def _lane_html(row: Row, axis_ms: float) -> str:
    cells = "".join(
        f'<i class="ka-stage-{stage}" data-stage="{stage}" data-ms="{end - begin:.2f}" '
        f'style="left:{100 * begin / axis_ms:.3f}%;width:{100 * (end - begin) / axis_ms:.3f}%" '
        f'title="{escape(LABELS[stage])}: {shown_ms(end - begin)}"></i>'
        for stage, begin, end in bars(row)
    )
    return (
        f'<div class="ka-lane" data-testid="lane-{escape(row.name)}" data-ms="{row.first_token_ms:.2f}">'
        f'<b>{escape(row.title)}</b><div class="ka-track">{cells}</div>'
        f"<span>{shown_ms(row.first_token_ms)}{_decode_html(row)}</span></div>"
    )


def _decode_html(row: Row) -> str:
    if row.decode_ms is None:
        return ""
    title = "What the rest of the answer took, after its first token"
    return f'<small data-decode="{row.decode_ms:.2f}" title="{title}">+ {shown_ms(row.decode_ms)} decode</small>'


def _ticks_html(axis_ms: float) -> str:
    """From 0 on, at round times; the last one has the unit."""
    step = 10.0 ** math.floor(math.log10(axis_ms))
    step = next(s for s in (step / 5, step / 2, step, 2 * step) if axis_ms / s <= MAX_STEPS)
    last = math.floor(axis_ms / step)
    return "".join(
        f'<span style="left:{100 * count * step / axis_ms:.2f}%">{count * step:,.10g}{" ms" * (count == last)}</span>'
        for count in range(last + 1)
    )


def shown_ms(ms: float) -> str:
    """A time on the page, in a pane as in the chart."""
    return f"{ms:,.{0 if round(ms, 1) >= WHOLE_MS else 1}f} ms"
