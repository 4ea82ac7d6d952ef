"""SDPA for Hugging Face models, without copies of the cache where one token decodes.

With grouped-query attention the stock function repeats keys and values for every query head, or asks SDPA to. A single
query token has one row of the mask, or none, so the `G` query heads of a group can be `G` query positions of one head
instead: the same sums over views of the cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "kvarena_sdpa"


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **arguments: Any,
) -> tuple[torch.Tensor, None]:
    """`query` `(B, H, T_q, D)`, `key` and `value` `(B, H_kv, T, D)`; returns `(B, T_q, H, D)`."""
    batch, num_heads, num_queries, head_size = query.shape
    num_kv_heads = key.shape[1]
    if num_queries > 1 or num_heads == num_kv_heads or batch > 1:
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **arguments)
        return output, None
    grouped = query.view(1, num_kv_heads, num_heads // num_kv_heads, head_size)
    output = scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scaling)
    return output.reshape(1, 1, num_heads, value.shape[-1]), None


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
