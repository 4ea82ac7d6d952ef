"""Prompts of different lengths as one batch: padded on the left, so that their answers begin in the same column."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers.cache_utils import DynamicCache

from kvarena.engines.hf_model import HFModel


@dataclass(frozen=True)
class PaddedBatch:
    """`input_ids` and `attention_mask` are `(B, T)`."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int]], pad_token_id: int, device: torch.device) -> PaddedBatch:
        longest = max(map(len, prompts))
        rows = [[pad_token_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
        mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        return cls(torch.tensor(rows, device=device), torch.tensor(mask, device=device))


def joined_cache(
    model: HFModel, prompts: Sequence[Sequence[int]], known: Sequence[torch.Tensor | None], pad_token_id: int
) -> DynamicCache:
    """One cache of prompts whose KV `(L, 2, H_kv, T, D)` is known, and of the others, which are run as one batch."""
    shape, cache = model.kv_shape, DynamicCache()
    missing = [prompt for prompt, kv in zip(prompts, known, strict=True) if kv is None]
    longest = max(map(len, missing), default=0)
    if longest:
        batch = PaddedBatch.of(missing, pad_token_id, shape.device)
        positions = (batch.attention_mask.cumsum(-1) - 1).clamp(min=0)
        model.module.model(batch.input_ids, batch.attention_mask, positions, past_key_values=cache, use_cache=True)
    computed = (
        unpadded_kv(cache, row, longest - len(prompt), longest) if prompt else shape.empty(0)
        for row, prompt in enumerate(missing)
    )
    return _padded_cache([next(computed) if kv is None else kv for kv in known])


def _padded_cache(rows: Sequence[torch.Tensor]) -> DynamicCache:
    """One cache of the KV `(L, 2, H_kv, T, D)` of several sequences; the shorter ones begin with zeros."""
    longest = max(row.shape[3] for row in rows)
    num_layers, _, num_heads, _, head_size = rows[0].shape
    kv = rows[0].new_zeros(num_layers, 2, len(rows), num_heads, longest, head_size)
    for number, row in enumerate(rows):
        kv[:, :, number, :, longest - row.shape[3] :] = row
    return DynamicCache([(layer[0], layer[1]) for layer in kv])


def unpadded_kv(cache: DynamicCache, row: int, start: int, end: int) -> torch.Tensor:
    """The KV `(L, 2, H_kv, end - start, D)` of these columns of one row."""
    return torch.stack(
        [torch.stack([layer.keys[row, :, start:end], layer.values[row, :, start:end]]) for layer in cache.layers]
    )
