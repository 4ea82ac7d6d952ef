"""The figures of an answer, what figures of several answers say about each other, and the events that bring them.

Times are measured here, where the bytes arrive. Token counts are the server's: from `usage`, and from the contender's
request report if it keeps one. A figure that nobody reported is None, never 0. Also here: the search for a similar
earlier prompt and a turn on KV slots, from the report to HTML. A worker sends the page these events for an answer:
Sent, FirstToken and Text, then Done or Failed.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Literal

from kvarena.client import StreamedAnswer
from settings import read_fields
from tokens import NO_SCORES, AnswerToken, Span, TokenScores, read_answer_tokens
from waterfall import read_stages, shown_ms

Tone = Literal["gain", "tie", "loss"]
"""How a comparison turned out; the page colours it."""


@dataclass(frozen=True)
class SimilarTask:
    """`similarity` is the cosine to the earlier prompt that lent its KV; None if none was similar enough.
    `similarity_threshold` None: the server currently finds none good enough. `checked_similarity` is set if reuse was
    only compared with full prefill, to find the threshold; `check_agrees` says whether the first token was the same.

    A layer pass is one prompt token through one layer. `matched_prompt` is empty if the server doesn't show it.
    """

    mode: str
    similarity_threshold: float | None
    similarity: float | None
    num_layer_passes: int
    num_layer_passes_without_reuse: int
    matched_prompt: str = ""
    num_matched_prompt_tokens: int | None = None
    checked_similarity: float | None = None
    check_agrees: bool = False
    warning: str = ""

    @classmethod
    def read(cls, report: Mapping[str, Any]) -> SimilarTask:
        check = report.get("check") or {}
        checked = {"checked_similarity": check.get("similarity"), "check_agrees": check.get("agrees")}
        return read_fields(cls, {**report, **checked})

    @property
    def num_skipped_passes(self) -> int:
        """Negative if choosing what to recompute cost more than was reused."""
        return self.num_layer_passes_without_reuse - self.num_layer_passes


def similar_task_html(task: SimilarTask) -> str:
    if task.similarity is None:
        return (
            f'<div class="ka-task" data-testid="similar-task" data-hit="false">{_miss(task)} Prefilled in full.</div>'
        )
    return (
        '<div class="ka-task" data-testid="similar-task" data-hit="true">'
        "Similar to an earlier prompt: cosine "
        f"{_number('similarity', task.similarity, f'{task.similarity:.5f}')}, "
        f"threshold {_shown(task.similarity_threshold)}. {_skipped(task)}{_earlier_prompt(task)}"
        f"{f' <b>Beware: {escape(task.warning)}.</b>' if task.warning else ''}</div>"
    )


def _miss(task: SimilarTask) -> str:
    if task.checked_similarity is not None:
        first_token = "would have begun as full prefill did" if task.check_agrees else "would have begun differently"
        return f"Compared, to find the threshold: reuse at cosine {task.checked_similarity:.5f} {first_token}."
    if task.similarity_threshold is None:
        return "No reuse: the server finds no similarity at which answers agree with full prefill often enough."
    threshold = _shown(task.similarity_threshold)
    return f"No similar earlier prompt: none that can be used has a cosine of {threshold} or more."


def _shown(threshold: float | None) -> str:
    return "none" if threshold is None else f"{threshold:g}"


def _skipped(task: SimilarTask) -> str:
    skipped, total = task.num_skipped_passes, task.num_layer_passes_without_reuse
    number = _number("num_skipped_passes", skipped, f"{abs(skipped):,}")
    if skipped < 0:
        return f"Skipped nothing: ran {number} layer passes more than the {total:,} of a full prefill."
    return f"Skipped {number} of {total:,} layer passes ({skipped / total:.0%})."


def _earlier_prompt(task: SimilarTask) -> str:
    if not task.matched_prompt:
        return ""
    size = "" if task.num_matched_prompt_tokens is None else f", {task.num_matched_prompt_tokens:,} tokens"
    return (
        f"<details><summary>The earlier prompt{size}</summary>"
        f'<div class="ka-text" data-testid="matched-prompt">{escape(task.matched_prompt)}</div></details>'
    )


def _number(key: str, value: float, text: str) -> str:
    return f'<b data-figure="{key}" data-value="{value!r}">{text}</b>'


STATUS_LABELS = {
    "NEW_TOPIC": "new topic",
    "INCREMENTAL_PREFILL": "incremental prefill",
    "RESET_TOPIC": "topic reset",
    "FULL_PREFILL": "full prefill",
}


@dataclass(frozen=True)
class SlotTurn:
    """`turn` counts the topic's turns, `prefill_ms` ends with the first token; times are the server's.

    `slot` and `status` are None for a turn that ended before it got a slot, `reason` says why a topic was reset,
    `notes` names the notes in its prompt.
    """

    topic: str
    slot: int | None
    turn: int
    status: str | None
    num_prefilled_tokens: int
    num_decoded_tokens: int
    prefill_ms: float
    decode_ms: float
    total_ms: float
    reason: str = ""
    notes: str = ""

    @classmethod
    def read(cls, report: Mapping[str, Any]) -> SlotTurn:
        return read_fields(cls, {**report, **report["timings"]})


def slot_turn_html(turn: SlotTurn) -> str:
    status = turn.status or ""
    slot = "no slot" if turn.slot is None else f"slot {turn.slot}"
    reason = f'<div data-testid="reset-reason">{escape(turn.reason)}</div>' if turn.reason else ""
    notes = f'<div data-testid="notes">notes: {escape(turn.notes)}</div>' if turn.notes else ""
    return (
        f'<div class="ka-task" data-testid="slot-turn" data-status="{escape(status)}" '
        f'data-topic="{escape(turn.topic)}" data-turn="{turn.turn}">'
        f'<span class="ka-badge ka-status-{escape(status)}">{escape(STATUS_LABELS.get(status, status))}</span> '
        f"<b>{escape(turn.topic)}</b> in {slot}, turn {turn.turn}: prefilled "
        f"{_number('num_prefilled_tokens', turn.num_prefilled_tokens, f'{turn.num_prefilled_tokens:,}')} tokens"
        f"{reason}{notes}<div>{_times(turn)}</div></div>"
    )


def _times(turn: SlotTurn) -> str:
    times = {"prefill": turn.prefill_ms, "decode": turn.decode_ms, "total": turn.total_ms}
    return ", ".join(f"{name} {_number(f'{name}_ms', ms, shown_ms(ms))}" for name, ms in times.items())


SAME_SPEED_RATIO = 1.05
CACHED_RATIO = 0.5
MIN_DECODE_S = 0.001
MIN_DECODE_TOKENS = 5


@dataclass(frozen=True)
class Figures:
    """`num_prompt_tokens = num_reused_tokens + num_recomputed_tokens + num_computed_tokens`.

    `num_prefix_tokens` are those of `num_reused_tokens` from the server's own prefix cache. `misses` counts chunks that
    weren't reused, by reason; `system_miss` says why the system prompt wasn't. `stages` is where the time to the first
    token went, as far as the server says. `recomputed` are ranges of the prompt, None if the server doesn't say;
    `scores` are what they were chosen by. `tokens` are the answer's, if probabilities were asked for. `task` is set by
    contenders that look for similar prompts, `slot_turn` by those with KV slots.
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
    max_ttft_ms: float | None = None
    spans: tuple[Span, ...] = ()
    misses: tuple[tuple[str, int], ...] = ()
    system_miss: str = ""
    stages: tuple[tuple[str, float], ...] = ()
    recomputed: tuple[tuple[int, int], ...] | None = None
    scores: TokenScores = NO_SCORES
    tokens: tuple[AnswerToken, ...] = ()
    task: SimilarTask | None = None
    slot_turn: SlotTurn | None = None

    @property
    def setting(self) -> str:
        """What was chosen of a contender: a policy with its share or time, or a mode; empty if nothing."""
        if self.task:
            return self.task.mode
        if self.policy and self.max_ttft_ms is not None:
            return f"{self.policy} within {self.max_ttft_ms:,.4g} ms"
        return (self.policy or "") + (f" {self.ratio:.0%}" if self.policy and self.ratio is not None else "")

    @property
    def is_mostly_cached(self) -> bool:
        """Most of the prompt was in the server's own prefix cache."""
        return (self.num_prefix_tokens or 0) > CACHED_RATIO * (self.num_prompt_tokens or 0)

    @property
    def num_moved_tokens(self) -> int | None:
        """Reused, and not from the server's own prefix cache."""
        return None if self.num_reused_tokens is None else self.num_reused_tokens - (self.num_prefix_tokens or 0)


