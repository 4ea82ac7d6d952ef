"""Going on with fewer tokens from a layer on: hooks on the decoder layers, there only while such a forward runs."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from torch.utils._pytree import tree_map

from kvarena.engines.blend.prompt_cache import KVKnown, PromptCache
from kvarena.reuse.prefilled import LayerKV, Narrowing

LayerCall = tuple[tuple[Any, ...], dict[str, Any]]


class NarrowedLayer:
    """A context in which a layer goes on with chosen tokens only. `kept` are their positions, once it has run.

    The layer is run up to its KV to let `choose` see them, and is then called with the rows of its inputs that were
    chosen; so are the layers behind it, which the model hands the same masks, angles and positions. Where a prompt
    takes several pieces, the first ones end at this layer and leave their inputs, and the last one goes on with what
    was chosen of all. Inputs that only later layers use are narrowed where there is one piece.
    """

    def __init__(
        self, layers: Sequence[torch.nn.Module], narrowing: Narrowing, cache: PromptCache, num_pieces: int
    ) -> None:
        self.kept = torch.empty(0, dtype=torch.int64)
        self._layer, *self._later_layers = layers[narrowing.layer :]
        self._choose = narrowing.choose
        self._cache = cache
        self._num_pieces = num_pieces
        self._calls: list[LayerCall] = []
        self._positions: list[torch.Tensor] = []
        self._kv: list[LayerKV] = []
        self._narrowed_inputs: dict[int, torch.Tensor] = {}
        self._chosen = torch.empty(0, dtype=torch.int64)

    def __enter__(self) -> NarrowedLayer:
        self._handles = [self._layer.register_forward_pre_hook(self._hook, with_kwargs=True)]
        self._handles += [
            layer.register_forward_pre_hook(self._later_hook, with_kwargs=True) for layer in self._later_layers
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LayerCall:
        self._calls.append((args, kwargs))
        self._positions.append(self._cache.positions)
        self._kv.append(self._cache.probed_kv(module.forward, *args, **kwargs))
        if len(self._calls) < self._num_pieces:
            raise KVKnown(self._kv[-1])
        return self._narrowed()

    def _later_hook(self, _module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LayerCall:
        call: LayerCall = tree_map(self._narrowed_later, (args, kwargs))
        return call

    def _narrowed_later(self, x: Any) -> Any:
        """A later layer's input: as narrowed here, or now, where only that layer uses it (angles of another base)."""
        num_before = len(self._positions[0])
        is_new = self._num_pieces == 1 and len(self.kept) < num_before and id(x) not in self._narrowed_inputs
        if is_new and _has_rows(x, num_before):
            self._narrowed_inputs[id(x)] = x[:, self._chosen]
        return self._narrowed_inputs.get(id(x), x)

    def _narrowed(self) -> LayerCall:
        """One call with the chosen rows of every piece's inputs; what has no row per token is the last piece's."""
        positions = torch.cat(self._positions)
        fresh = LayerKV(*map(torch.cat, zip(*self._kv, strict=True)))
        chosen = self._choose(positions.cpu(), fresh).to(positions.device)
        self.kept = positions[chosen].cpu()
        self._chosen = chosen
        mask_of_all = self._cache.mask
        self._cache.go_on_with(positions[chosen])
        self._narrowed_inputs[id(mask_of_all)] = self._cache.mask
        counts = [len(piece) for piece in self._positions]

        def join(*inputs: Any) -> Any:
            known = self._narrowed_inputs.get(id(inputs[-1]))
            if known is None and all(_has_rows(x, n) for x, n in zip(inputs, counts, strict=True)):
                known = self._narrowed_inputs[id(inputs[-1])] = torch.cat(inputs, dim=1)[:, chosen]
            return inputs[-1] if known is None else known

        joined: LayerCall = tree_map(join, *self._calls)
        return joined


def _has_rows(x: Any, num_tokens: int) -> bool:
    return torch.is_tensor(x) and x.dim() > 1 and x.shape[1] == num_tokens
