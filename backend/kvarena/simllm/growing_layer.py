"""A layer's KV in memory that is there before its tokens are."""

from __future__ import annotations

import torch
from transformers.cache_utils import DynamicLayer

from kvarena.engines.sequence_kv import GROWTH

LEAST_ROOM_TOKENS = 64


class GrowingLayer(DynamicLayer):
    """Differs from `DynamicLayer` in that a token doesn't copy what stands before it: `keys` and `values` are views.

    For sequences that only grow: the rows of a batch stay as they are.
    """

    def __init__(self) -> None:
        super().__init__()
        self._memory = torch.empty(0)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes keys and values `(B, H_kv, T, D)` behind what is there; returns all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._memory = key_states.new_empty(2, *key_states.shape[:2], 0, key_states.shape[3])
        start = self.get_seq_length()
        end = start + key_states.shape[2]
        self._reserve(start, end)
        self._memory[0, :, :, start:end] = key_states
        self._memory[1, :, :, start:end] = value_states
        self.keys, self.values = self._memory[:, :, :, :end]
        return self.keys, self.values

    def _reserve(self, num_filled: int, num_tokens: int) -> None:
        _, batch, num_heads, capacity, head_size = self._memory.shape
        if num_tokens <= capacity:
            return
        room = max(num_tokens + LEAST_ROOM_TOKENS, int(GROWTH * capacity))
        larger = self._memory.new_empty(2, batch, num_heads, room, head_size)
        larger[:, :, :, :num_filled] = self._memory[:, :, :, :num_filled]
        self._memory = larger
