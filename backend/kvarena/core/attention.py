"""Attention seen from outside the model: which tokens see which, and what that says of chunks.

Two observers watch a forward of the model's own, piece by piece and layer by layer (`PrefilledModel.observe`).

`ChunkScorer` scores a chunk's tokens: how much each needs its context, known before any request. A prompt of several
chunks is computed whole. It shows of each token of a chunk in its middle how far its values lie from those that the
chunk has by itself, and how much attention it gets from the text after the chunk. Both are nearly properties of the
chunk: a few such prompts say as much as a look at the request itself. A token's scores are its deviation (squared
distance, each layer divided by its mean over the chunk, averaged over the layers but for the first, whose values come
before any attention) and its attention (alike, over all layers). docs/quality.md has what else was tried.

`LeaningObserver` says which other chunk each recomputed token attends to most at one layer: what it is recomputed for.
A token attends to the keys that the blend leaves in the cache: fresh ones of the tokens that are run, moved ones of the
others. What the prompt begins with draws attention whatever it says (an attention sink), so it counts as no chunk. Keys
before the blend's start aren't known here: shares are of the attention to what comes after.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch

from kvarena.core.plan import Chunk, ReusePlan, Span
from kvarena.core.policy import reused_positions
from kvarena.core.prefilled_model import EndForward, LayerAttention, LayerKV, PrefilledModel
from kvarena.core.report import MAX_TOKEN_SCORES, TokenScores, significant

MIN_CONTEXT_TOKENS = 64
"""Before a chunk and after it, for a prompt to show something of it."""
MAX_WATCHED_TOKENS = 8192
"""A longer prompt isn't scored, and of a longer blend it isn't told what tokens lean on: the keys of all of it are held
beside the cache.
"""
QUERY_STRIDE = 8
"""Of so many tokens one says where it looks; what many look at shows in a sample too."""
_SCORED_ROWS, _LEANING_ROWS = 64, 16
"""So many tokens' products with all keys are made at once."""


def seen_by(positions: torch.Tensor, end: int, window: int | None) -> torch.Tensor:
    """Which of the tokens `[0, end)` those at `positions` `(T,)` attend to: boolean `(T, end)`."""
    own, every = positions[:, None], torch.arange(end, device=positions.device)
    return every <= own if window is None else (every <= own) & (every > own - window)


def attention_weights(
    queries: torch.Tensor, positions: torch.Tensor, keys: torch.Tensor, attention: LayerAttention
) -> torch.Tensor:
    """How much of their attention the tokens at `positions` `(R,)`, with queries `(R, H, D)`, give to each of `keys`
    `(T, H_kv, D)`, which are fp32 and those of the positions `[0, T)`: `(H_kv, H / H_kv, R, T)`.
    """
    grouped = queries.float().unflatten(1, (keys.shape[1], -1))  # (R, H_kv, G, D)
    products = torch.einsum("rkgd,tkd->kgrt", grouped, keys) * attention.scale
    visible = seen_by(positions.to(keys.device), len(keys), attention.window)
    return products.masked_fill_(~visible, -torch.inf).softmax(dim=-1)


class ChunkScorer:
    """Watches the forward of a prompt `[0, end)` whose chunks' KV stood in the cache before.

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
        for rows in (positions % QUERY_STRIDE == 0).nonzero().flatten().split(_SCORED_ROWS):
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
        """The attention `(T,)` that each token of a span gets from those of these tokens that come after the span."""
        weights = attention_weights(queries, positions, keys, self._model.attention[layer])
        ends = self._ends[: len(keys)].to(keys.device)
        from_after = (ends > 0) & (ends <= positions.to(keys.device)[:, None])
        return (weights * from_after).sum(dim=(0, 1, 2)).cpu()


def _relative(by_layer: torch.Tensor) -> torch.Tensor:
    """Each layer `(L, T)` divided by its mean, and then their mean `(T,)`."""
    return (by_layer / by_layer.mean(dim=1, keepdim=True).clamp(min=1e-20)).mean(dim=0)


class LeaningObserver:
    """Watches the forward of the tokens that are run in `[start, end)`, and ends it at `layer`.

    `keys` `(T, H_kv, D)` are the moved ones at that layer, of the spans of `plan` in their order.
    """

    def __init__(
        self, model: PrefilledModel, plan: ReusePlan, keys: Sequence[LayerKV], layer: int, start: int, end: int
    ) -> None:
        self._model, self._layer, self._start = model, layer, start
        self._spans = [span for span in plan if span.start > 0]
        moved = torch.cat([group.keys for group in keys]).float()
        self._keys = moved.new_zeros(end - start, *moved.shape[1:])
        self._keys[(reused_positions(plan) - start).to(moved.device)] = moved
        self._own = torch.full((end - start,), -1)
        for number, span in enumerate(self._spans):
            self._own[span.start - start : span.end - start] = number
        self._positions: list[torch.Tensor] = []
        self._attention: list[torch.Tensor] = []
        self._num_heads = 0

    def observe(self, layer: int, positions: torch.Tensor, queries: torch.Tensor, fresh: LayerKV) -> None:
        """One layer of the tokens at `positions`, which come in order: queries `(T, H, D)`."""
        if layer < self._layer:
            return
        places = positions.cpu() - self._start
        self._keys[places.to(self._keys.device)] = fresh.keys.float()
        self._num_heads = queries.shape[1]
        room = MAX_TOKEN_SCORES - sum(map(len, self._positions))
        in_chunks = (self._own[places] >= 0).nonzero().flatten()[:room]
        for rows in in_chunks.split(_LEANING_ROWS) if len(in_chunks) else ():
            self._positions.append(places[rows] + self._start)
            self._attention.append(self._by_span(queries[rows.to(queries.device)], places[rows]))
        raise EndForward

    def leans_on(self) -> TokenScores:
        """Of each token that attends to another chunk at all: its position, the beginning and the end of the chunk that
        it attends to most, and that chunk's share. Heads of all ranks count.
        """
        attention = torch.cat(self._attention) if self._attention else torch.zeros(0, len(self._spans))
        total, num_heads = self._model.ranks.sum(attention), self._model.ranks.sum(torch.tensor([self._num_heads]))
        found = TokenScores(f"share of its attention, layer {self._layer}", [])
        if not total.numel():
            return found
        shares, numbers = (total / num_heads).max(dim=1)
        for position, share, number in zip(
            torch.cat(self._positions).tolist(), shares.tolist(), numbers.tolist(), strict=True
        ):
            if share > 0:
                span = self._spans[number]
                found.tokens.append((position, span.start, span.end, significant(share)))
        return found

    def _by_span(self, queries: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """The attention `(R, S)` of these tokens to each span but their own, summed over the heads."""
        seen = int(places.max()) + 1
        by_head = attention_weights(queries, places, self._keys[:seen], self._model.attention[self._layer])
        weights = by_head.sum(dim=(0, 1)).cpu()  # (R, T)
        shares = torch.zeros(len(places), len(self._spans) + 1)  # the last is what belongs to no span
        shares.index_add_(1, self._own[:seen] % (len(self._spans) + 1), weights)
        shares[torch.arange(len(places)), self._own[places]] = 0
        return shares[:, :-1]
