"""Scores of a chunk's tokens: how much each needs its context, known before any request.

A prompt of several chunks is computed whole. It shows of each token of a chunk in its middle how far its values lie
from those that the chunk has by itself, and how much attention it gets from the text after the chunk. Both are nearly
properties of the chunk: a few such prompts say as much as a look at the request itself. A token's scores are its
deviation (squared distance, each layer divided by its mean over the chunk, averaged over the layers but for the first,
whose values come before any attention) and its attention (alike, over all layers). docs/quality.md has what else was
tried.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch

from kvarena.core.placement import seen_by
from kvarena.core.plan import Chunk, ReusePlan, Span
from kvarena.core.prefilled_model import LayerKV, PrefilledModel

MIN_CONTEXT_TOKENS = 64
"""Before a chunk and after it, for a prompt to show something of it."""
MAX_SCORED_TOKENS = 8192
"""A longer prompt isn't used: all of its KV is held beside the cache."""
QUERY_STRIDE = 8
"""Of so many tokens one says where it looks; what many look at shows in a sample too."""
_QUERY_ROWS = 64


class ChunkScorer:
    """Watches the forward of a prompt `[0, end)`, piece by piece, whose chunks' KV stood in the cache before.

    `alone` are the values in the cache then, of every layer, for the spans of `plan`, in their order.
    """

    def __init__(
        self, model: PrefilledModel, plan: ReusePlan, alone: Mapping[int, Sequence[LayerKV]], end: int
    ) -> None:
        self._model = model
        self._plan = plan
        self._alone = {layer: torch.cat([group.values for group in groups]) for layer, groups in alone.items()}
        self._keys: dict[int, list[torch.Tensor]] = {layer: [] for layer in alone}
        self._places = torch.full((end,), -1)
        self._ends = torch.zeros(end, dtype=torch.int64)
        for span, start in zip(plan, accumulate(map(len, plan), initial=0), strict=False):
            self._places[span.start : span.end] = torch.arange(start, start + len(span))
            self._ends[span.start : span.end] = span.end
        self._deviation = torch.zeros(len(alone), end)
        self._attention = torch.zeros(len(alone), end)

    def observe(self, layer: int, positions: torch.Tensor, queries: torch.Tensor, fresh: LayerKV) -> None:
        """One layer of the tokens at `positions`, which come in order and without a gap: queries `(T, H, D)`."""
        places = self._places[positions]
        held = places >= 0
        moved = fresh.values[held.to(fresh.values.device)].float() - self._alone[layer][places[held]].float()
        self._deviation[layer, positions[held]] = moved.square_().sum(dim=(1, 2)).cpu()
        self._keys[layer].append(fresh.keys.clone())
        keys = torch.cat(self._keys[layer]).float()
        for rows in (positions % QUERY_STRIDE == 0).nonzero().flatten().split(_QUERY_ROWS):
            self._attention[layer, : len(keys)] += self._received(layer, queries[rows], positions[rows], keys)

    def scores(self) -> dict[Chunk, torch.Tensor]:
        """Of each chunk with enough context on both sides, deviation and attention, fp32 `(T, 2)`; heads of all ranks
        count.
        """
        deviation, attention = self._model.ranks.sum(torch.stack((self._deviation, self._attention)))
        in_context = deviation[min(1, len(deviation) - 1) :]
        return {
            span.chunk: torch.stack([_relative(of[:, span.start : span.end]) for of in (in_context, attention)], dim=1)
            for span in self._plan
            if self._has_context(span)
        }

    def _has_context(self, span: Span) -> bool:
        before, after = span.start, len(self._places) - span.end
        return span.is_whole_chunk and not span.is_exact and min(before, after) >= MIN_CONTEXT_TOKENS

    def _received(self, layer: int, queries: torch.Tensor, positions: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """The attention `(T,)` that each token of a span gets from those of these tokens that come after the span.

        `keys` `(T, H_kv, D)` are fp32.
        """
        attention = self._model.attention[layer]
        grouped = queries.float().unflatten(1, (keys.shape[1], -1))  # (R, H_kv, G, D)
        weights = torch.einsum("rkgd,tkd->kgrt", grouped, keys) * attention.scale
        own = positions.to(keys.device)[:, None]
        visible = seen_by(own[:, 0], len(keys), attention.window)
        weights = weights.masked_fill_(~visible, -torch.inf).softmax(dim=-1)
        ends = self._ends[: len(keys)].to(keys.device)
        from_after = (ends > 0) & (ends <= own)
        return (weights * from_after).sum(dim=(0, 1, 2)).cpu()


def _relative(by_layer: torch.Tensor) -> torch.Tensor:
    """Each layer `(L, T)` divided by its mean, and then their mean `(T,)`."""
    return (by_layer / by_layer.mean(dim=1, keepdim=True).clamp(min=1e-20)).mean(dim=0)
