"""Prefilling chunks that no store has: each a sequence of its own, side by side, on blocks that are free for now."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import torch

from kvarena.reuse.plan import TokenIds
from kvarena.vllm_plugin.batch import Batch
from kvarena.vllm_plugin.layer_hooks import reading_kv

if TYPE_CHECKING:
    from kvarena.vllm_plugin.paged_model import VllmModel


def prefill_alone(engine: VllmModel, texts: Sequence[TokenIds], scratch: torch.Tensor) -> list[torch.Tensor | None]:
    """The KV `(2, L, T, H_kv * D)` of each text, read off as it passes; None for one that has no room even alone.

    `scratch` `(G, N)` are the blocks, in each group of layers.
    """
    num_blocks = [-(-len(text) // engine.block_size) for text in texts]
    computed: list[torch.Tensor | None] = [None] * len(texts)
    for numbers in _turns(num_blocks, room=scratch.shape[1]):
        own = [torch.from_numpy(texts[number]).long() for number in numbers]
        kv = [_empty_kv(engine, len(text)) for text in own]
        starts = accumulate((num_blocks[number] for number in numbers), initial=0)
        blocks = [scratch[:, start:end] for start, end in pairwise(starts)]
        for batch in Batch.of_whole(own, blocks).split(engine.max_batch_tokens):
            pieces = [kv[row.sequence][:, :, row.start : row.end] for row in batch.rows]
            with reading_kv(engine.layers, range(len(engine.layers)), partial(_keep, pieces)):
                engine.forward(batch)
        for number, whole in zip(numbers, kv, strict=True):
            computed[number] = whole
    return computed


def _turns(sizes: Sequence[int], room: int) -> Iterator[list[int]]:
    """Numbers of those that have room side by side, in order; those that have none are left out."""
    turn: list[int] = []
    used = 0
    for number, size in enumerate(sizes):
        if size > room:
            continue
        if used + size > room:
            yield turn
            turn, used = [], 0
        turn.append(number)
        used += size
    if turn:
        yield turn


def _empty_kv(engine: VllmModel, num_tokens: int) -> torch.Tensor:
    shape = (2, len(engine.layers), num_tokens, engine.num_kv_heads * engine.head_size)
    return torch.empty(shape, dtype=engine.dtype, device=engine.device)


def _keep(pieces: Sequence[torch.Tensor], layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
    """One layer's keys and values `(T, H_kv * D)` of a batch, into the KV `(2, L, t, H_kv * D)` of each row."""
    sizes = [piece.shape[2] for piece in pieces]
    for piece, own_keys, own_values in zip(pieces, torch.split(keys, sizes), torch.split(values, sizes), strict=True):
        piece[0, layer], piece[1, layer] = own_keys, own_values
