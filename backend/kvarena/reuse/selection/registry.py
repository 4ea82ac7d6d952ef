"""Policies by name."""

from __future__ import annotations

from kvarena.reuse.params import BlendParams
from kvarena.reuse.selection.bounds import RecomputeAll, RecomputeNone
from kvarena.reuse.selection.chunk_head import ChunkHead
from kvarena.reuse.selection.kv_deviation import KVDeviation
from kvarena.reuse.selection.policy import SelectionPolicy
from kvarena.reuse.selection.query_attention import QueryAttention
from kvarena.reuse.selection.random_tokens import RandomTokens


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
