"""Brings a chunk's KV to its place in a prompt: taken from the store or just computed, keys rotated, and written.

Several spans go together, straight from where their KV lies. Not here: what a store is (`store`), and which tokens are
recomputed afterwards (`policy`, `blend`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from kvarena.core.devices import to_host
from kvarena.core.plan import Chunk, Span
from kvarena.core.policy import reused_positions
from kvarena.core.prefilled_model import LayerKV, PrefilledModel
from kvarena.core.report import Stopwatch
from kvarena.core.rope import Rerotation, Rotation, Scratch
from kvarena.core.store import Piece, Pieces, Retrieval, StoreMiss

Item = TypeVar("Item")
MAX_DEVICE_BYTES = 256 << 20


class ChunkSource:
    """Where the KV of these chunks comes from: one retrieval of a store, while it lasts, and what was computed."""

    def __init__(self, chunks: Sequence[Chunk], retrieval: Retrieval) -> None:
        self._retrieval = retrieval
        self._indices = {chunk: i for i, chunk in enumerate(chunks) if retrieval.held[i]}
        self._kv: dict[Chunk, Pieces] = {}
        self.added: set[Chunk] = set()
        self.scores: dict[Chunk, torch.Tensor] = {}
        self.num_hits = 0
        self._device_bytes = 0

    def __contains__(self, chunk: Chunk) -> bool:
        """Whether there is something to take, unless the store loses it."""
        return chunk in self._indices or chunk in self._kv

    def add(self, chunk: Chunk, kv: torch.Tensor) -> torch.Tensor:
        """Take KV that was computed, and return it as it is kept: after `MAX_DEVICE_BYTES` in main memory, for a device
        has little to spare, and the store wants it there anyway.
        """
        if kv.device.type != "cpu":
            self._device_bytes += kv.nbytes
            kv = to_host(kv) if self._device_bytes > MAX_DEVICE_BYTES else kv
        self._kv[chunk] = (Piece.whole(kv),)
        self.added.add(chunk)
        return kv

    def missing(self, chunk: Chunk) -> StoreMiss | None:
        """Why the store gave nothing of a chunk; None if it did. To be asked after everything was taken."""
        if chunk in self._kv and chunk not in self.added:
            return None
        return "store_down" if chunk in self._indices or self._retrieval.failed else "not_stored"

    def scores_of(self, chunk: Chunk) -> torch.Tensor | None:
        """The stored scores of a chunk whose KV isn't used."""
        if chunk not in self._indices or self._retrieval.take([self._indices[chunk]])[0] is None:
            return None
        return self._retrieval.scores(self._indices[chunk])

    def take(self, spans: Sequence[Span]) -> list[tuple[Span, Pieces]]:
        """The spans whose chunks' KV is there, each with it."""
        chunks = [c for c in dict.fromkeys(span.chunk for span in spans) if c in self._indices and c not in self._kv]
        taken = self._retrieval.take([self._indices[chunk] for chunk in chunks])
        found = {chunk: pieces for chunk, pieces in zip(chunks, taken, strict=True) if pieces is not None}
        self._kv |= found
        all_scores = {chunk: self._retrieval.scores(self._indices[chunk]) for chunk in found}
        self.scores |= {chunk: scores for chunk, scores in all_scores.items() if scores is not None}
        self.num_hits += len(found)
        return [(span, self._kv[span.chunk]) for span in spans if span.chunk in self._kv]


GROUP_TOKENS = 256
"""So many tokens are moved together, in all layers: few calls, and no more memory than the allocator has at hand."""


