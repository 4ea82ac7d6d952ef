"""Which tokens a policy picks: those it may pick, as many as it says, the same ones each time."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from kvarena.core.plan import Chunk, ReusePlan, Span, as_token_ids
from kvarena.core.policy import best_runs, reused_positions
from kvarena.policies.params import POLICIES, BlendParams, make_policy
from kvarena.policies.random_tokens import RandomTokens

CHUNK = Chunk(as_token_ids(range(100)))
PLAN = ReusePlan((Span(7, 47, CHUNK), Span(60, 120, CHUNK, 40)))


class Nothing:
    """For policies that look at nothing."""

    num_layers = 4

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"{name} is not needed")


NOTHING: Any = Nothing()


@pytest.mark.parametrize("ratio", [0.01, 0.15, 0.5, 0.99])
def test_random_draws_its_share_of_reused_tokens(ratio: float) -> None:
    selection = make_policy(BlendParams("random", ratio)).select(PLAN, NOTHING)
    assert selection.filters == ()
    assert len(selection.positions) == math.ceil(ratio * PLAN.num_reused_tokens)
    assert torch.equal(selection.positions, selection.positions.unique())
    assert torch.isin(selection.positions, reused_positions(PLAN)).all()


def test_random_repeats_itself_and_other_seeds_draw_others() -> None:
    draws = [RandomTokens(0.2, seed).select(PLAN, NOTHING).positions.tolist() for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


def test_random_draws_every_token_alike() -> None:
    draws = torch.cat([RandomTokens(0.2, seed).select(PLAN, NOTHING).positions for seed in range(500)])
    counts = torch.bincount(draws, minlength=120)[reused_positions(PLAN)]
    assert 60 < counts.min() <= counts.max() < 140, "100 on average, with a standard deviation of 9"


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("ratio", "count"), [(0, 0), (1, 100)])
def test_the_ends_of_the_ratio_mean_none_and_all(policy: str, ratio: float, count: int) -> None:
    expected = {"none": 0, "all": 100}.get(policy, count)
    settled = make_policy(BlendParams(policy, ratio)).settled()
    assert settled.watched_layers(4) == ()
    assert len(settled.select(PLAN, NOTHING).positions) == expected


@pytest.mark.parametrize(("head_tokens", "counts"), [(0, [6, 9]), (1, [1, 1]), (50, [40, 50])])
def test_chunk_head_takes_the_first_tokens_of_every_span(head_tokens: int, counts: list[int]) -> None:
    selection = make_policy(BlendParams("chunk_head", 0.15, head_tokens=head_tokens)).select(PLAN, NOTHING)
    heads = [torch.arange(span.start, span.start + count) for span, count in zip(PLAN, counts, strict=True)]
    assert torch.equal(selection.positions, torch.cat(heads))
    assert selection.filters == ()


def test_a_number_of_head_tokens_stands_in_place_of_the_ratio() -> None:
    for ratio in (0.0, 1.0):
        selection = make_policy(BlendParams("chunk_head", ratio, head_tokens=2)).select(PLAN, NOTHING)
        assert selection.positions.tolist() == [7, 8, 60, 61]


@pytest.mark.parametrize("policy", ["kv_deviation", "chunk_head", "query_attention", "random"])
def test_nothing_reused_is_nothing_chosen(policy: str) -> None:
    selection = make_policy(BlendParams(policy, 0.15)).select(ReusePlan(), NOTHING)
    assert (len(selection.positions), selection.filters) == (0, ())


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"policy": "best"}, f"policy must be one of {', '.join(POLICIES)}"),
        ({"deviation": "queries"}, "deviation must be one of keys, values, not 'queries'"),
        ({"num_filters": 0}, "num_filters must be a number of layers from 1 to 1024, not 0"),
        ({"num_filters": 1.5}, "num_filters must be a number of layers from 1 to 1024, not 1.5"),
        ({"head_tokens": -1}, "head_tokens must be a number of tokens from 0 to 65536, not -1"),
        ({"num_filters": 1025}, "num_filters must be a number of layers from 1 to 1024, not 1025"),
        ({"run_tokens": 10**8}, "run_tokens must be a number of tokens from 1 to 1024, not 100000000"),
        ({"run_tokens": 0}, "run_tokens must be a number of tokens from 1 to 1024, not 0"),
        ({"check_layer": 4096}, "check_layer must be a whole number from 0 to 4095, not 4096"),
        ({"check_layer": -1}, "check_layer must be a whole number from 0 to 4095, not -1"),
        ({"ratio": float("nan")}, "ratio must be a number from 0 to 1, not nan"),
        ({"head_tokens": 65537}, "head_tokens must be a number of tokens from 0 to 65536, not 65537"),
        ({"head_tokens": True}, "head_tokens must be a number of tokens from 0 to 65536, not True"),
    ],
)
def test_bad_choices_are_named(choice: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BlendParams(**choice)  # type: ignore[arg-type]


@pytest.mark.parametrize("run_tokens", [1, 3, 4, 100])
def test_runs_are_those_with_the_largest_sums(run_tokens: int) -> None:
    """Against every run written out; scores are distinct, so that there is one answer."""
    generator = torch.Generator().manual_seed(run_tokens)
    scores = torch.rand(50, generator=generator)
    for count in (1, 7, 12, 49, 50):
        found = best_runs(scores, count, run_tokens)
        assert len(found) == len(found.unique()) == count
        runs = [range(low, min(low + run_tokens, 50)) for low in range(0, 50, run_tokens)]
        by_sum = sorted(runs, key=lambda run: -float(scores[list(run)].sum()))
        assert found.tolist() == [token for run in by_sum for token in run][:count] or run_tokens == 1
        if run_tokens == 1:
            assert torch.equal(found, scores.argsort(descending=True)[:count])
