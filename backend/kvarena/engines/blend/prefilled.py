"""One prompt in a Hugging Face model: the blend's forwards are the model's own, over the memory of its `SequenceKV`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, suppress

import torch

from kvarena.engines import attention
from kvarena.engines.blend.blendable import BlendableModel
from kvarena.engines.blend.narrowed_layer import NarrowedLayer
from kvarena.engines.blend.prompt_cache import KVKnown, PromptCache
from kvarena.engines.sequence_kv import SequenceKV
from kvarena.reuse.plan import TokenIds
from kvarena.reuse.prefilled import Narrowing
from kvarena.reuse.ranks import OneRank, Ranks


class QueriesKnown(Exception):
    """Ends a forward pass on purpose."""


class HFPrefilledModel:
    """Implements `kvarena.reuse.prefilled.PrefilledModel`. To be used in the model's thread.

    From the start `kv` counts as filled up to `len(token_ids)`; what it didn't hold is for the caller to fill.
    """

    def __init__(self, engine: BlendableModel, token_ids: TokenIds, kv: SequenceKV) -> None:
        kv.extend(len(token_ids) - kv.length)
        shape = engine.model.kv_shape
        self.rotations = engine.rotations
        self.head_size = shape.head_size
        self.device = shape.device
        self.ranks: Ranks = OneRank()
        self._engine = engine
        self._token_ids = token_ids
        self._cache = PromptCache(kv.filled(0, len(token_ids)))

    def prefill_alone(self, texts: Sequence[TokenIds]) -> list[torch.Tensor | None]:
        return [self._prefill_one_alone(text) for text in texts]

    def write(self, layer: int, positions: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        where = positions.to(self.device)
        own = self._cache.memory[layer]  # (2, H_kv, T, D)
        own[0].index_copy_(1, where, keys.transpose(0, 1))
        own[1].index_copy_(1, where, values.transpose(0, 1))

    def forward(self, positions: torch.Tensor, narrowings: Sequence[Narrowing] = ()) -> torch.Tensor:
        pieces = self._pieces(positions)
        if narrowings and self._engine.has_several_rotations:
            pieces = [positions]
        num_pieces, kept = len(pieces), positions
        with ExitStack() as stack:
            narrowed = []
            for narrowing in narrowings:
                layer = NarrowedLayer(self._engine.layers, narrowing, self._cache, num_pieces)
                narrowed.append(stack.enter_context(layer))
                num_pieces = 1
            for piece in pieces:
                self._run(piece)
            if narrowed:
                kept = narrowed[-1].kept
        return kept

    def queries(self, positions: torch.Tensor, layer: int) -> torch.Tensor:
        found: list[torch.Tensor] = []

        def keep(number: int, queries: torch.Tensor) -> None:
            if number == layer:
                found.append(queries[0].transpose(0, 1))
                raise QueriesKnown

        self._cache.ends_with_last_keys = False
        try:
            with attention.reading_queries(self._engine.model.module, keep):
                for piece in self._pieces(positions):
                    with suppress(QueriesKnown):
                        self._run(piece)
        finally:
            self._cache.ends_with_last_keys = True
        return torch.cat(found)

    def _pieces(self, positions: torch.Tensor) -> Sequence[torch.Tensor]:
        return torch.split(positions, self._engine.model.piece_tokens)

    def _prefill_one_alone(self, text: TokenIds) -> torch.Tensor:
        kv = SequenceKV(self._engine.model.kv_shape, len(text))
        HFPrefilledModel(self._engine, text, kv).forward(torch.arange(len(text)))
        return kv.filled(0, len(text)).permute(1, 0, 3, 2, 4).flatten(3)  # (2, L, T, H_kv * D)

    def _run(self, positions: torch.Tensor) -> None:
        """Runs these tokens until their KV is complete: behind the last layer's keys nothing is needed."""
        self._cache.go_on_with(positions.to(self.device))
        with suppress(KVKnown):
            self._engine.model.forward(
                self._token_ids[positions.numpy()].tolist(),
                position_ids=self._cache.positions[None],
                attention_mask=self._cache.mask,
                past_key_values=self._cache,
                use_cache=True,
            )
