"""Where the time of answers went: a lane for each contender, all on one time axis, from the request to the last token.

A server's report names the stages that it measured; vLLM without one tells its queue and its prefill with the answer.
What lies between their sum and the first token, which the client measured, is a stage too. Data and HTML only.
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
    "chunks": "new chunks",
    "move": "move and write",
    "select": "choose",
    "recompute": "recompute",
    "prefill": "prefill",
    "rest": "HTTP, queue and prefill, not told apart",
    "decode": "decode",
}
QUESTION = "the question's prefill, HTTP"
ROOM_FOR_DECODE = 1.25  # of the longest time to a first token; a long decode would leave nothing to see of it
MIN_SHOWN_MS = 0.05


@dataclass(frozen=True)
class Row:
    """One contender's answer. `total_ms` is 0 before its end."""

    name: str
    title: str
    first_token_ms: float
    total_ms: float
    stages: Stages


def read_stages(report: Mapping[str, Any]) -> Stages:
    times = {**report, **(report.get("timings") or {})}
    sums = {stage: sum(times.get(key) or 0.0 for key in keys) for stage, keys in _REPORTED.items()}
    return tuple((stage, ms) for stage, ms in sums.items() if ms >= MIN_SHOWN_MS)


def bars(row: Row) -> list[tuple[str, str, float, float]]:
    """Stage, label, begin and end in ms; they end with the first token, and with decode after it.

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
        rest_ms = 0.0
    parts = [(stage, LABELS[stage], ms) for stage, ms in stages.items()]
    if rest_ms >= MIN_SHOWN_MS:
        parts.append(("prefill", QUESTION, rest_ms) if stages else ("rest", LABELS["rest"], rest_ms))
    if row.total_ms > row.first_token_ms:
        parts.append(("decode", LABELS["decode"], row.total_ms - row.first_token_ms))
    placed, at_ms = [], 0.0
    for stage, label, ms in parts:
        placed.append((stage, label, at_ms, at_ms + ms))
        at_ms += ms
    return placed


def waterfall_html(rows: Sequence[Row]) -> str:
    """Empty without a first token."""
    if not rows:
        return ""
    axis_ms = ROOM_FOR_DECODE * max(row.first_token_ms for row in rows)
    lanes = "".join(_lane_html(row, axis_ms) for row in rows)
    used = {label: stage for row in rows for stage, label, _, _ in bars(row)}
    legend = "".join(
        f'<span class="ka-key"><i class="ka-stage-{stage}"></i>{escape(label)}</span>' for label, stage in used.items()
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
        f'title="{escape(label)}: {_shown(end - begin)}"></i>'
        for stage, label, begin, end in bars(row)
    )
    return (
        f'<div class="ka-lane" data-testid="lane-{escape(row.name)}" data-ms="{row.first_token_ms:.2f}">'
        f'<b>{escape(row.title)}</b><div class="ka-track">{cells}</div><span>{_shown(row.first_token_ms)}</span></div>'
    )


def _ticks_html(axis_ms: float) -> str:
    """At most five, at round times; none so far right that it would be cut."""
    step = 10.0 ** math.floor(math.log10(axis_ms))
    step = next(s for s in (step / 5, step / 2, step, 2 * step) if axis_ms / s <= 5.5)
    times = [step * count for count in range(1, 6) if step * count < 0.95 * axis_ms]
    return "".join(f'<span style="left:{100 * ms / axis_ms:.2f}%">{_shown(ms)}</span>' for ms in times)


def _shown(ms: float) -> str:
    return f"{ms / 1000:,.2f} s" if ms >= 1000 else f"{ms:,.0f} ms" if ms >= 10 else f"{ms:.1f} ms"
