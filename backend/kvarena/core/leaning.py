"""Which other chunk each recomputed token attends to most, at one layer: what it is recomputed for.

A token's attention goes to the keys that the blend leaves in the cache: fresh ones of the tokens that are run, moved
ones of the others. What the prompt begins with draws attention whatever it says (an attention sink), so it counts as no
chunk. Keys before the blend's start aren't known here: shares are of the attention to what comes after.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvarena.core.placement import positions_of, seen_by
from kvarena.core.plan import ReusePlan
from kvarena.core.prefilled_model import EndForward, LayerKV, PrefilledModel
from kvarena.core.report import MAX_TOKEN_SCORES, LeansOn

MAX_LEANING_TOKENS = 8192
"""Of a longer blend nothing is told: its keys and the products with them have no place in the engine's memory."""
_QUERY_ROWS = 16


class LeaningObserver:
    """Watches the forward of the tokens that are run in `[start, end)`, piece by piece, and ends it at `layer`.

    `keys` `(T, H_kv, D)` are the moved ones at that layer, of the spans of `plan` in their order.
    """

    def __init__(
        self, model: PrefilledModel, plan: ReusePlan, keys: Sequence[LayerKV], layer: int, start: int, end: int
    ) -> None:
        self._model, self._layer, self._start = model, layer, start
        self._spans = [span for span in plan if span.start > 0]
        moved = torch.cat([group.keys for group in keys]).float()
        self._keys = moved.new_zeros(end - start, *moved.shape[1:])
        self._keys[(positions_of(plan.spans) - start).to(moved.device)] = moved
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
        for rows in in_chunks.split(_QUERY_ROWS) if len(in_chunks) else ():
            self._positions.append(places[rows] + self._start)
            self._attention.append(self._by_span(queries[rows.to(queries.device)], places[rows]))
        raise EndForward

    def leans_on(self) -> LeansOn:
        """Of the tokens that attend to another chunk at all; heads of all ranks count."""
        attention = torch.cat(self._attention) if self._attention else torch.zeros(0, len(self._spans))
        total, num_heads = self._model.ranks.sum(attention), self._model.ranks.sum(torch.tensor([self._num_heads]))
        found = LeansOn(f"share of its attention, layer {self._layer}", [])
        if not total.numel():
            return found
        shares, numbers = (total / num_heads).max(dim=1)
        for position, share, number in zip(
            torch.cat(self._positions).tolist(), shares.tolist(), numbers.tolist(), strict=True
        ):
            if share > 0:
                span = self._spans[number]
                found.tokens.append((position, span.start, span.end, share))
        return found

    def _by_span(self, queries: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """The attention `(R, S)` of these tokens to each span but their own, summed over the heads."""
        attention = self._model.attention[self._layer]
        seen = int(places.max()) + 1
        grouped = queries.float().unflatten(1, (self._keys.shape[1], -1))  # (R, H_kv, G, D)
        products = torch.einsum("rkgd,tkd->kgrt", grouped, self._keys[:seen]) * attention.scale
        visible = seen_by(places.to(self._keys.device), seen, attention.window)
        weights = products.masked_fill_(~visible, -torch.inf).softmax(dim=-1).sum(dim=(0, 1)).cpu()  # (R, T)
        shares = torch.zeros(len(places), len(self._spans) + 1)  # the last is what belongs to no span
        shares.index_add_(1, self._own[:seen] % (len(self._spans) + 1), weights)
        shares[torch.arange(len(places)), self._own[places]] = 0
        return shares[:, :-1]
