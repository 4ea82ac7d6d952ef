"""From one layer on, a model's forward goes on with chosen tokens only.

The layer is run up to its keys and values, which `TokenFilter.choose` looks at, and is then called with the chosen
rows of its inputs. So are the later layers, since the model hands all of them the same positions, angles and masks.
Where the tokens take several forwards, all but the last end at this layer and leave their inputs, and the last one goes
on with what was chosen of all. Engines differ in how they learn a layer's KV, in what else has to know of the tokens
that are left, and in the shapes of inputs: these are the abstract methods of `FilteredLayer`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar

import torch
from torch.utils._pytree import tree_map

from kvarena.core.prefilled_model import EndForward, LayerKV, TokenFilter

LayerCall = tuple[tuple[Any, ...], dict[str, Any]]
Part = TypeVar("Part")


class FilteredLayer(ABC):
    """A context in which a layer goes on with chosen tokens only. `kept` are their positions, once it has run.

    `layers` are the model's decoder layers. `before`: the positions of all forwards, or the filtered layer before this
    one.
    """

    def __init__(
        self,
        layers: Sequence[torch.nn.Module],
        token_filter: TokenFilter,
        before: torch.Tensor | FilteredLayer,
        num_forwards: int,
    ) -> None:
        self.layer, *self._later_layers = layers[token_filter.layer :]
        self.num_forwards = num_forwards
        self.kept = torch.empty(0, dtype=torch.int64)
        self.filtered_inputs: dict[int, Any] = {}
        """What takes the place of an input in this and later layers, by the input's `id`."""
        self._choose = token_filter.choose
        self._before = before
        self._calls: list[LayerCall] = []
        self._kv: list[LayerKV] = []
        self._is_probing = False

    @abstractmethod
    def fresh_kv(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LayerKV:
        """The layer's keys and values for these inputs. Leaves the inputs and the cache as they are."""

    @abstractmethod
    def go_on_with(self, positions: torch.Tensor) -> None:
        """Only the tokens at these positions come from now on."""

    @abstractmethod
    def token_axis(self, inputs: Sequence[Any], counts: Sequence[int]) -> int | None:
        """The axis along which an input has a row per token; None for an input that has none.

        `inputs` are those of all forwards in the same place, `counts` how many tokens each forward has.
        """

    def later_input(self, x: Any) -> Any:
        """What a later layer gets in the place of its input `x`."""
        return self.filtered_inputs.get(id(x), x)

    @property
    def positions(self) -> torch.Tensor:
        """Of the tokens that come to this layer."""
        return self._before.kept if isinstance(self._before, FilteredLayer) else self._before

    def __enter__(self) -> FilteredLayer:
        self._handles = [self.layer.register_forward_pre_hook(self._hook, with_kwargs=True)]
        self._handles += [
            layer.register_forward_pre_hook(self._later_hook, with_kwargs=True) for layer in self._later_layers
        ]
        return self

    def __exit__(self, *raised: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, _module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LayerCall | None:
        if self._is_probing:
            return None
        self._is_probing = True
        try:
            self._kv.append(self.fresh_kv(args, kwargs))
        finally:
            self._is_probing = False
        self._calls.append((args, kwargs))
        if len(self._calls) < self.num_forwards:
            raise EndForward
        return self._filtered()

    def _later_hook(self, _module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LayerCall:
        call: LayerCall = tree_map(self.later_input, (args, kwargs))
        return call

    def _filtered(self) -> LayerCall:
        """One call with the chosen rows of every forward's inputs; what has no row per token is the last one's."""
        kv = LayerKV(*map(torch.cat, zip(*self._kv, strict=True)))
        chosen = self._choose(self.positions, kv)
        self.kept = self.positions[chosen]
        self.go_on_with(self.kept)
        counts = [len(kv.keys) for kv in self._kv]
        rows = chosen.to(kv.keys.device)

        def join(*inputs: Any) -> Any:
            axis = self.token_axis(inputs, counts)
            if id(inputs[-1]) not in self.filtered_inputs and axis is not None:
                self.filtered_inputs[id(inputs[-1])] = torch.cat(inputs, dim=axis).index_select(axis, rows)
            return self.filtered_inputs.get(id(inputs[-1]), inputs[-1])

        joined: LayerCall = tree_map(join, *self._calls)
        return joined


def forward_filtered(
    positions: torch.Tensor,
    parts: Sequence[Part],
    run: Callable[[Part], object],
    filters: Sequence[TokenFilter],
    filtered_layer: Callable[[TokenFilter, torch.Tensor | FilteredLayer, int], FilteredLayer],
) -> torch.Tensor:
    """Run the tokens at these positions, a part in each forward. Returns the positions that went through all layers.

    `filtered_layer(token_filter, before, num_forwards)` makes an engine's own.
    """
    before: torch.Tensor | FilteredLayer = positions
    num_forwards = len(parts)
    with ExitStack() as stack:
        for token_filter in filters:
            before = stack.enter_context(filtered_layer(token_filter, before, num_forwards))
            num_forwards = 1
        for part in parts:
            run(part)
    return before.kept if isinstance(before, FilteredLayer) else before


def decoder_layers(model: torch.nn.Module, attentions: Sequence[torch.nn.Module]) -> list[torch.nn.Module]:
    """For each attention layer, the element of the model's list of layers that it is in.

    Raises `ValueError` for a model that keeps them in no list.
    """
    names = {module: name for name, module in model.named_modules()}
    return [_decoder_layer(model, names[attention].split(".")) for attention in attentions]


def _decoder_layer(model: torch.nn.Module, path: list[str]) -> torch.nn.Module:
    for depth in range(len(path) - 1, 0, -1):
        if isinstance(model.get_submodule(".".join(path[:depth])), torch.nn.ModuleList):
            return model.get_submodule(".".join(path[: depth + 1]))
    raise ValueError("its layers are in no list")
