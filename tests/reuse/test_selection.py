"""Which tokens a policy picks: those it may pick, as many as it says, the same ones each time."""

from __future__ import annotations

import math

import pytest
import torch

from kvarena.reuse.params import POLICIES, BlendParams
from kvarena.reuse.plan import Chunk, ReusePlan, Span, as_token_ids
from kvarena.reuse.selection import RandomTokens, make_policy, reused_positions

CHUNK = Chunk(as_token_ids(range(100)))
PLAN = ReusePlan((Span(7, 47, CHUNK), Span(60, 120, CHUNK, 40)))


def no_keys(layer: int) -> torch.Tensor:
    raise AssertionError(f"keys of layer {layer} are not needed")


@pytest.mark.parametrize("ratio", [0.01, 0.15, 0.5, 0.99])
def test_random_draws_its_share_of_reused_tokens(ratio: float) -> None:
    selection = make_policy(BlendParams("random", ratio)).select(PLAN, no_keys)
    assert selection.narrowing is None
    assert len(selection.positions) == math.ceil(ratio * PLAN.num_reused_tokens)
    assert torch.equal(selection.positions, selection.positions.unique())
    assert torch.isin(selection.positions, reused_positions(PLAN)).all()


def test_random_repeats_itself_and_other_seeds_draw_others() -> None:
    draws = [RandomTokens(0.2, seed).select(PLAN, no_keys).positions.tolist() for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


def test_random_draws_every_token_alike() -> None:
    draws = torch.cat([RandomTokens(0.2, seed).select(PLAN, no_keys).positions for seed in range(500)])
    counts = torch.bincount(draws, minlength=120)[reused_positions(PLAN)]
    assert 60 < counts.min() <= counts.max() < 140, "100 on average, with a standard deviation of 9"


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("ratio", "count"), [(0, 0), (1, 100)])
def test_the_ends_of_the_ratio_mean_none_and_all(policy: str, ratio: float, count: int) -> None:
    expected = {"none": 0, "all": 100}.get(policy, count)
    assert len(make_policy(BlendParams(policy, ratio)).select(PLAN, no_keys).positions) == expected
