"""What a blend reports: tokens by origin, look-ups by outcome, milliseconds by stage, and by what it chose."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from kvarena.core.store import Missing

MAX_TOKEN_SCORES = 4096
SCORE_DIGITS = 4
Item = TypeVar("Item")


class Stopwatch:
    """For a dataclass whose fields named `*_ms` are times of stages in milliseconds, zero at first: they add up."""

    @contextmanager
    def timed(self, *stages: str, until: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Add the time that the block takes to each of these fields. `until` returns when what the block has only
        launched has ended, too.
        """
        start_s = time.perf_counter()
        try:
            yield
            until()
        finally:
            passed_ms = 1e3 * (time.perf_counter() - start_s)
            for stage in stages:
                setattr(self, stage, getattr(self, stage) + passed_ms)

    def timed_each(self, stage: str, items: Iterator[Item]) -> Iterator[Item]:
        """Add the time until each of these items is there."""
        while True:
            with self.timed(stage):
                item = next(items, None)
            if item is None:
                return
            yield item


@dataclass(frozen=True)
class TokenScores:
    """`what` the scores are, in words. `tokens`: position, score, and where the policy knows it the position that the
    score comes from most.
    """

    what: str
    tokens: list[tuple[int, float] | tuple[int, float, int]]

    @classmethod
    def of(cls, what: str, columns: Sequence[torch.Tensor]) -> TokenScores:
        """Of one column for each part of a token's entry."""
        rows = zip(*(column.tolist() for column in columns), strict=True)
        return cls(what, [(at, float(f"{score:.{SCORE_DIGITS}g}"), *sources) for at, score, *sources in rows])

    def among(self, spans: Sequence[tuple[int, int]]) -> TokenScores:
        """Of the tokens in these spans, the first `MAX_TOKEN_SCORES`."""
        positions = {at for start, end in spans for at in range(start, end)}
        return TokenScores(self.what, [one for one in self.tokens if one[0] in positions][:MAX_TOKEN_SCORES])


@dataclass(frozen=True)
class LeansOn:
    """`what` the shares are, in words. `tokens`: position, the beginning and the end of the other chunk that it attends
    to most, and that chunk's share.
    """

    what: str
    tokens: list[tuple[int, int, int, float]]

    def among(self, spans: Sequence[tuple[int, int]]) -> LeansOn:
        """Of the tokens in these spans."""
        positions = {at for start, end in spans for at in range(start, end)}
        found = [one for one in self.tokens if one[0] in positions]
        return LeansOn(self.what, [(*one[:3], float(f"{one[3]:.{SCORE_DIGITS}g}")) for one in found])


@dataclass
class BlendReport(Stopwatch):
    """Tokens by origin, store look-ups by outcome, milliseconds by stage.

    `fetch_ms` is the waiting for the store, `select_ms` ends when the tokens to recompute are known. `store_errors` and
    `store_evictions` are those since the last report, for chunks are put into the store beside the blend; its size is
    None where it isn't known here. `blend_failures` is 1 where the blend itself failed, and the whole range was
    computed. `ratio` is the one that the policy was given, None where it came to none.

    A chunk that wasn't in the store is computed here, whether alone or in its place: its tokens are computed, neither
    reused nor recomputed. `spans` are what was reused, `recomputed_spans` the parts of them that were recomputed;
    `computed_spans` chunks that were computed alone. `misses` are chunks that the store didn't give, each where it
    stands first, with the reason. `num_seams`: chunks that were reused as they are after the one before them.
    `unscored_chunks`: those without the scores by which the policy chooses, so that it
    chose as it does without. `token_scores`: by what the policy chose, of the recomputed tokens, where `wants_scores`
    asks for it and the policy says; `leans_on`: which other chunk each attends to most at the policy's layer, alike.
    """

    ratio: float | None = None
    num_seams: int = 0
    unscored_chunks: int = 0
    num_reused_tokens: int = 0
    num_recomputed_tokens: int = 0
    num_computed_tokens: int = 0
    store_hits: int = 0
    store_misses: int = 0
    store_errors: int = 0
    store_evictions: int = 0
    store_entries: int | None = None
    store_bytes: int | None = None
    blend_failures: int = 0
    fetch_ms: float = 0.0
    prefill_chunks_ms: float = 0.0
    move_ms: float = 0.0
    write_ms: float = 0.0
    select_ms: float = 0.0
    recompute_ms: float = 0.0
    blend_ms: float = 0.0
    spans: list[tuple[int, int]] = field(default_factory=list)
    recomputed_spans: list[tuple[int, int]] = field(default_factory=list)
    computed_spans: list[tuple[int, int]] = field(default_factory=list)
    misses: list[tuple[int, int, Missing]] = field(default_factory=list)
    wants_scores: bool = False
    token_scores: TokenScores | None = None
    leans_on: LeansOn | None = None

    def count(self, start: int, end: int, computed: torch.Tensor) -> None:
        """The tokens of `[start, end)` by origin; `computed` are those that went through all layers, ascending."""
        num_from_store = sum(high - low for low, high in self.spans)
        edges = torch.tensor([edge for span in self.spans for edge in span], dtype=torch.int64)
        recomputed = computed.cpu()[torch.bucketize(computed.cpu(), edges, right=True) % 2 == 1]
        self.recomputed_spans = _runs(recomputed)
        if self.token_scores:
            self.token_scores = self.token_scores.among(self.recomputed_spans)
        if self.leans_on:
            self.leans_on = self.leans_on.among(self.recomputed_spans)
        self.num_recomputed_tokens = len(recomputed)
        self.num_reused_tokens = num_from_store - self.num_recomputed_tokens
        self.num_computed_tokens = end - start - num_from_store


def _runs(positions: torch.Tensor) -> list[tuple[int, int]]:
    """Ascending positions as half-open ranges."""
    if not len(positions):
        return []
    last = (positions.diff() != 1).nonzero().flatten()
    starts = positions[torch.cat([last.new_zeros(1), last + 1])].tolist()
    ends = (positions[torch.cat([last, last.new_tensor([len(positions) - 1])])] + 1).tolist()
    return list(zip(starts, ends, strict=True))