@dataclass
class KVWriter:
    """Writes chunks' KV into a model's cache, straight from where it lies.

    `watched`: layers whose KV, as written, is kept in `kept`, group after group.
    """

    model: PrefilledModel
    watched: Sequence[int]
    stopwatch: Stopwatch
    kept: dict[int, list[LayerKV]] = field(default_factory=dict)
    _scratch: Scratch = field(default_factory=Scratch)

    def write(self, group: Sequence[tuple[Span, Pieces]]) -> None:
        """Spans with their chunks' KV. Raises `ValueError` for a chunk whose KV doesn't reach to the span's end."""
        spans = [span for span, _ in group]
        with self.stopwatch.timed("move_ms"):
            # All layers at once, each piece by itself to the model's device: some may have been computed there. Cut
            # there: a part of a piece isn't contiguous, and would be copied into memory that isn't pinned first.
            here = [
                piece.kv.to(self.model.device, non_blocking=True)[:, :, part]
                for span, pieces in group
                for piece, part in parts_of(pieces, span.offset, len(span))
            ]
            positions, rerotations = reused_positions(spans), self._rerotations(spans)
            moved = None
            if self.model.rotate_and_write is not None:
                self.model.rotate_and_write(positions, here, rerotations)
            else:
                moved = self._moved(here, self.model.rotations, rerotations)
        if moved is not None:
            with self.stopwatch.timed("write_ms"):
                self.model.write(positions, moved.keys, moved.values)
        for layer in self.watched:
            if moved is None:
                own = self._moved([part[:, layer, None] for part in here], [self.model.rotations[layer]], rerotations)
                keys, values = own.keys[0], own.values[0]
            else:
                keys, values = moved.keys[layer], moved.values[layer]
            self.kept.setdefault(layer, []).append(LayerKV(keys.clone(), values.clone()))

    def finish(self) -> None:
        """Return when the KV is no longer read from where it lies. Copies to a device run beside everything else."""
        with self.stopwatch.timed("move_ms", until=self.model.wait):
            pass

    def _moved(
        self,
        parts: list[torch.Tensor],
        rotations: Sequence[Rotation | None],
        rerotations: Mapping[Rotation, Rerotation],
    ) -> LayerKV:
        """Keys and values `(L, T, H_kv, D)` of layers with these rotations, in memory that the next call reuses."""
        shape = (2, len(rotations), sum(part.shape[2] for part in parts), parts[0].shape[3])
        joined = torch.cat(parts, dim=2, out=self._scratch.empty("joined", shape, parts[0].dtype, self.model.device))
        keys, values = joined.unflatten(3, (-1, self.model.head_size)).unbind()
        for rotation, layers in itertools.groupby(range(len(rotations)), rotations.__getitem__):
            first, *others = layers  # those in a row that have the same
            if rotation and rotation in rerotations:
                rerotations[rotation].apply_(keys[first : first + 1 + len(others)], self._scratch)
        return LayerKV(keys, values)

    def _rerotations(self, spans: Sequence[Span]) -> dict[Rotation, Rerotation]:
        """Empty where nothing moves."""
        here = torch.cat([torch.arange(len(span)) + len(span.chunk.sink) + span.offset for span in spans])
        there = reused_positions(spans)
        if torch.equal(here, there):
            return {}
        here, there = (positions.to(self.model.device, non_blocking=True) for positions in (here, there))
        return {rotation: rotation.between(here, there) for rotation in set(self.model.rotations) if rotation}


def parts_of(pieces: Pieces, start: int, num_tokens: int) -> Iterator[tuple[Piece, slice]]:
    """`[start, start + num_tokens)` of a chunk's KV: each piece that has some of it, and which of its tokens."""
    end = start + num_tokens
    at = 0
    for piece in pieces:
        low, high = max(start - at, 0), min(end - at, piece.num_tokens)
        if low < high:
            yield piece, slice(low, high)
        at += piece.num_tokens
    if at < end:
        raise ValueError(f"a chunk's KV has {at} tokens, not the {end} that are asked for")


def packed(items: Iterable[Item], size: Callable[[Item], int], room: int) -> Iterator[list[Item]]:
    """Items in order, as many at a time as have `room` together; a larger one by itself."""
    group: list[Item] = []
    for item in items:
        if group and sum(map(size, group)) + size(item) > room:
            yield group
            group = []
        group.append(item)
    if group:
        yield group


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
