"""Where the KV of a plan's chunks comes from during a blend: the store, or what was computed for want of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvarena.reuse.plan import Chunk, Span
from kvarena.reuse.store import Pieces, Retrieval


class Supply:
    """Over one retrieval of these chunks, and no longer than that lasts."""

    def __init__(self, chunks: Sequence[Chunk], retrieval: Retrieval) -> None:
        self._retrieval = retrieval
        self._numbers = {chunk: i for i, chunk in enumerate(chunks) if retrieval.held[i]}
        self._there: dict[Chunk, Pieces] = {}
        self.num_hits = 0

    def __contains__(self, chunk: Chunk) -> bool:
        """Whether there is something to take, unless the store loses it."""
        return chunk in self._numbers or chunk in self._there

    def add(self, chunk: Chunk, kv: torch.Tensor) -> None:
        self._there[chunk] = (kv,)

    def take(self, spans: Sequence[Span]) -> list[tuple[Span, Pieces]]:
        """Those of the spans whose chunks' KV can be had, with it."""
        chunks = [c for c in dict.fromkeys(span.chunk for span in spans) if c in self._numbers and c not in self._there]
        taken = self._retrieval.take([self._numbers[chunk] for chunk in chunks])
        found = {chunk: pieces for chunk, pieces in zip(chunks, taken, strict=True) if pieces is not None}
        self._there |= found
        self.num_hits += len(found)
        return [(span, self._there[span.chunk]) for span in spans if span.chunk in self._there]
