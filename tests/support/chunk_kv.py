"""Chunks of any length with KV of their own, for tests of stores."""

from __future__ import annotations

import torch

from kvarena.core.plan import Chunk, as_token_ids
from kvarena.stores.lmcache import KVGeometry

GEOMETRY = KVGeometry("tiny", 3, 2, 16, torch.bfloat16)


def chunk_of(num_tokens: int) -> Chunk:
    return Chunk(as_token_ids([num_tokens] * num_tokens))


def kv_of(num_tokens: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_tokens)
    return torch.randn(2, 3, num_tokens, 32, generator=generator).bfloat16()
