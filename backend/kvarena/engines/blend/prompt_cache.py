"""The cache of a forward over chosen tokens of a prompt: fresh KV goes to its place among all the others'.

Such a forward is run for its KV alone, so it ends where the last of it is known: by `KVKnown`, which its caller
catches.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers.cache_utils import Cache


class KVKnown(Exception):
    """Ends a forward pass on purpose. `keys` are a layer's fresh ones, `(1, H_kv, T, D)`."""

    def __init__(self, keys: torch.Tensor) -> None:
        super().__init__()
        self.keys = keys


class PromptCache(Cache):
    """Over a prompt's memory `(L, 2, H_kv, T, D)`. Differs from `Cache` in where fresh KV is written.

    `positions` `(T_q,)` are those of the tokens under way, ascending; `mask` `(1, 1, T_q, end)` lets each attend to
    everything up to itself, and `end` is behind the last.
    """

    def __init__(self, memory: torch.Tensor) -> None:
        super().__init__(layers=[])
        self.memory = memory
        self.positions = torch.empty(0, dtype=torch.int64)
        self.mask = torch.empty(1, 1, 0, 0, dtype=torch.bool)
        self.end = 0
        self._is_probing = False

    def go_on_with(self, positions: torch.Tensor) -> None:
        """These tokens are all that comes from now on."""
        self.positions = positions
        self.end = int(positions[-1]) + 1
        self.mask = (torch.arange(self.end, device=positions.device) <= positions[:, None])[None, None]

    def probed_keys(self, layer: Callable[..., object], *args: object, **kwargs: object) -> torch.Tensor:
        """Runs a layer until its fresh keys `(T_q, H_kv, D)` are known, and writes nothing."""
        self._is_probing = True
        try:
            layer(*args, **kwargs)
        except KVKnown as known:
            return known.keys[0].transpose(0, 1)
        finally:
            self._is_probing = False
        raise AssertionError("a layer without keys")

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes a layer's `(1, H_kv, T_q, D)`; returns that layer's of all tokens up to the last one under way."""
        if self._is_probing:
            raise KVKnown(key_states)
        own = self.memory[layer_idx]  # (2, H_kv, T, D)
        own[0, :, self.positions] = key_states[0]
        own[1, :, self.positions] = value_states[0]
        if layer_idx == len(self.memory) - 1:
            raise KVKnown(key_states)
        return own[0:1, :, : self.end], own[1:2, :, : self.end]
