"""SDPA for Hugging Face models that decodes without copying the cache, and shows queries to a hook.

With grouped-query attention the stock function repeats keys and values for every query head, or asks SDPA to. A single
query token has one row of the mask, or none, so the `G` query heads of a group can be `G` query positions of one head
instead: the same sums over views of the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "kvarena_sdpa"

QueriesHook = Callable[[int, torch.Tensor], None]
_on_queries: ContextVar[QueriesHook | None] = ContextVar("on_queries", default=None)


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
    if on_queries := _on_queries.get():
        on_queries(int(getattr(module, "layer_idx")), query)  # noqa: B009
    batch, num_heads, num_queries, head_size = query.shape
    num_kv_heads = key.shape[1]
    if num_queries > 1 or num_heads == num_kv_heads or batch > 1:
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **arguments)
        return output, None
    grouped = query.view(1, num_kv_heads, num_heads // num_kv_heads, head_size)
    output = scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scaling)
    return output.reshape(1, 1, num_heads, value.shape[-1]), None


@contextmanager
def reading_queries(model: Any, on_queries: QueriesHook) -> Iterator[None]:
    """Call `on_queries(layer, queries)`, `(B, H, T_q, D)` and rotated, before a layer of this model attends, in this
    thread. A model with another attention gets this one meanwhile; masks have to be explicit.
    """
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values()
    own = [(config, config._attn_implementation) for config in configs]
    token = _on_queries.set(on_queries)
    for config in configs:
        config._attn_implementation = NAME
    try:
        yield
    finally:
        _on_queries.reset(token)
        for config, name in own:
            config._attn_implementation = name


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
