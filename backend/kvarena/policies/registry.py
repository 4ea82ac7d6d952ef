"""Policies by name, and the two ends of every policy: recompute all, recompute nothing.

A ratio of 0 or 1 needs no selection, whatever the policy. The contract is `kvarena.core.policy`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvarena.core.plan import ReusePlan
from kvarena.core.policy import Selection, SelectionContext, SelectionPolicy, reused_positions
from kvarena.policies.chunk_head import ChunkHead
from kvarena.policies.kv_deviation import KVDeviation
from kvarena.policies.params import BlendParams
from kvarena.policies.query_attention import QueryAttention
from kvarena.policies.random_tokens import RandomTokens


@dataclass(frozen=True)
class RecomputeAll:
    """Every token: full prefill through the blend's own path."""

    def watched_layers(self, num_layers: int) -> Sequence[int]:
        return ()

    def select(self, plan: ReusePlan, evidence: SelectionContext) -> Selection:
        return Selection(reused_positions(plan))


@dataclass(frozen=True)
class RecomputeNone:
    """No token: chunks are used as they were computed, blind to each other."""

    def watched_layers(self, num_layers: int) -> Sequence[int]:
        return ()

    def select(self, plan: ReusePlan, evidence: SelectionContext) -> Selection:
        return Selection(torch.empty(0, dtype=torch.int64))


def make_policy(params: BlendParams) -> SelectionPolicy:
    """Ratio 0 and 1 need no selection, whatever the policy."""
    if params.recomputes_all:
        return RecomputeAll()
    if params.recomputes_none:
        return RecomputeNone()
    match params.policy:
        case "kv_deviation":
            return KVDeviation(
                params.ratio, params.check_layer, params.deviation, params.num_filters, params.run_tokens
            )
        case "chunk_head":
            return ChunkHead(params.ratio, params.head_tokens)
        case "query_attention":
            return QueryAttention(params.ratio, params.check_layer, params.run_tokens)
        case "random":
            return RandomTokens(params.ratio)
    raise AssertionError(f"no policy {params.policy}")
