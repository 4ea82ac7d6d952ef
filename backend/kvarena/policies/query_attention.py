"""`query_attention` (ProphetKV, arXiv 2602.02579; QCFuse, 2606.05875): the tokens that the question attends to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvarena.core.plan import ReusePlan
from kvarena.core.policy import Selection, SelectionContext, SelectionPolicy, best_runs, reused_positions, share_of
from kvarena.policies.registry import check_layer_parameter, policy, ratio_parameter, run_tokens_parameter

if TYPE_CHECKING:
    import torch


@policy("query_attention")
@dataclass(frozen=True)
class QueryAttention(SelectionPolicy):
    """The tokens that the question attends to most at a layer (ProphetKV, QCFuse).

    The `ratio` of reused tokens that get the most attention from the question at `check_layer`. ProphetKV (arXiv
    2602.02579) and QCFuse (arXiv 2606.05875) recompute what the question needs, not what deviates: the question's own
    queries score the cached keys. A token's score is its attention probability among the reused tokens, averaged over
    the question's tokens and the heads. No layer is run over the context.

    The papers take several layers together, this takes one: which layers look for what the question asks depends on the
    model, and early ones drown them out. A layer's sliding window is ignored, for it would hide most of a long context.
    `run_tokens`: so many neighbours are chosen together.
    """

    ratio: float = ratio_parameter()
    check_layer: int = check_layer_parameter()
    run_tokens: int = run_tokens_parameter()

    def watched_layers(self, num_layers: int) -> Sequence[int]:
        return (min(self.check_layer, num_layers - 1),)

    def select(self, plan: ReusePlan, context: SelectionContext) -> Selection:
        reused = reused_positions(plan)
        if not len(reused):
            return Selection(reused)
        (layer,) = self.watched_layers(context.num_layers)
        attention = _attention(
            context.question_queries(layer), context.reused_keys(layer), context.attention_scale(layer)
        )
        scores = context.summed(attention.mean(dim=0))

        def seen_from() -> torch.Tensor:
            return context.question_positions()[context.summed(attention).argmax(dim=0)]

        context.explain(f"share of the question's attention, layer {layer}", reused, scores, seen_from)
        best = best_runs(scores, share_of(len(reused), self.ratio), self.run_tokens)
        return Selection(reused[best.sort().values])


def _attention(queries: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
    """The attention `(T_q, T)` of queries `(T_q, H, D)` to keys `(T, H_kv, D)`, averaged over heads; rows sum to 1."""
    import torch

    num_queries, num_heads, head_size = queries.shape
    num_kv_heads = keys.shape[1]
    grouped = queries.view(num_queries, num_kv_heads, num_heads // num_kv_heads, head_size)
    products = torch.einsum("qkgd,tkd->kgqt", grouped, keys).float() * scale
    return products.softmax(dim=-1).mean(dim=(0, 1))
