"""What choosing and recomputing tokens has cost lately: which share of them fits into a time."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from kvarena.reuse.params import BlendParams

RECENT = 32
"""So many blends are remembered for each way of choosing tokens."""
NEAREST = 5
"""Of these, so many count: those whose length is nearest."""
RESERVE_RATIO = 0.1
"""Of the time that is left, for what turns out slower than it was."""
LEAST_RATIO = 0.01
"""Recomputed where there is no time at all: so what a token costs stays known, and may come down again."""


@dataclass(frozen=True)
class Cost:
    """Of one blend over `num_tokens`: milliseconds for choosing, per token, and for each token that was recomputed."""

    num_tokens: int
    select_ms: float
    recompute_ms: float


@dataclass
class BlendCosts:
    """The costs of each policy with its options, whatever its ratio was."""

    _seen: dict[BlendParams, deque[Cost]] = field(default_factory=dict)

    def note(
        self, params: BlendParams, num_tokens: int, num_recomputed: int, select_ms: float, recompute_ms: float
    ) -> None:
        """`num_recomputed` of `num_tokens` went through all layers, those among them that no chunk covers."""
        if num_recomputed:
            cost = Cost(num_tokens, select_ms / num_tokens, recompute_ms / num_recomputed)
            self._seen.setdefault(_way(params), deque(maxlen=RECENT)).append(cost)

    def ratio_within(self, params: BlendParams, num_reused: int, num_computed: int, left_ms: float) -> float:
        """The largest share of `num_reused` tokens that can be recomputed in time, beside `num_computed` others.

        The ratio of `params` as long as nothing is known of this way of choosing.
        """
        seen = self._seen.get(_way(params))
        if not seen or not num_reused:
            return params.ratio
        num_tokens = num_reused + num_computed
        nearest = sorted(seen, key=lambda cost: abs(math.log(cost.num_tokens / num_tokens)))[:NEAREST]

        def usual(part: Callable[[Cost], float]) -> float:
            return statistics.median(map(part, nearest))

        for_recomputing = (1 - RESERVE_RATIO) * left_ms - num_tokens * usual(lambda cost: cost.select_ms)
        affordable = for_recomputing / usual(lambda cost: cost.recompute_ms) - num_computed
        return min(1.0, max(LEAST_RATIO, affordable / num_reused))


def _way(params: BlendParams) -> BlendParams:
    return replace(params, ratio=0.0)
