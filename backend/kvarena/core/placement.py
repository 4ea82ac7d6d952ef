"""A chunk's KV into its place in a prompt: from the store or just computed, keys rotated by the distance, written.

A layer of several spans at a time, straight from where the KV lies. Not here: what a store is (`store`), and which
tokens are recomputed afterwards (`policy`, `blend`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from kvarena.core.plan import Chunk, Span
from kvarena.core.prefilled_model import LayerKV, PrefilledModel
from kvarena.core.rope import Rerotation, Rotation
from kvarena.core.stopwatch import Stopwatch
from kvarena.core.store import Pieces, Retrieval


class ChunkSource:
    """Over one retrieval of these chunks, and no longer than that lasts."""

    def __init__(self, chunks: Sequence[Chunk], retrieval: Retrieval) -> None:
        self._retrieval = retrieval
        self._indices = {chunk: i for i, chunk in enumerate(chunks) if retrieval.held[i]}
        self._kv: dict[Chunk, Pieces] = {}
        self.num_hits = 0

    def __contains__(self, chunk: Chunk) -> bool:
        """Whether there is something to take, unless the store loses it."""
        return chunk in self._indices or chunk in self._kv

    def add(self, chunk: Chunk, kv: torch.Tensor) -> None:
        self._kv[chunk] = (kv,)

    def take(self, spans: Sequence[Span]) -> list[tuple[Span, Pieces]]:
        """Those of the spans whose chunks' KV can be had, with it."""
        chunks = [c for c in dict.fromkeys(span.chunk for span in spans) if c in self._indices and c not in self._kv]
        taken = self._retrieval.take([self._indices[chunk] for chunk in chunks])
        found = {chunk: pieces for chunk, pieces in zip(chunks, taken, strict=True) if pieces is not None}
        self._kv |= found
        self.num_hits += len(found)
        return [(span, self._kv[span.chunk]) for span in spans if span.chunk in self._kv]


GROUP_TOKENS = 1024
"""So many tokens are moved together: a layer's fit the processor's cache, and calls cost little beside the copies."""


@dataclass
class KVWriter:
    """Writes chunks' KV into a model's cache, straight from where it lies.

    `watched`: layers whose KV, as written, is kept in `kept`, group after group.
    """

    model: PrefilledModel
    watched: Sequence[int]
    stopwatch: Stopwatch
    kept: dict[int, list[LayerKV]] = field(default_factory=dict)

    def write(self, group: Sequence[tuple[Span, Pieces]]) -> None:
        """Spans with their chunks' KV. Raises `ValueError` for a chunk whose KV doesn't reach to the span's end."""
        pieces = [piece for span, kv in group for piece in part_of(kv, span.offset, len(span))]
        spans = [span for span, _ in group]
        positions, rerotations = positions_of(spans), self._rerotations(spans)
        with self.stopwatch.timed("move_ms"):
            # Unbound all at once: indexing a layer at a time costs far more.
            keys_and_values = [[piece[which].unbind() for piece in pieces] for which in (0, 1)]
        for layer, rotation in enumerate(self.model.rotations):
            with self.stopwatch.timed("move_ms"):
                kv = LayerKV(*(self._joined([layers[layer] for layers in own]) for own in keys_and_values))
                if rotation and rerotations:
                    rerotations[rotation].apply_(kv.keys)
            with self.stopwatch.timed("write_ms"):
                self.model.write(layer, positions, *kv)
            if layer in self.watched:
                self.kept.setdefault(layer, []).append(kv)

    def _rerotations(self, spans: Sequence[Span]) -> dict[Rotation, Rerotation]:
        """Empty where nothing moves."""
        here = torch.cat([torch.arange(span.offset, span.offset + len(span)) for span in spans])
        there = positions_of(spans)
        if torch.equal(here, there):
            return {}
        here, there = here.to(self.model.device), there.to(self.model.device)
        return {rotation: rotation.between(here, there) for rotation in set(self.model.rotations) if rotation}

    def _joined(self, pieces: list[torch.Tensor]) -> torch.Tensor:
        """Keys or values `(t, H_kv * D)` of one layer as `(T, H_kv, D)`: a copy, on the model's device."""
        flat = torch.cat(pieces)
        return flat.to(self.model.device).view(len(flat), -1, self.model.head_size)


def positions_of(spans: Sequence[Span]) -> torch.Tensor:
    return torch.cat([torch.arange(span.start, span.end) for span in spans])


def part_of(kv: Pieces, start: int, num_tokens: int) -> Iterator[torch.Tensor]:
    """`[start, start + num_tokens)` of a chunk's KV, cut where that is cut."""
    end = start + num_tokens
    at = 0
    for piece in kv:
        low, high = max(start - at, 0), min(end - at, piece.shape[2])
        if low < high:
            yield piece[:, :, low:high]
        at += piece.shape[2]
    if at < end:
        raise ValueError(f"a chunk's KV has {at} tokens, not the {end} that are asked for")


def groups_of(spans: Sequence[Span]) -> Iterator[list[Span]]:
    """Spans in order, `GROUP_TOKENS` of them or somewhat more at a time."""
    group: list[Span] = []
    for span in spans:
        group.append(span)
        if sum(map(len, group)) >= GROUP_TOKENS:
            yield group
            group = []
    if group:
        yield group
