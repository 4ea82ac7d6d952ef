"""The model's start: attention that is wired for looking things up, instead of noise.

From a usual random start a model this small needs many millions of tokens before it binds a person to a fact. Here

- layer 0 and one KV head of layer 1 look at the tokens 1, 2, 3 and 6 places back: through a direction `u` that all
  embeddings share, their queries and keys carry fixed phases in the fast rotary dimensions. They write a bag of the
  last few words;
- all other heads match equal content (queries start as keys, on the slow rotary dimensions, where position matters
  little) and copy what they find (the output projection starts as the value projection transposed);
- the content heads of `RECENT_LAYERS` also prefer what is near, by `u` in the middle rotary dimensions, for
  "the same shop" means the last one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from model import Attention, Layer, ModelConfig, SmallLlama, rope_frequencies
from torch import Tensor, nn

EMBEDDING_STD = 0.25
FINAL_NORM = 0.15
SHARED_SHARE = 0.6
OFFSETS = ((1, 2), (3, 6))
LOCAL_DIMS = ((0, 10), (2, 11))
LOCAL_STRENGTHS = (0.55, 0.25)
SLOW_FROM = 14
RECENT_DIMS = (6, 13)
RECENT_STRENGTH = 0.12
RECENT_LAYERS = (1, 2)


@torch.no_grad()
def wire(model: SmallLlama, seed: int) -> None:
    """Sets all weights of `model`."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    shared = torch.randn(config.hidden_size, generator=generator)
    shared /= shared.norm()
    layers = cast("Sequence[Layer]", model.model.layers)
    for layer in layers:
        mlp = layer.mlp
        for linear in (mlp.gate_proj, mlp.up_proj):
            _normal(linear, 0.7 * config.hidden_size**-0.5, generator)
        _normal(mlp.down_proj, 0.09 * config.intermediate_size**-0.5, generator)
    embeddings = model.model.embed_tokens.weight
    embeddings.normal_(std=EMBEDDING_STD, generator=generator)
    embeddings += shared * EMBEDDING_STD * math.sqrt(config.hidden_size) * SHARED_SHARE
    model.model.norm.weight.fill_(FINAL_NORM)
    for index, layer in enumerate(layers):
        for group in range(config.num_key_value_heads):
            if index == 0 or (index == 1 and group == 0):
                _wire_local(layer.self_attn, group, shared, config, generator)
            else:
                _wire_content(layer.self_attn, group, shared, config, generator, index in RECENT_LAYERS)


def _wire_local(
    attention: Attention, group: int, shared: Tensor, config: ModelConfig, generator: torch.Generator
) -> None:
    """A KV head whose query heads look a fixed number of tokens back and write what is there."""
    size, half = config.head_dim, config.head_dim // 2
    kind = group % 2
    (low, high), strength = LOCAL_DIMS[kind], LOCAL_STRENGTHS[kind]
    frequencies = rope_frequencies(config)[low:high]
    key = torch.randn(size, config.hidden_size, generator=generator) * 0.01
    key[low:high] += strength * shared
    _rows(attention.k_proj, group, size).copy_(key)
    _rows(attention.v_proj, group, size).copy_(_orthogonal(size, shared, generator))
    write = _orthogonal(size, shared, generator).T
    for index, head in enumerate(_query_heads(group, config)):
        phase = -frequencies * OFFSETS[kind][index % 2]
        query = torch.randn(size, config.hidden_size, generator=generator) * 0.01
        query[low:high] += strength * torch.cos(phase)[:, None] * shared
        query[half + low : half + high] += strength * torch.sin(phase)[:, None] * shared
        _rows(attention.q_proj, head, size).copy_(query)
        attention.o_proj.weight[:, head * size : (head + 1) * size] = 0.2 * write


def _wire_content(
    attention: Attention, group: int, shared: Tensor, config: ModelConfig, generator: torch.Generator, recent: bool
) -> None:
    """A KV head whose query heads find equal content anywhere and copy it."""
    size, half = config.head_dim, config.head_dim // 2
    slow = torch.arange(size) % half >= SLOW_FROM
    value = _orthogonal(size, shared, generator)
    key = _orthogonal(size, shared, generator)
    key[~slow] *= 0.2
    _rows(attention.v_proj, group, size).copy_(value)
    for head in _query_heads(group, config):
        query = 1.3 * key
        query[~slow] = torch.randn(int((~slow).sum()), config.hidden_size, generator=generator) * 0.013
        if recent:
            query[slice(*RECENT_DIMS)] += RECENT_STRENGTH * shared
        _rows(attention.q_proj, head, size).copy_(query)
        attention.o_proj.weight[:, head * size : (head + 1) * size] = 0.12 * value.T
    key = 1.3 * key
    if recent:
        key[slice(*RECENT_DIMS)] += RECENT_STRENGTH * shared
    _rows(attention.k_proj, group, size).copy_(key)


def _query_heads(group: int, config: ModelConfig) -> range:
    per_group = config.num_attention_heads // config.num_key_value_heads
    return range(group * per_group, (group + 1) * per_group)


def _rows(linear: nn.Linear, head: int, head_dim: int) -> Tensor:
    return linear.weight[head * head_dim : (head + 1) * head_dim]


def _orthogonal(count: int, without: Tensor, generator: torch.Generator) -> Tensor:
    """`count` orthonormal rows, with the direction `without` taken out."""
    rows = torch.linalg.qr(torch.randn(without.shape[0], count, generator=generator))[0].T
    orthogonal: Tensor = rows - (rows @ without)[:, None] * without
    return orthogonal


def _normal(linear: nn.Linear, std: float, generator: torch.Generator) -> None:
    linear.weight.normal_(std=std, generator=generator)
