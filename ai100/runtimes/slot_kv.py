"""The KV of all slots in one piece of memory, and the attention that reads it in place.

One forward of a Hugging Face model runs rows of different slots at different positions: the linear layers take them as
one batch, and each row attends to its own slot, up to its own end, through views. No KV is copied but the fresh one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.cache_utils import Cache

from ai100.runtimes.filled_slots import SlotRange

ATTENTION = "ai100_slots"
"""The name that Hugging Face's models know the attention by."""


class SlotKV(Cache):
    """A `Cache` over `memory` `(L, 2, S, H_kv, ctx_len, D)`. Differs from `Cache` in where fresh KV is written, and in
    what `update` returns: a list of one view per row instead of a tensor, which only `slot_attention` reads.
    """

    def __init__(self, memory: torch.Tensor) -> None:
        super().__init__(layers=[])
        self.memory = memory
        self._layers = [(keys, values) for keys, values in memory]
        self._ranges: Sequence[SlotRange] = ()

    def go_on_with(self, ranges: Sequence[SlotRange]) -> None:
        """What the next forward writes, one range for each row of its batch, all of one length."""
        self._ranges = ranges

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> Any:
        """Writes a layer's fresh `(B, H_kv, T_q, D)`. Returns each row's keys and values, views `(H_kv, end, D)`."""
        keys, values = self._layers[layer_idx]
        for row, written in enumerate(self._ranges):
            keys[written.slot, :, written.start : written.end] = key_states[row]
            values[written.slot, :, written.start : written.end] = value_states[row]
        return (
            [keys[written.slot, :, : written.end] for written in self._ranges],
            [values[written.slot, :, : written.end] for written in self._ranges],
        )


def causal_mask(written: SlotRange, num_groups: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor | None:
    """`(1, 1, G * T_q, end)`, to be added to the scores: each token attends to what is before it, and itself.

    The `G` query heads of a KV head stand below each other, as `slot_attention` lays them. One token needs none.
    """
    if written.end - written.start == 1:
        return None
    positions = torch.arange(written.start, written.end, device=device).repeat(num_groups)
    is_hidden = torch.arange(written.end, device=device) > positions[:, None]
    return torch.zeros(is_hidden.shape, dtype=dtype, device=device).masked_fill_(is_hidden, -torch.inf)[None, None]


def slot_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: Sequence[torch.Tensor],
    value: Sequence[torch.Tensor],
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **arguments: Any,
) -> tuple[torch.Tensor, None]:
    """`query` `(B, H, T_q, D)`, and for each row `(H_kv, end, D)`; returns `(B, T_q, H, D)`.

    The query heads of a KV head become more query positions of that one head: the same sums, without a copy of the
    keys and values for each of them.
    """
    if unknown := {"softcap", "s_aux"} & {name for name, given in arguments.items() if given is not None}:
        raise ValueError(
            f"{type(module).__name__} needs {', '.join(sorted(unknown))}, which attention over slots lacks"
        )
    num_heads, num_queries, head_size = query.shape[1:]
    rows = []
    for row, (keys, values) in enumerate(zip(key, value, strict=True)):
        grouped = query[row].reshape(1, len(keys), -1, head_size)  # (1, H_kv, G * T_q, D)
        output = scaled_dot_product_attention(
            grouped, keys[None], values[None], attn_mask=attention_mask, scale=scaling
        )
        rows.append(output.reshape(num_heads, num_queries, head_size).transpose(0, 1))
    return torch.stack(rows), None


AttentionInterface.register(ATTENTION, slot_attention)
