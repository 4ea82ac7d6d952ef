"""What a blend reports: tokens by origin, look-ups by outcome, milliseconds by stage, and by what it chose.

And what the last blends cost: `BlendCosts` says which ratio fits into a time.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from kvarena.core.policy import SelectionPolicy
from kvarena.core.store import StoreMiss

MAX_TOKEN_SCORES = 4096
SCORE_DIGITS = 4
Item = TypeVar("Item")


class Stopwatch:
    """For a dataclass with fields `*_ms`, zero at first: the milliseconds of each stage, which add up."""

    @contextmanager
    def timed(self, *stages: str, until: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Add the block's time to each of these fields. `until` returns when what the block launched has ended."""
        start_s = time.perf_counter()
        try:
            yield
            until()
        finally:
            passed_ms = 1e3 * (time.perf_counter() - start_s)
            for stage in stages:
                setattr(self, stage, getattr(self, stage) + passed_ms)

    def timed_each(self, stage: str, items: Iterator[Item]) -> Iterator[Item]:
        """Add the time that each of these items takes to come."""
        while True:
            with self.timed(stage):
                item = next(items, None)
            if item is None:
                return
            yield item


def significant(number: float) -> float:
    """In `SCORE_DIGITS` digits, as reports have scores and shares."""
    return float(f"{number:.{SCORE_DIGITS}g}")


@dataclass(frozen=True)
class TokenScores:
    """What a report says of single tokens. `what` the scores are, in words. `tokens` begin with the token's position:
    then its score, and where the policy knows it the position that the score comes from most; or the beginning and the
    end of a chunk, and its share.
    """

    what: str
    tokens: list[tuple[float, ...]]

    @classmethod
    def of(cls, what: str, columns: Sequence[torch.Tensor]) -> TokenScores:
        """Of positions, scores and perhaps the positions that these come from."""
        rows = zip(*(column.tolist() for column in columns), strict=True)
        return cls(what, [(at, significant(score), *sources) for at, score, *sources in rows])

    def among(self, spans: Sequence[tuple[int, int]]) -> TokenScores:
        """Of the tokens in these spans, the first `MAX_TOKEN_SCORES`."""
        positions = {at for start, end in spans for at in range(start, end)}
        return TokenScores(self.what, [one for one in self.tokens if one[0] in positions][:MAX_TOKEN_SCORES])


@dataclass
class BlendReport(Stopwatch):
    """Tokens by origin, store look-ups by outcome, milliseconds by stage.

    `fetch_ms` is the waiting for the store, `select_ms` ends when the tokens to recompute are known. `store_errors` and
    `store_evictions` are those since the last report, for chunks are put into the store beside the blend; the store's
    size is None where it isn't known here. `blend_failures` is 1 where the blend failed and the whole range was
    computed. `ratio` is the one that the policy was given; None where it has none.

    A chunk that wasn't in the store is computed here, alone or in its place: its tokens count as computed, neither
    reused nor recomputed. `spans` are what was reused, `recomputed_spans` the parts of them that were recomputed;
    `computed_spans` chunks that were computed alone. `misses` are chunks that the store didn't give, each at its first
    place, with the reason. `num_seams`: chunks that were reused as computed after the one before them.
    `unscored_chunks`: those without the stored scores that the policy wanted. Where `wants_scores`, and the policy
    tells: `token_scores` says why each recomputed token was chosen, `leans_on` which other chunk it attends to most.
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
    misses: list[tuple[int, int, StoreMiss]] = field(default_factory=list)
    wants_scores: bool = False
    token_scores: TokenScores | None = None
    leans_on: TokenScores | None = None

    def count(self, start: int, end: int, computed: torch.Tensor) -> None:
        """Count the tokens of `[start, end)` by origin; those `computed`, ascending, went through all layers."""
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


RECENT_BLENDS = 32
"""Remembered for each way of choosing tokens."""
NEAREST_BLENDS = 5
"""Of these, those of the nearest length count."""
REMEMBERED_WAYS = 64
"""The last ways of choosing tokens: clients may invent any number."""
RESERVE_RATIO = 0.1
"""Of the time that is left, kept for what takes longer than before."""
MIN_RATIO = 0.01
"""Recomputed where there is no time at all: so the cost of a token stays known, and may fall again."""


@dataclass(frozen=True)
class Cost:
    """Of one blend over `num_tokens`: milliseconds to choose, per token, and to recompute, per recomputed token."""

    num_tokens: int
    select_ms: float
    recompute_ms: float


@dataclass
class BlendCosts:
    """What each policy's last blends cost, by its options, whatever the ratio."""

    _seen: OrderedDict[SelectionPolicy, deque[Cost]] = field(default_factory=OrderedDict)

    def note(
        self, policy: SelectionPolicy, num_tokens: int, num_recomputed: int, select_ms: float, recompute_ms: float
    ) -> None:
        """`num_recomputed` of `num_tokens` went through all layers, those that no chunk covers included."""
        if num_recomputed:
            way = policy.with_ratio(0.0)
            cost = Cost(num_tokens, select_ms / num_tokens, recompute_ms / num_recomputed)
            self._seen.setdefault(way, deque(maxlen=RECENT_BLENDS)).append(cost)
            self._seen.move_to_end(way)
            if len(self._seen) > REMEMBERED_WAYS:
                self._seen.popitem(last=False)

    def ratio_within(self, policy: SelectionPolicy, num_reused: int, num_computed: int, left_ms: float) -> float:
        """The largest share of `num_reused` tokens that can be recomputed in time, beside `num_computed` others; the
        policy's own ratio as long as nothing is known of this way of choosing.
        """
        assert policy.ratio is not None, "a time for a policy without a ratio"
        seen = self._seen.get(policy.with_ratio(0.0))
        if not seen or not num_reused:
            return policy.ratio
        num_tokens = num_reused + num_computed
        nearest = sorted(seen, key=lambda cost: abs(math.log(cost.num_tokens / num_tokens)))[:NEAREST_BLENDS]

        def usual(part: Callable[[Cost], float]) -> float:
            return statistics.median(map(part, nearest))

        for_recomputing = (1 - RESERVE_RATIO) * left_ms - num_tokens * usual(lambda cost: cost.select_ms)
        affordable = for_recomputing / usual(lambda cost: cost.recompute_ms) - num_computed
        return min(1.0, max(MIN_RATIO, affordable / num_reused))