def of_answer(answer: StreamedAnswer, approximate: bool = False) -> Figures:
    """Figures without a report. An exact server reuses only prefixes; of an approximate one only the sum is known."""
    usage = answer.usage
    prompt, cached = usage.num_prompt_tokens, usage.num_cached_tokens
    return Figures(
        first_token_ms=answer.ttft_ms,
        total_ms=1000 * (answer.tokens[-1].time_s - answer.sent_s),
        tokens_per_s=_decode_speed(answer),
        num_output_tokens=usage.num_output_tokens,
        num_prompt_tokens=prompt,
        num_reused_tokens=cached,
        num_recomputed_tokens=None if cached is None or approximate else 0,
        num_computed_tokens=None if prompt is None or cached is None else prompt - cached,
        num_prefix_tokens=None if approximate else cached,
        approximate=approximate,
        spans=() if approximate else _prefix_spans(prompt, cached),
        stages=read_stages({}, answer.timings),
        tokens=read_answer_tokens(answer.text, answer.logprobs),
    )


def _decode_speed(answer: StreamedAnswer) -> float | None:
    """Tokens per second, without the first token, which belongs to the prefill.

    None for a few tokens, whose rate means little, and for tokens that arrived together.
    """
    num_tokens, decode_s = answer.usage.num_output_tokens, answer.tokens[-1].time_s - answer.tokens[0].time_s
    if num_tokens is None or num_tokens < MIN_DECODE_TOKENS or decode_s < MIN_DECODE_S:
        return None
    return (num_tokens - 1) / decode_s


