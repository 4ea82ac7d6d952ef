"""From a layer on only chosen rows go on: the same as running all rows and keeping the chosen ones' results."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch

from kvarena.core.filtered_layer import FilteredLayer, forward_filtered
from kvarena.core.prefilled_model import EndForward, LayerKV, TokenFilter

NUM_LAYERS, NUM_TOKENS, SIZE = 5, 12, 6


class Layer(torch.nn.Module):
    """Rows don't see each other; each sees its own position. Notes how many rows come, and writes into its input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(SIZE, SIZE))
        self.num_rows: list[int] = []

    def fresh_kv(self, hidden: torch.Tensor, positions: torch.Tensor) -> LayerKV:
        keys = (hidden @ self.weight + positions[..., None]).reshape(-1, 1, SIZE)
        return LayerKV(keys, -keys)

    def forward(self, hidden: torch.Tensor, *, positions: torch.Tensor, scale: float) -> torch.Tensor:
        self.num_rows.append(positions.numel())
        fresh = self.fresh_kv(hidden, positions).keys.view_as(hidden)
        return hidden.add_(scale * fresh.tanh())


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = [Layer() for _ in range(NUM_LAYERS)]

    def forward(self, hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            hidden = layer(hidden, positions=positions, scale=0.5)
        return hidden


class NetFilteredLayer(FilteredLayer):
    """`axis`: 0 for inputs `(T, ...)`, 1 for `(1, T, ...)`."""

    def __init__(
        self,
        net: Net,
        axis: int,
        token_filter: TokenFilter,
        before: torch.Tensor | FilteredLayer,
        num_forwards: int,
    ) -> None:
        super().__init__(net.layers, token_filter, before, num_forwards)
        self.went_on: list[int] = []
        self._axis = axis

    def fresh_kv(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LayerKV:
        assert isinstance(self.layer, Layer)
        return self.layer.fresh_kv(args[0], kwargs["positions"])

    def go_on_with(self, positions: torch.Tensor) -> None:
        self.went_on = positions.tolist()

    def token_axis(self, inputs: Sequence[Any], counts: Sequence[int]) -> int | None:
        return self._axis if all(map(torch.is_tensor, inputs)) else None


def largest(layer: int, count: int, seen: list[torch.Tensor]) -> TokenFilter:
    def choose(positions: torch.Tensor, fresh: LayerKV) -> torch.Tensor:
        assert len(positions) == len(fresh.keys) == len(fresh.values)
        seen.append(fresh.keys)
        return fresh.keys.sum(dim=(1, 2)).topk(count).indices.sort().values

    return TokenFilter(layer, choose)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("num_parts", [1, 3])
@torch.inference_mode()
def test_the_chosen_end_as_if_all_had_been_run(axis: int, num_parts: int) -> None:
    torch.manual_seed(axis)
    net, hidden, positions = Net(), torch.randn(NUM_TOKENS, SIZE), torch.arange(0, 2 * NUM_TOKENS, 2)
    expected = net(hidden.clone(), positions)
    for layer in net.layers:
        layer.num_rows.clear()
    made: list[NetFilteredLayer] = []
    results: list[torch.Tensor] = []
    seen: list[torch.Tensor] = []

    def filtered_layer(*arguments: Any) -> FilteredLayer:
        made.append(NetFilteredLayer(net, axis, *arguments))
        return made[-1]

    def run(rows: torch.Tensor) -> None:
        own = (hidden[rows].clone(), positions[rows])
        try:
            results.append(net(*(x[None] for x in own) if axis else own))
        except EndForward:
            results.append(torch.empty(0))

    filters = [largest(1, 7, seen), largest(3, 4, seen)]
    parts = torch.arange(NUM_TOKENS).tensor_split(num_parts)
    kept = forward_filtered(positions, parts, run, filters, filtered_layer)

    assert [len(keys) for keys in seen] == [NUM_TOKENS, 7]
    assert made[1].went_on == kept.tolist() == sorted(kept.tolist())
    assert set(kept.tolist()) < set(made[0].went_on) < set(positions.tolist())
    *ended, whole = results
    assert all(len(result) == 0 for result in ended)
    torch.testing.assert_close(whole[0] if axis else whole, expected[kept // 2])
    of_parts = [len(part) for part in parts]
    assert [layer.num_rows for layer in net.layers] == [of_parts, [7], [7], [4], [4]]
    run(parts[0])
    assert len(results[-1]), "no hook is left"


@torch.inference_mode()
def test_without_filters_all_go_on_and_a_failure_leaves_no_hook() -> None:
    net, positions = Net(), torch.arange(NUM_TOKENS)
    run, filtered_layer = partial(net, positions=positions), partial(NetFilteredLayer, net, 0)
    everything = forward_filtered(positions, [torch.randn(NUM_TOKENS, SIZE)], run, [], filtered_layer)
    assert torch.equal(everything, positions)

    def fails(_positions: torch.Tensor, _fresh: LayerKV) -> torch.Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        forward_filtered(positions, [torch.randn(NUM_TOKENS, SIZE)], run, [TokenFilter(2, fails)], filtered_layer)
    assert not any(layer._forward_pre_hooks for layer in net.layers)
