"""`kvarena bench sustained`: whether a gain lasts, over many requests and more chunks than the store has room for.

Chunks are drawn from a Zipf distribution: few often, most seldom; some texts come only once. Every request goes to a
contender and to plain. What counts is speedup and hits at the end against those of the beginning, when the store was
full of the most popular chunks: blending has been seen to fade there (LMCache's issue 4663).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from rich.console import Console

from kvarena.bench.console import table_of
from kvarena.bench.measure import in_turn
from kvarena.bench.prompts import ContextOfChunks, Vocabulary, longest_tokens
from kvarena.bench.results import DIGITS, Row, ratio_spread, spread
from kvarena.bench.ttft import Contender, Timed
from kvarena.bench.variants import Variant
from kvarena.panels.panel import REFERENCE, variant_label

NUM_PARTS = 5


@dataclass(frozen=True)
class SustainedWorkload:
    """`num_requests` with `chunks_per_request` chunks each, of which `new_per_request` never come again; the others are
    of `num_chunks`, drawn in proportion to 1 / rank ** `zipf`.
    """

    num_requests: int = 300
    num_chunks: int = 200
    chunks_per_request: int = 8
    new_per_request: int = 1
    chunk_tokens: int = 256
    question_tokens: int = 20
    zipf: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_requests < NUM_PARTS:
            raise ValueError(f"--requests is {self.num_requests}; at least {NUM_PARTS} are needed")
        if not 0 <= self.new_per_request < self.chunks_per_request <= self.num_chunks:
            raise ValueError("a request has more chunks than new ones, and not more than there are")

    @property
    def longest_tokens(self) -> int:
        return longest_tokens(self.chunks_per_request * self.chunk_tokens, self.question_tokens)


class SustainedPrompts:
    def __init__(self, vocabulary: Vocabulary, workload: SustainedWorkload) -> None:
        self._workload = workload
        self._rng = random.Random(workload.seed)
        self._numbers = np.random.default_rng(workload.seed)
        self._context = ContextOfChunks(vocabulary, workload.question_tokens, self._rng)
        self._chunks = [self._context.chunk(workload.chunk_tokens) for _ in range(workload.num_chunks)]
        weights = 1 / np.arange(1, workload.num_chunks + 1) ** workload.zipf
        self._shares = weights / weights.sum()

    def all_known(self) -> list[list[int]]:
        """Prompts with every chunk once, the most popular ones last."""
        seldom_first = self._chunks[::-1]
        size = self._workload.chunks_per_request
        return [self._context.prompt(seldom_first[at : at + size]) for at in range(0, len(seldom_first), size)]

    def draw(self) -> list[int]:
        own = self._workload
        num_known = own.chunks_per_request - own.new_per_request
        known = self._numbers.choice(len(self._chunks), num_known, replace=False, p=self._shares)
        chunks = [self._chunks[number] for number in known]
        chunks += [self._context.chunk(own.chunk_tokens) for _ in range(own.new_per_request)]
        self._rng.shuffle(chunks)
        return self._context.prompt(chunks)


def run(
    contenders: Sequence[Contender],
    variants: Sequence[Variant],
    prompts: SustainedPrompts,
    num_requests: int,
    on_step: Callable[[], None],
) -> list[Row]:
    """A row for each variant and each fifth of the run. Raises `ValueError` where nobody is `plain`."""
    by_name = {contender.name: contender for contender in contenders}
    if REFERENCE not in by_name:
        raise ValueError(f"the speedup is over {REFERENCE}, which isn't among the contenders")
    for prompt in prompts.all_known():
        for variant in variants:
            if variant.contender != REFERENCE:
                by_name[variant.contender].ask_at_once([prompt], variant, 1)
    outcomes: dict[Variant, list[Timed | str]] = {variant: [] for variant in variants}
    for number in range(num_requests):
        prompt = prompts.draw()
        for variant in in_turn(variants, number):
            outcomes[variant] += by_name[variant.contender].ask_at_once([prompt], variant, 1).outcomes
            on_step()
    (plain,) = (found for variant, found in outcomes.items() if variant.contender == REFERENCE)
    parts = [part.tolist() for part in np.array_split(np.arange(num_requests), NUM_PARTS)]
    return [_row(variant, part, found, plain) for variant, found in outcomes.items() for part in parts]


def _row(variant: Variant, part: Sequence[int], found: Sequence[Timed | str], plain: Sequence[Timed | str]) -> Row:
    pairs = [(found[number], plain[number]) for number in part]
    both = [(own, other) for own, other in pairs if isinstance(own, Timed) and isinstance(other, Timed)]
    known = [own.reuse for own, _ in both if own.reuse]
    reports = [own.report for own, _ in both if own.report]
    return {
        **variant.to_json(),
        "first_request": part[0],
        "num_requests": len(part),
        "num_failed": len(part) - len(both),
        "ttft_ms": spread([own.ttft_ms for own, _ in both]),
        "speedup_vs_plain": ratio_spread([other.ttft_ms / own.ttft_ms for own, other in both]),
        "reused_ratio": _ratio(sum(r.num_reused_tokens for r in known), sum(r.num_prompt_tokens for r in known)),
        "hit_ratio": _ratio(
            sum(report["store_hits"] for report in reports),
            sum(report["store_hits"] + report["store_misses"] for report in reports),
        ),
    }


def _ratio(part: int, whole: int) -> float | None:
    return round(part / whole, DIGITS) if whole else None


def lasting(rows: Sequence[Row]) -> dict[str, float]:
    """By contender and policy: the speedup of the last fifth divided by that of the first."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if row["contender"] != REFERENCE and row["speedup_vs_plain"]:
            found.setdefault(variant_label(row), []).append(row["speedup_vs_plain"]["median"])
    return {label: round(speedups[-1] / speedups[0], 3) for label, speedups in found.items()}


def show_rows(rows: Sequence[Row], console: Console) -> None:
    figures = {
        "from request": "{first_request}",
        "TTFT ms": "{ttft_ms[median]:,.0f}",
        "speedup": "{speedup_vs_plain[median]:.2f}",
        "reused": "{reused_ratio:.0%}",
        "chunks found": "{hit_ratio:.0%}",
    }
    title, texts = "Over the run, fifth by fifth: medians", {"contender": variant_label}
    console.print(table_of(title, rows, texts, figures, min_width=14, padding=(0, 1, 0, 0), pad_edge=False))
    for label, ratio in lasting(rows).items():
        console.print(f"{label}: at the end {ratio:.0%} of the speedup at the beginning.")
