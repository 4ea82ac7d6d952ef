"""Where the time to the first token went: a lane for each contender, all on one time axis that begins at the request.

A server's report names the stages that it measured; vLLM reports its queue and prefill with the answer. What lies
between their sum and the first token, which the client measured, is a stage too. How long the rest of the answer took
is beside it in words: on the axis it would leave no room for the bars. Data and HTML only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from tokens import legend_html

Stages = tuple[tuple[str, float], ...]

_REPORTED = {
    "http": ("tokenize_ms",),
    "queue": ("queue_ms",),
    "lookup": ("lookup_ms", "cache_lookup_ms"),
    "fetch": ("fetch_ms", "transfer_ms"),
    "chunks": ("prefill_chunks_ms",),
    "move": ("move_ms", "write_ms"),
    "select": ("select_ms",),
    "recompute": ("recompute_ms",),
    "question": ("question_ms",),
    "prefill": ("prefill_ms",),
}
"""The stages in their order, and the times that belong to each."""
LABELS = {
    "http": "HTTP and tokenizing",
    "queue": "queue",
    "lookup": "look-up",
    "fetch": "fetch",
    "chunks": "prefill of new chunks",
    "move": "move and write",
    "select": "choose tokens",
    "recompute": "recompute",
    "question": "the question's prefill",
    "prefill": "prefill",
    "rest": "the rest: HTTP, queue and prefill",
    "later": "until the first token; its stages are told when the answer ends",
}
"""`question` is what a blend leaves to prefill, `rest` what a server doesn't break down."""
MIN_SHOWN_MS = 0.05
MAX_STEPS = 5
WHOLE_MS = 1000  # from here on without tenths


@dataclass(frozen=True)
class Row:
    """One contender's answer. `decode_ms`: from the first token to the end, None until then."""

    name: str
    title: str
    first_token_ms: float
    stages: Stages
    decode_ms: float | None = None


def read_stages(report: Mapping[str, Any], metrics: Mapping[str, float] = {}) -> Stages:
    """From a request's report, and vLLM's own `metrics` of the request."""
    times = {**report, **(report.get("timings") or {}), **_vllm_times(report, metrics)}
    told = {stage: [times[key] for key in keys if times.get(key) is not None] for stage, keys in _REPORTED.items()}
    return tuple((stage, sum(ms)) for stage, ms in told.items() if ms)


def _vllm_times(report: Mapping[str, Any], metrics: Mapping[str, float]) -> dict[str, float]:
    """vLLM's time to the first token begins when a request is scheduled. It includes a blend, except one in pieces,
    which comes before that. The report's own queue also includes tokenizing.
    """
    queue_ms, prefill_ms = metrics.get("queue_time_ms"), metrics.get("time_to_first_token_ms")
    blend_ms, in_pieces = report.get("blend_ms", 0.0), report.get("in_pieces")
    if queue_ms is None or prefill_ms is None or (blend_ms and in_pieces is None):
        return {}
    if not blend_ms:
        return {"queue_ms": queue_ms, "prefill_ms": prefill_ms}
    if in_pieces:
        return {"queue_ms": queue_ms - blend_ms, "question_ms": prefill_ms}
    return {"queue_ms": queue_ms, "question_ms": prefill_ms - blend_ms}


def bars(row: Row) -> list[tuple[str, float, float]]:
    """Stage, begin and end in ms; the last one ends with the first token.

    A stage that doesn't fit before the first token came after it, such as storing a prefix whose logits are kept. What
    a server that reports its prefill didn't measure is the way there and back.
    """
    stages, rest_ms = {}, row.first_token_ms
    for stage, ms in row.stages:
        if MIN_SHOWN_MS <= ms <= rest_ms:
            stages[stage] = ms
            rest_ms -= ms
    if dict(row.stages).keys() & {"prefill", "question"}:
        stages = {"http": stages.pop("http", 0.0) + rest_ms, **stages}
    elif rest_ms >= MIN_SHOWN_MS:
        stages["later" if row.decode_ms is None and not row.stages else "rest"] = rest_ms
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
    legend = legend_html((f"stage-{stage}", label) for stage, label in LABELS.items() if stage in used)
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
    """A time, everywhere on the page."""
    return f"{ms:,.{0 if round(ms, 1) >= WHOLE_MS else 1}f} ms"
