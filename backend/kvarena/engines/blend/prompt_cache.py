"""The cache of a forward over chosen tokens of a prompt: fresh KV goes to its place among all the others'.

Such a forward is run for its KV alone, so it ends where the last of it is known: by `KVKnown`, which its caller
catches.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers.cache_utils import Cache

from kvarena.reuse.prefilled import LayerKV


class KVKnown(Exception):
    """Ends a forward pass on purpose. `fresh` is the KV of the layer at which it ends."""

    def __init__(self, fresh: LayerKV) -> None:
        super().__init__()
        self.fresh = fresh


class PromptCache(Cache):
    """Over a prompt's memory `(L, 2, H_kv, T, D)`. Differs from `Cache` in where fresh KV is written.

    `positions` `(T_q,)` are those of the tokens under way, ascending; `mask` `(1, 1, T_q, end)` lets each attend to
    everything up to itself, and `end` is behind the last. `ends_with_last_keys`: what lies behind the last layer's keys
    isn't run.
    """

    def __init__(self, memory: torch.Tensor) -> None:
        super().__init__(layers=[])
        self.memory = memory
        self.positions = torch.empty(0, dtype=torch.int64)
        self.mask = torch.empty(1, 1, 0, 0, dtype=torch.bool)
        self.end = 0
        self.ends_with_last_keys = True
        self._is_probing = False

    def go_on_with(self, positions: torch.Tensor) -> None:
        """These tokens are all that comes from now on."""
        self.positions = positions
        self.end = int(positions[-1]) + 1
        self.mask = (torch.arange(self.end, device=positions.device) <= positions[:, None])[None, None]

    def probed_kv(self, layer: Callable[..., object], *args: object, **kwargs: object) -> LayerKV:
        """Runs a layer until its fresh KV is known, and writes nothing."""
        self._is_probing = True
        try:
            layer(*args, **kwargs)
        except KVKnown as known:
            return known.fresh
        finally:
            self._is_probing = False
        raise AssertionError("a layer without KV")

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes a layer's `(1, H_kv, T_q, D)`; returns that layer's of all tokens up to the last one under way."""
        fresh = LayerKV(key_states[0].transpose(0, 1), value_states[0].transpose(0, 1))
        if self._is_probing:
            raise KVKnown(fresh)
        own = self.memory[layer_idx]  # (2, H_kv, T, D)
        own[0, :, self.positions] = key_states[0]
        own[1, :, self.positions] = value_states[0]
        if self.ends_with_last_keys and layer_idx == len(self.memory) - 1:
            raise KVKnown(fresh)
        return own[0:1, :, : self.end], own[1:2, :, : self.end]
