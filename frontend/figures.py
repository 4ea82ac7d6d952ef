"""The figures under an answer, and what two answers' figures say about each other.

Times are the client's: taken where the bytes arrive. Token counts are the server's: from `usage`, and from the
contender's request report where it keeps one. A figure that nobody reported is None, never 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from similar_task import SimilarTask
from slot_turn import SlotTurn

SAME_SPEED_RATIO = 1.05
MIN_DECODE_S = 0.001


@dataclass(frozen=True)
class Span:
    """Prompt tokens `[start, end)` and where their KV came from: `prefix`, `reused` or `computed`."""

    start: int
    end: int
    source: str


@dataclass(frozen=True)
class Figures:
    """`num_prompt_tokens = num_reused_tokens + num_recomputed_tokens + num_computed_tokens`.

    `num_prefix_tokens` is the part of `num_reused_tokens` that the server's own prefix cache supplied. `task` is what a
    contender that looks for similar prompts says of its search, `slot_turn` what one with KV slots says of its turn.
    """

    first_token_ms: float | None = None
    total_ms: float | None = None
    tokens_per_s: float | None = None
    num_output_tokens: int | None = None
    num_prompt_tokens: int | None = None
    num_reused_tokens: int | None = None
    num_recomputed_tokens: int | None = None
    num_computed_tokens: int | None = None
    num_prefix_tokens: int | None = None
    approximate: bool | None = None
    policy: str | None = None
    ratio: float | None = None
    spans: tuple[Span, ...] = ()
    task: SimilarTask | None = None
    slot_turn: SlotTurn | None = None


@dataclass(frozen=True)
class Stopwatch:
    """Readings of one clock, in seconds. `last_token_s` is when the last token, or the end, arrived."""

    sent_s: float
    first_token_s: float | None
    last_token_s: float | None

    @property
    def first_token_ms(self) -> float | None:
        return None if self.first_token_s is None else (self.first_token_s - self.sent_s) * 1000

    @property
    def total_ms(self) -> float | None:
        return None if self.last_token_s is None else (self.last_token_s - self.sent_s) * 1000

    def tokens_per_s(self, num_output_tokens: int | None) -> float | None:
        """Decode speed: the first token belongs to the prefill and is left out.

        None for one token, and for tokens that came together: there is no time between them to divide by.
        """
        if (
            self.first_token_s is None
            or self.last_token_s is None
            or num_output_tokens is None
            or num_output_tokens < 2
            or self.last_token_s - self.first_token_s < MIN_DECODE_S
        ):
            return None
        return (num_output_tokens - 1) / (self.last_token_s - self.first_token_s)


def from_usage(stopwatch: Stopwatch, usage: Mapping[str, Any] | None, approximate: bool = False) -> Figures:
    """The figures of a server without reports. An exact one reuses prefixes only; of another only the sum is known."""
    usage = usage or {}
    prompt = usage.get("prompt_tokens")
    output = usage.get("completion_tokens")
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
    return Figures(
        first_token_ms=stopwatch.first_token_ms,
        total_ms=stopwatch.total_ms,
        tokens_per_s=stopwatch.tokens_per_s(output),
        num_output_tokens=output,
        num_prompt_tokens=prompt,
        num_reused_tokens=cached,
        num_recomputed_tokens=None if cached is None or approximate else 0,
        num_computed_tokens=None if prompt is None or cached is None else prompt - cached,
        num_prefix_tokens=None if approximate else cached,
        approximate=approximate,
        spans=() if approximate else _prefix_spans(prompt, cached),
    )


def with_report(figures: Figures, report: Mapping[str, Any]) -> Figures:
    """The same figures with the counts and spans of the contender's own request report."""
    return dataclasses.replace(
        figures,
        num_prompt_tokens=report.get("num_prompt_tokens", figures.num_prompt_tokens),
        num_reused_tokens=report.get("num_reused_tokens"),
        num_recomputed_tokens=report.get("num_recomputed_tokens"),
        num_computed_tokens=report.get("num_computed_tokens"),
        num_prefix_tokens=report.get("num_prefix_tokens"),
        approximate=report.get("approximate"),
        policy=report.get("policy"),
        ratio=report.get("ratio"),
        spans=tuple(Span(s["start"], s["end"], s["source"]) for s in report.get("spans") or ()),
        task=SimilarTask.read(report) if report.get("contender") == "simllm" else None,
        slot_turn=SlotTurn.read(report) if report.get("contender") == "ai100" else None,
    )


def without_report(figures: Figures) -> Figures:
    """The figures of a contender that keeps request reports, for a request whose report never came."""
    return dataclasses.replace(
        figures,
        num_reused_tokens=None,
        num_recomputed_tokens=None,
        num_computed_tokens=None,
        num_prefix_tokens=None,
        approximate=None,
        spans=(),
    )


def speed_line(first_tokens: Sequence[tuple[str, float]]) -> str:
    """Who was first, and by what factor, from measured times to the first token: (title, ms) per contender.

    Names all that it compares: others may stand on the page that failed, or have no token yet.
    """
    if len(first_tokens) < 2:
        return ""
    (winner, best), *others = sorted(first_tokens, key=lambda entry: entry[1])
    behind = [(title, ms / max(best, 1e-9)) for title, ms in others]
    if all(factor < SAME_SPEED_RATIO for _, factor in behind):
        return f"{_enumerated([winner, *(title for title, _ in behind)])} are equally fast to the first token"
    factors = [f"{format_factor(factor)} times faster than {title}" for title, factor in behind]
    return f"{winner}: {_enumerated(factors)} to the first token"


def _enumerated(parts: Sequence[str]) -> str:
    """`a, b and c`."""
    *others, last = parts
    return f"{', '.join(others)} and {last}" if others else last


def format_factor(factor: float) -> str:
    return f"{factor:.2f}" if factor < 2 else f"{factor:.1f}" if factor < 100 else f"{factor:.0f}"


def prefix_cache_note(answers: Sequence[tuple[str, Figures]]) -> str:
    """Says whose prompt was partly in its prefix cache already: a repeated prompt is no fair race."""
    notes = [
        f"{title} had {figures.num_prefix_tokens:,} of {figures.num_prompt_tokens:,} prompt tokens"
        for title, figures in answers
        if figures.num_prefix_tokens and figures.num_prompt_tokens
    ]
    return f"Not a fresh prompt: {'; '.join(notes)} in its prefix cache." if notes else ""


def _prefix_spans(num_prompt_tokens: int | None, num_cached_tokens: int | None) -> tuple[Span, ...]:
    if num_prompt_tokens is None or num_cached_tokens is None:
        return ()
    prefix = Span(0, num_cached_tokens, "prefix")
    rest = Span(num_cached_tokens, num_prompt_tokens, "computed")
    return tuple(span for span in (prefix, rest) if span.end > span.start)
