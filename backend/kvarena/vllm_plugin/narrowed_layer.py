"""Going on with fewer tokens from a layer on: hooks on the decoder layers, there only while such a forward runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_map
from vllm.forward_context import get_forward_context

from kvarena.reuse.prefilled import LayerKV, Narrowing
from kvarena.vllm_plugin.batch import Batch
from kvarena.vllm_plugin.layer_hooks import KVKnown, reading_kv

if TYPE_CHECKING:
    from kvarena.vllm_plugin.paged_model import VllmModel

LayerCall = tuple[tuple[Any, ...], dict[str, Any]]


class NarrowedLayer:
    """A context in which a layer goes on with chosen tokens only. `kept` are their positions, once it has run.

    The layer is run up to its KV to let `choose` see it, and is then called again with the rows of its inputs
    that were chosen; the forward context changes along with them, and so do the inputs that the model hands to every
    layer alike (positions). Where a prompt takes several batches, the first ones end at this layer and leave their
    inputs, and the last one goes on with what was chosen of all.
    """

    def __init__(
        self,
        engine: VllmModel,
        narrowing: Narrowing,
        before: torch.Tensor | NarrowedLayer,
        num_batches: int,
        batch_of: Callable[[torch.Tensor], Batch],
    ) -> None:
        """`before`: the positions of all batches, or the layer before this one that goes on with fewer."""
        self.kept = torch.empty(0, dtype=torch.int64)
        self._engine = engine
        self._layer = narrowing.layer
        self._choose = narrowing.choose
        self._before = before
        self._waiting = num_batches
        self._batch_of = batch_of
        self._calls: list[LayerCall] = []
        self._kv: list[LayerKV] = []
        self._narrowed_inputs: dict[int, torch.Tensor] = {}
        self._block, *self._later_blocks = engine.blocks[self._layer :]
        self._is_probing = False

    def __enter__(self) -> NarrowedLayer:
        self._handles = [self._block.register_forward_pre_hook(self._hook, with_kwargs=True)]
        self._handles += [
            block.register_forward_pre_hook(self._later_hook, with_kwargs=True) for block in self._later_blocks
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, _module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LayerCall | None:
        if self._is_probing:
            return None
        self._calls.append((args, kwargs))
        self._kv.append(self._probe_kv(args, kwargs))
        self._waiting -= 1
        if self._waiting:
            raise KVKnown
        return self._narrowed()

    def _later_hook(self, _module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LayerCall:
        call: LayerCall = tree_map(lambda x: self._narrowed_inputs.get(id(x), x), (args, kwargs))
        return call

    def _probe_kv(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LayerKV:
        """The layer's fresh KV, from a copy of its inputs: fused norms write into them."""
        found: list[LayerKV] = []

        def stop(_layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
            heads = (len(keys), -1, self._engine.head_size)
            found.append(LayerKV(keys.reshape(heads).clone(), values.reshape(heads).clone()))
            raise KVKnown

        copied_args, copied_kwargs = tree_map(_copied, (args, kwargs))
        self._is_probing = True
        try:
            with reading_kv(self._engine.layers, [self._layer], stop, before_others=True), suppress(KVKnown):
                self._block(*copied_args, **copied_kwargs)
        finally:
            self._is_probing = False
        return found[0]

    def _narrowed(self) -> LayerCall:
        positions = self._before if torch.is_tensor(self._before) else self._before.kept
        chosen = self._choose(positions, LayerKV(*map(torch.cat, zip(*self._kv, strict=True))))
        self.kept = positions[chosen]
        context = get_forward_context()
        context.attn_metadata, context.slot_mapping = self._engine.attention_metadata(self._batch_of(self.kept))
        return self._chosen_rows(chosen.to(self._engine.device))

    def _chosen_rows(self, chosen: torch.Tensor) -> LayerCall:
        """One call with the chosen rows of every call's inputs; what has no row per token is the last call's."""
        counts = [len(kv.keys) for kv in self._kv]

        def join(*inputs: Any) -> Any:
            axis = _token_axis(inputs, counts)
            if axis is None:
                return inputs[-1]
            rows = torch.cat(inputs, dim=axis).index_select(axis, chosen)
            return self._narrowed_inputs.setdefault(id(inputs[-1]), rows)

        joined: LayerCall = tree_map(join, *self._calls)
        return joined


def _copied(x: Any) -> Any:
    return x.clone() if torch.is_tensor(x) else x


def _token_axis(inputs: Sequence[Any], counts: Sequence[int]) -> int | None:
    """Where the inputs of a layer have a row per token: `(T, ...)`, or behind a batch of one, `(1, T, ...)`."""
    if not all(map(torch.is_tensor, inputs)):
        return None
    for axis in (0, 1):
        lengths = [x.shape[axis] if x.dim() > axis else None for x in inputs]
        if lengths == list(counts) and (axis == 0 or all(len(x) == 1 for x in inputs)):
            return axis
    return None
