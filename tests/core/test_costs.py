"""The share of tokens that fits into a time, from what blends cost before."""

from __future__ import annotations

import pytest

from kvarena.core.report import MIN_RATIO, NEAREST_BLENDS, RESERVE_RATIO, BlendCosts
from kvarena.policies.chunk_head import ChunkHead
from kvarena.policies.kv_deviation import KVDeviation

POLICY = KVDeviation(ratio=0.15, check_layer=2)


def seen(num_tokens: int, select_ms: float, recompute_ms: float, times: int = 1) -> BlendCosts:
    """Blends of a tenth of so many tokens, at these costs of a token."""
    costs = BlendCosts()
    for _ in range(times):
        num_recomputed = num_tokens // 10
        costs.note(POLICY, num_tokens, num_recomputed, select_ms * num_tokens, recompute_ms * num_recomputed)
    return costs


def test_what_is_left_is_spent_but_for_the_reserve() -> None:
    costs = seen(1000, select_ms=0.1, recompute_ms=1.0)
    num_reused, num_computed, left_ms = 900, 50, 500.0
    ratio = costs.ratio_within(POLICY, num_reused, num_computed, left_ms)
    took_ms = 0.1 * (num_reused + num_computed) + 1.0 * (ratio * num_reused + num_computed)
    assert took_ms == pytest.approx((1 - RESERVE_RATIO) * left_ms)


@pytest.mark.parametrize(("left_ms", "ratio"), [(-100.0, MIN_RATIO), (0.0, MIN_RATIO), (50.0, MIN_RATIO), (9e9, 1.0)])
def test_neither_nothing_nor_more_than_there_is(left_ms: float, ratio: float) -> None:
    assert seen(1000, select_ms=0.1, recompute_ms=1.0).ratio_within(POLICY, 900, 0, left_ms) == ratio


def test_other_ways_of_choosing_teach_nothing_and_other_ratios_do() -> None:
    costs = seen(1000, select_ms=0.1, recompute_ms=1.0)
    for other in (ChunkHead(0.05), KVDeviation(0.2, check_layer=1)):
        assert costs.ratio_within(other, 900, 0, 1e9) == other.ratio
    assert costs.ratio_within(KVDeviation(0.7, check_layer=2), 900, 0, 1e9) == 1.0


def test_blends_of_about_this_length_count() -> None:
    """Attention makes tokens of long prompts dearer."""
    costs = seen(1000, 0.0, recompute_ms=1.0, times=NEAREST_BLENDS)
    for _ in range(NEAREST_BLENDS):
        costs.note(POLICY, 16_000, 160, 0.0, 160 * 4.0)
    short, long = (costs.ratio_within(POLICY, num_tokens, 0, left_ms=800.0) for num_tokens in (1500, 12_000))
    assert short * 1500 == pytest.approx(4 * long * 12_000)


def test_one_slow_blend_changes_nothing() -> None:
    costs = seen(1000, 0.1, 1.0, times=NEAREST_BLENDS - 1)
    before = costs.ratio_within(POLICY, 900, 0, 500.0)
    costs.note(POLICY, 1000, 100, 5000.0, 90_000.0)
    assert costs.ratio_within(POLICY, 900, 0, 500.0) == pytest.approx(before)


def test_blends_that_recomputed_nothing_tell_nothing() -> None:
    costs = BlendCosts()
    costs.note(POLICY, 1000, 0, 3.0, 0.0)
    assert costs.ratio_within(POLICY, 900, 0, 1e9) == POLICY.ratio
