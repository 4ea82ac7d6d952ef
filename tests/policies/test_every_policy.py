"""What holds for every registered policy, and what a registration refuses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from kvarena.core.plan import Chunk, ReusePlan, Span, as_token_ids
from kvarena.core.policy import Selection, SelectionContext, SelectionPolicy, reused_positions
from kvarena.core.prefilled_model import LayerKV
from kvarena.engines.vllm.config import BlendConfig
from kvarena.policies.params import OPTIONS, PARAMETERS, POLICIES, REGISTRY, BlendParams, make_policy
from kvarena.policies.registry import RESERVED, parameter, policy, registered_policies, summary_of
from kvarena.stack.settings import Settings

CHUNK = Chunk(as_token_ids(range(100)))
PLAN = ReusePlan((Span(7, 47, CHUNK), Span(60, 120, CHUNK, 40)))
NUM_LAYERS, NUM_HEADS, HEAD_SIZE = 4, 2, 8


def drawn(seed: int, num_tokens: int) -> torch.Tensor:
    return torch.randn(num_tokens, NUM_HEADS, HEAD_SIZE, generator=torch.Generator().manual_seed(seed))


class RandomKV:
    """KV as a model would give it; each layer has its own."""

    num_layers = NUM_LAYERS

    def reused_keys(self, layer: int) -> torch.Tensor:
        return drawn(layer, PLAN.num_reused_tokens)

    def reused_values(self, layer: int) -> torch.Tensor:
        return drawn(100 + layer, PLAN.num_reused_tokens)

    def stored_scores(self) -> torch.Tensor | None:
        return drawn(500, PLAN.num_reused_tokens)[:, 0, :2].abs()

    def summed(self, scores: torch.Tensor) -> torch.Tensor:
        return scores

    def explain(
        self,
        what: str,
        positions: torch.Tensor,
        scores: torch.Tensor,
        seen_from: Callable[[], torch.Tensor] | None = None,
    ) -> None:
        assert what
        assert len(positions) == len(scores) == (len(seen_from()) if seen_from else len(scores))

    def question_positions(self) -> torch.Tensor:
        return torch.arange(115, 120)

    def attention_scale(self, layer: int) -> float:
        return float(HEAD_SIZE**-0.5)

    def question_queries(self, layer: int) -> torch.Tensor:
        return drawn(200 + layer, 5)


def selected(choice: SelectionPolicy) -> list[int]:
    """The positions that are left after every filter, on fresh KV that is the same each time."""
    asked = choice.settled()
    selection = asked.select(PLAN, RandomKV())
    positions = selection.positions
    assert [one.layer for one in selection.filters] == list(asked.watched_layers(NUM_LAYERS))[: len(selection.filters)]
    for token_filter in selection.filters:
        fresh = LayerKV(
            drawn(300 + token_filter.layer, 120)[positions], drawn(400 + token_filter.layer, 120)[positions]
        )
        positions = positions[token_filter.choose(positions, fresh)]
    return [int(position) for position in positions]


@pytest.mark.parametrize("name", POLICIES)
def test_the_same_reused_tokens_each_time(name: str) -> None:
    for ratio in (0.01, 0.2, 0.9):
        picked = selected(make_policy(BlendParams(name, ratio)))
        assert picked == selected(make_policy(BlendParams(name, ratio)))
        assert picked == sorted(set(picked))
        assert set(picked) <= set(reused_positions(PLAN).tolist())


@pytest.mark.parametrize("name", POLICIES)
def test_ratio_zero_picks_none_and_one_picks_all(name: str) -> None:
    none, every = (make_policy(BlendParams(name, ratio)) for ratio in (0.0, 1.0))
    if none.goes_by_ratio:
        assert selected(none) == []
        assert selected(every) == reused_positions(PLAN).tolist()
    else:
        assert selected(none) == selected(every), "its ratio makes no difference"


@pytest.mark.parametrize("name", POLICIES)
def test_a_larger_ratio_picks_at_least_as_many(name: str) -> None:
    counts = [len(selected(make_policy(BlendParams(name, ratio / 10)))) for ratio in range(11)]
    assert counts == sorted(counts)


@pytest.mark.parametrize("name", POLICIES)
def test_what_people_read_of_it(name: str) -> None:
    assert summary_of(REGISTRY[name]).endswith(".")
    for own in OPTIONS[name]:
        assert PARAMETERS[own].help.endswith(".")


def test_a_policy_takes_its_own_parameters_and_no_others() -> None:
    params = BlendParams("query_attention", 0.3, 2, run_tokens=4, head_tokens=9)
    assert dataclasses.asdict(make_policy(params)) == {"ratio": 0.3, "check_layer": 2, "run_tokens": 4}


def test_no_parameter_hides_a_setting() -> None:
    own = {field.name for field in dataclasses.fields(BlendConfig)} - set(PARAMETERS)
    keys = {key.removeprefix("blend_") for key in Settings.model_fields if key.startswith("blend_")} - set(PARAMETERS)
    assert own | keys | {"policy", "store", "chunks", "token_scores"} <= RESERVED


def select_none(self: Any, plan: ReusePlan, context: SelectionContext) -> Selection:
    return Selection(reused_positions(ReusePlan()))


def make(**fields: tuple[type, Any]) -> type[SelectionPolicy]:
    """A policy with these fields."""
    bases, body = (SelectionPolicy,), {"select": select_none}
    declared = [(name, kind, field) for name, (kind, field) in fields.items()]
    return dataclasses.make_dataclass("Mine", declared, bases=bases, namespace=body, frozen=True)


def test_two_policies_that_declare_one_parameter_differently_are_refused() -> None:
    other = parameter(1, "Another help.", unit="tokens", at_least=1, at_most=1024)
    with pytest.raises(ValueError, match="policy mine: run_tokens is another parameter than in kv_deviation"):
        policy("mine")(make(run_tokens=(int, other)))
    assert "mine" not in registered_policies()


def test_a_name_that_is_taken_is_refused() -> None:
    with pytest.raises(ValueError, match="two policies are called random: RandomTokens and Mine"):
        policy("random")(make())
    word = parameter("a", "A word.", choices=("a", "b"))
    with pytest.raises(ValueError, match="policy mine: store is taken"):
        policy("mine")(make(store=(str, word)))


@pytest.mark.parametrize("name", ["top-k", "My Policy", "2nd"])
def test_a_name_that_cant_be_typed_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="small letters, digits and _, not"):
        policy(name)(make())


def test_a_field_that_nobody_can_choose_is_refused() -> None:
    @dataclass(frozen=True)
    class Mine(SelectionPolicy):
        tail_share: float
        select = select_none

    with pytest.raises(ValueError, match="policy mine: declare tail_share with parameter"):
        policy("mine")(Mine)


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({"default": 1, "at_least": 1}, "needs at_least and at_most"),
        ({"default": 0.5, "at_most": 1}, "needs at_least and at_most"),
        ({"default": "a"}, "needs choices"),
        ({"default": "c", "choices": ("a", "b")}, "must be one of a, b, not 'c'"),
        ({"default": 9, "at_least": 0, "at_most": 3, "unit": "layers"}, "a number of layers from 0 to 3, not 9"),
        ({"default": None}, "an int, a float or a str, not None"),
        ({"default": True}, "an int, a float or a str, not True"),
    ],
)
def test_a_parameter_without_bounds_is_refused(declared: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parameter(help="What it is.", **declared)


def test_a_default_of_another_type_is_refused() -> None:
    @dataclass(frozen=True)
    class Mine(SelectionPolicy):
        weight: float = parameter(1, "A weight.", at_least=0, at_most=2)
        select = select_none

    with pytest.raises(ValueError, match=r"Mine\.weight is float, and its default 1"):
        policy("mine")(Mine)
