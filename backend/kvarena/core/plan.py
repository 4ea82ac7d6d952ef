"""The reuse plan: where the KV of every token range of a prompt comes from.

Positions are those of the prompt's token ids; ranges are half-open. Ranges that no span covers are computed as usual.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NewType

import numpy as np
import numpy.typing as npt

TokenIds = npt.NDArray[np.int32]
ChunkKey = NewType("ChunkKey", bytes)


def as_token_ids(ids: Sequence[int] | TokenIds) -> TokenIds:
    return np.ascontiguousarray(ids, dtype=np.int32)


NO_SINK = as_token_ids([])


@dataclass(frozen=True, eq=False)
class Chunk:
    """A text's token ids, the salt of its owner, and the sink that its KV is computed after. Equal by key.

    Chunks of different salts never match. `sink` is a short beginning, the same for all chunks of a model: a text that
    is computed after it has no attention sink in its own first tokens, which would spoil it for later text.
    """

    token_ids: TokenIds
    salt: str = ""
    sink: TokenIds = field(default_factory=lambda: NO_SINK)

    @cached_property
    def key(self) -> ChunkKey:
        digest = hashlib.blake2b(self.token_ids.tobytes(), digest_size=16, person=b"kvarena-chunk")
        digest.update(b"\0" + self.salt.encode())
        if len(self.sink):
            digest.update(b"\0sink\0" + self.sink.tobytes())
        return ChunkKey(digest.digest())

    @property
    def after_sink(self) -> TokenIds:
        """The sequence in which its KV is computed."""
        return np.concatenate([self.sink, self.token_ids]) if len(self.sink) else self.token_ids

    def __len__(self) -> int:
        return len(self.token_ids)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Chunk) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


@dataclass(frozen=True)
class Span:
    """`[start, end)` of the prompt is `[offset, offset + end - start)` of `chunk`.

    `follows_sink`: the prompt begins with the chunk's sink, and the chunk comes next.
    """

    start: int
    end: int
    chunk: Chunk
    offset: int = 0
    follows_sink: bool = False

    def __len__(self) -> int:
        return self.end - self.start

    @property
    def is_whole_chunk(self) -> bool:
        return len(self) == len(self.chunk)

    @property
    def is_exact(self) -> bool:
        """Whether its tokens are where they were computed, after the same text."""
        return self.follows_sink if len(self.chunk.sink) else self.start == self.offset == 0

    def clipped(self, start: int, end: int) -> Span | None:
        """The part of this span inside `[start, end)`."""
        low, high = max(self.start, start), min(self.end, end)
        return replace(self, start=low, end=high, offset=self.offset + low - self.start) if low < high else None


@dataclass(frozen=True)
class ReusePlan:
    """Spans of one prompt, in order and without overlap."""

    spans: tuple[Span, ...] = ()

    def __post_init__(self) -> None:
        for left, right in zip(self.spans, self.spans[1:], strict=False):
            assert left.end <= right.start, f"spans overlap: {left.start}-{left.end} and {right.start}-{right.end}"

    def __iter__(self) -> Iterator[Span]:
        return iter(self.spans)

    @property
    def end(self) -> int:
        """Where the last reused token ends; 0 for an empty plan."""
        return self.spans[-1].end if self.spans else 0

    @property
    def num_reused_tokens(self) -> int:
        return sum(len(span) for span in self.spans)

    @property
    def is_prefix(self) -> bool:
        """Whether every reused token keeps its left context and place, so that reuse is exact."""
        return not self.inexact.spans

    @property
    def inexact(self) -> ReusePlan:
        """The spans whose tokens were computed after other text than stands before them here."""
        return ReusePlan(tuple(span for span in self.spans if not span.is_exact))

    def clipped(self, start: int, end: int) -> ReusePlan:
        """The plan for `[start, end)` only."""
        return ReusePlan(tuple(part for span in self.spans if (part := span.clipped(start, end))))

    def gaps(self, start: int, end: int) -> list[tuple[int, int]]:
        """The ranges of `[start, end)` that no span covers."""
        edges = [
            start,
            *(edge for span in self.clipped(start, end) for edge in (span.start, span.end)),
            end,
        ]
        return [(low, high) for low, high in zip(edges[::2], edges[1::2], strict=True) if low < high]
