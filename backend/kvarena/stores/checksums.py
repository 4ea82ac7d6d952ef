"""A checksum in every piece of KV: what is taken is what was put, whatever happened to memory or disk in between.

A piece is `(2, L, t, H_kv * D)`, and its last row belongs to no token. Its 64-bit words, each times an odd weight of
its place, sum up (mod 2**64) to the piece's name: the first word of that row is chosen so. This reads the piece once,
as fast as memory gives it. It notices every change of one word, words and pieces that changed places, and pieces that
were never written. It is no protection against somebody who forges KV. The same row of the first layer's values has the
scores of the piece's tokens, where a row has room for them: how many prompts showed them, and two bytes for each.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from kvarena.core.plan import Chunk
from kvarena.core.store import Scores

Words = npt.NDArray[np.uint64]


def piece_names(owner: str, chunk: Chunk, piece_tokens: int) -> list[int]:
    """Numbers for a chunk's pieces of so many tokens each: of the owner, the salt, the sink, and all tokens up to the
    piece's end. Chunks that begin alike share pieces, and their names.
    """
    digest = hashlib.blake2b(owner.encode() + b"\0" + chunk.salt.encode(), digest_size=8, person=b"kvarena-piece")
    if len(chunk.sink):
        digest.update(b"\0sink\0" + chunk.sink.tobytes())
    names = []
    for start in range(0, len(chunk), piece_tokens):
        digest.update(chunk.token_ids[start : start + piece_tokens].tobytes())
        names.append(int.from_bytes(digest.digest(), "little"))
    return names


_STEPS, _ZERO = 8, 160
"""A score `s` is kept as `8 log2(s) + 160`: from 1e-6 to 3,000 to within 5 %."""
_HAS_TWO = 128
"""Added to the number of prompts. Entries of earlier versions have it without, and one score for each token."""


def _score_bytes(piece: torch.Tensor) -> torch.Tensor:
    return piece[1, 0, -1].view(torch.uint8)


@dataclass(frozen=True)
class PieceChecksum:
    """For pieces of one shape and dtype. A row has a whole number of 64-bit words."""

    shape: tuple[int, int, int, int]
    dtype: torch.dtype

    def seal(self, piece: torch.Tensor, name: int, scores: Scores | None = None) -> None:
        """Writes the last row of a piece, which may be a view. `scores` are those of its own tokens."""
        row = piece[0, 0, -1].view(torch.int64).numpy().view(np.uint64)
        row[:] = 0
        if self._has_room:
            own = _score_bytes(piece)
            own[:] = 0
        if scores and self._has_room:
            flat = scores.mean.flatten()
            own[0] = _HAS_TWO + scores.num_prompts
            own[1 : len(flat) + 1] = flat.log2().mul(_STEPS).round().add(_ZERO).clamp(0, 255).byte()
        row[0] = (name - self._sum(piece)) % 2**64

    def is_sound(self, piece: torch.Tensor, name: int) -> bool:
        return (tuple(piece.shape), piece.dtype) == (self.shape, self.dtype) and self._sum(piece) == name

    def scores_in(self, piece: torch.Tensor, num_tokens: int) -> Scores | None:
        """Of a sound piece that has so many tokens of a chunk."""
        own = _score_bytes(piece)
        if not self._has_room or own[0] < _HAS_TWO:
            return None
        kept = own[1 : 2 * num_tokens + 1].view(num_tokens, 2)
        return Scores(((kept.float() - _ZERO) / _STEPS).exp2(), int(own[0]) - _HAS_TWO)

    @property
    def _has_room(self) -> bool:
        return self.shape[3] * self.dtype.itemsize >= 2 * self.shape[2] - 1

    def _sum(self, piece: torch.Tensor) -> int:
        words = piece.reshape(-1).view(torch.int64).numpy().view(np.uint64)
        return int(np.einsum("i,i", words, self._weights))

    @cached_property
    def _weights(self) -> Words:
        """The mixing function of SplitMix64, made odd; 1 for the word that is chosen."""
        num_rows, row_words = math.prod(self.shape[:3]), self.shape[3] * self.dtype.itemsize // 8
        mixed = np.arange(1, num_rows * row_words + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        weights = (mixed ^ (mixed >> np.uint64(31))) | np.uint64(1)
        weights[(self.shape[2] - 1) * row_words] = 1
        return weights
