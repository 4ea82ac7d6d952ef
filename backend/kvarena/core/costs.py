"""What blends have cost lately, and so which ratio fits into a time."""

from __future__ import annotations

import math
import statistics
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from kvarena.core.policy import SelectionPolicy

RECENT_BLENDS = 32
"""So many blends are remembered for each way of choosing tokens."""
NEAREST_BLENDS = 5
"""Of these, so many count: those whose length is nearest."""
REMEMBERED_WAYS = 64
"""So many ways of choosing tokens are remembered, those used last: clients may invent any number."""
RESERVE_RATIO = 0.1
"""Of the time that is left, for what takes longer than it did before."""
MIN_RATIO = 0.01
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

    _seen: OrderedDict[SelectionPolicy, deque[Cost]] = field(default_factory=OrderedDict)

    def note(
        self, policy: SelectionPolicy, num_tokens: int, num_recomputed: int, select_ms: float, recompute_ms: float
    ) -> None:
        """`num_recomputed` of `num_tokens` went through all layers, those among them that no chunk covers."""
        if num_recomputed:
            way = policy.with_ratio(0.0)
            cost = Cost(num_tokens, select_ms / num_tokens, recompute_ms / num_recomputed)
            self._seen.setdefault(way, deque(maxlen=RECENT_BLENDS)).append(cost)
            self._seen.move_to_end(way)
            if len(self._seen) > REMEMBERED_WAYS:
                self._seen.popitem(last=False)

    def ratio_within(self, policy: SelectionPolicy, num_reused: int, num_computed: int, left_ms: float) -> float:
        """The largest share of `num_reused` tokens that can be recomputed in time, beside `num_computed` others.

        The policy's own ratio as long as nothing is known of this way of choosing.
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