_REPORTED = (
    *("num_reused_tokens", "num_recomputed_tokens", "num_computed_tokens", "num_prefix_tokens"),
    *("approximate", "policy", "ratio", "max_ttft_ms"),
)
"""What only the report knows, if the contender keeps reports."""


def with_report(
    figures: Figures, report: Mapping[str, Any], view: str = "", metrics: Mapping[str, float] = {}
) -> Figures:
    """The same figures with the counts and spans of the contender's request report, and what its `view` shows.
    `metrics` are vLLM's own times of the request.
    """
    told: dict[str, Any] = {name: report.get(name) for name in _REPORTED}
    system_miss = _system_miss(report)
    misses = Counter(report.get("misses_by_reason") or {})
    misses.subtract([system_miss] if system_miss else [])
    return dataclasses.replace(
        figures,
        **told,
        num_prompt_tokens=report.get("num_prompt_tokens", figures.num_prompt_tokens),
        spans=tuple(Span(s["start"], s["end"], s["source"]) for s in report.get("spans") or ()),
        misses=tuple((+misses).items()),
        system_miss=system_miss,
        stages=read_stages(report, metrics),
        recomputed=tuple((start, end) for start, end in report["recomputed_spans"])
        if "recomputed_spans" in report
        else None,
        scores=TokenScores.read(report),
        task=SimilarTask.read(report) if view == "similar_task" else None,
        slot_turn=SlotTurn.read(report) if view == "slots" else None,
    )


def _system_miss(report: Mapping[str, Any]) -> str:
    """Why the text before the first chunk wasn't reused; in a chat, nothing else begins at position 0. Empty if it was
    reused. Also if the prefix cache had its beginning: the report has the rest like any chunk.
    """
    return next((miss["reason"] for miss in report.get("misses") or () if miss["start"] == 0), "")


def without_report(figures: Figures) -> Figures:
    """For a contender that keeps reports, if this request's never came."""
    unknown: dict[str, Any] = dict.fromkeys(_REPORTED)
    return dataclasses.replace(figures, **unknown, spans=(), stages=())


def speed_line(first_tokens: Sequence[tuple[str, float]]) -> str:
    """Who was first, and by what factor, from (title, ms to the first token) of each contender.

    Names everyone it compares, since the page may show others that failed or have no token yet.
    """
    if len(first_tokens) < 2:
        return ""
    (winner, best), *others = sorted(first_tokens, key=lambda entry: entry[1])
    slower = [(title, ms / max(best, 1e-9)) for title, ms in others]
    if all(factor < SAME_SPEED_RATIO for _, factor in slower):
        return f"{_enumerated([winner, *(title for title, _ in slower)])} are equally fast to the first token"
    factors = [f"{format_factor(factor)} times faster than {title}" for title, factor in slower]
    return f"{winner}: {_enumerated(factors)} to the first token"


def _enumerated(parts: Sequence[str]) -> str:
    """`a, b and c`."""
    *others, last = parts
    return f"{', '.join(others)} and {last}" if others else last


def format_factor(factor: float) -> str:
    return f"{factor:.2f}" if factor < 2 else f"{factor:.1f}" if factor < 100 else f"{factor:.0f}"


def prefix_cache_note(answers: Sequence[tuple[str, Figures]]) -> str:
    """Whose prompt was partly in its prefix cache. If most of it was, the race isn't fair."""
    notes = [
        f"{title} had {figures.num_prefix_tokens:,} of {figures.num_prompt_tokens:,} prompt tokens"
        for title, figures in answers
        if figures.num_prefix_tokens and figures.num_prompt_tokens
    ]
    lead = "Not a fresh prompt: " if any(figures.is_mostly_cached for _, figures in answers) else ""
    return f"{lead}{'; '.join(notes)} in its prefix cache." if notes else ""


def _prefix_spans(num_prompt_tokens: int | None, num_cached_tokens: int | None) -> tuple[Span, ...]:
    if num_prompt_tokens is None or num_cached_tokens is None:
        return ()
    prefix = Span(0, num_cached_tokens, "prefix")
    rest = Span(num_cached_tokens, num_prompt_tokens, "computed")
    return tuple(span for span in (prefix, rest) if span.end > span.start)


@dataclass(frozen=True)
class Sent:
    """The request's body without its messages."""

    request: Mapping[str, Any]


@dataclass(frozen=True)
class FirstToken:
    """`first_token_ms` after the request was sent."""

    first_token_ms: float


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Done:
    """`finish_reason` is the server's: `stop`, `length` and so on."""

    figures: Figures
    finish_reason: str


@dataclass(frozen=True)
class Failed:
    message: str


Event = Sent | FirstToken | Text | Done | Failed
