"""The figures under an answer, what two answers' figures say about each other, and the events that bring them.

Times are the client's: taken where the bytes arrive. Token counts are the server's: from `usage`, and from the
contender's request report where it keeps one. A figure that nobody reported is None, never 0. Also here: what
became of the search for a similar earlier prompt, and what a turn on KV slots did, from the report to HTML. A worker
tells the page of an answer in this order: Sent, FirstToken and Text, then Done or Failed.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from kvarena.client import Usage
from tokens import NO_SCORES, AnswerToken, Span, TokenScores
from waterfall import read_stages, shown_ms


@dataclass(frozen=True)
class SimilarTask:
    """`similarity` is the cosine to the earlier prompt that lent its KV; None: none was similar enough, or none asked.
    `similarity_threshold` None: the server finds none good enough at present. `checked_similarity` is there when reuse
    was only compared with full prefill, to find the threshold; `check_agrees`: it gave the same first token.

    A layer pass is one prompt token through one layer. `matched_prompt` is empty where the server keeps it to itself.
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
        return cls(
            mode=report["mode"],
            similarity_threshold=report["similarity_threshold"],
            similarity=report["similarity"],
            num_layer_passes=report["num_layer_passes"],
            num_layer_passes_without_reuse=report["num_layer_passes_without_reuse"],
            matched_prompt=report.get("matched_prompt") or "",
            num_matched_prompt_tokens=report.get("num_matched_prompt_tokens"),
            checked_similarity=check.get("similarity"),
            check_agrees=check.get("agrees", False),
            warning=report.get("warning") or "",
        )

    @property
    def num_skipped_passes(self) -> int:
        """Negative where choosing what to recompute cost more than was reused."""
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
    """`turn` counts those of the topic, `prefill_ms` ends with the first token; times are the server's.

    `slot` and `status` are None for a turn that ended before it had a slot, `reason` says why a topic was reset,
    `notes` names those in its prompt.
    """

    topic: str
    slot: int | None
    turn: int
    status: str | None
    reason: str
    num_prefilled_tokens: int
    num_decoded_tokens: int
    prefill_ms: float
    decode_ms: float
    total_ms: float
    notes: str = ""

    @classmethod
    def read(cls, report: Mapping[str, Any]) -> SlotTurn:
        timings = report["timings"]
        return cls(
            topic=report["topic"],
            slot=report["slot"],
            turn=report["turn"],
            status=report["status"],
            reason=report.get("reason") or "",
            num_prefilled_tokens=report["num_prefilled_tokens"],
            num_decoded_tokens=report["num_decoded_tokens"],
            prefill_ms=timings["prefill_ms"],
            decode_ms=timings["decode_ms"],
            total_ms=timings["total_ms"],
            notes=report.get("notes") or "",
        )


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

    `num_prefix_tokens` is the part of `num_reused_tokens` from the server's own prefix cache. `task` is what a
    contender that looks for similar prompts says of its search, `slot_turn` what one with KV slots says of its turn.
    `misses`: how many chunks weren't reused, by reason; `system_miss`: why the system prompt wasn't. `stages`: where
    the time to the first token went, as far as the server said. `recomputed`: the ranges of the prompt that were, None
    where the server doesn't say; `scores`: by what they were chosen. `tokens` of the answer are there where their
    probabilities were asked for.
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
        """What was chosen of a contender: the policy and the share that it recomputes, or the time that it is given; or
        the mode. Empty: nothing.
        """
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

        None for a few tokens, whose rate says little, and for tokens that came together.
        """
        if (
            self.first_token_s is None
            or self.last_token_s is None
            or num_output_tokens is None
            or num_output_tokens < MIN_DECODE_TOKENS
            or self.last_token_s - self.first_token_s < MIN_DECODE_S
        ):
            return None
        return (num_output_tokens - 1) / (self.last_token_s - self.first_token_s)


def from_usage(stopwatch: Stopwatch, usage: Usage, approximate: bool = False) -> Figures:
    """The figures of a server without reports. An exact one reuses prefixes only; of another only the sum is known."""
    prompt, output, cached = usage.num_prompt_tokens, usage.num_output_tokens, usage.num_cached_tokens
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


def with_report(
    figures: Figures, report: Mapping[str, Any], view: str = "", metrics: Mapping[str, float] = {}
) -> Figures:
    """The same figures with the counts and spans of the contender's own request report, and what its view shows.
    `metrics`: vLLM's own times of the request.
    """
    system_miss = _system_miss(report)
    misses = Counter(report.get("misses_by_reason") or {})
    misses.subtract([system_miss] if system_miss else [])
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
        max_ttft_ms=report.get("max_ttft_ms"),
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
    """Why the text before the first chunk wasn't reused: in a chat, nothing else begins with the prompt. Empty where it
    was, and where it isn't known: of one that the prefix cache has begun, the report has the rest as any chunk.
    """
    return next((miss["reason"] for miss in report.get("misses") or () if miss["start"] == 0), "")


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
        stages=(),
    )


def speed_line(first_tokens: Sequence[tuple[str, float]]) -> str:
    """Who was first, and by what factor, from measured times to the first token: (title, ms) per contender.

    Names all that it compares: others may stand on the page that failed, or have no token yet.
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
    """Says whose prompt was partly in its prefix cache already. If most of it was, it is no fair race."""
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
    """The body of the request, but for its messages."""

    request: Mapping[str, Any]


@dataclass(frozen=True)
class FirstToken:
    """The first token is there: `first_token_ms` after the request was sent."""

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
