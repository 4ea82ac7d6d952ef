"""Known chunks, and where they stand in a prompt: rolling hash over fixed windows, then the longest match both ways.

The idea is rsync's (Tridgell and Mackerras 1996): a known chunk is indexed by the hash of its windows at multiples of
`window`; a prompt is hashed at every position, so a chunk is found wherever it stands and whatever surrounds it. A
hash hit only nominates: tokens are always compared. Not here: boundaries given by the client (`planner`).
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from kvarena.reuse.plan import Chunk, ChunkKey, Span, TokenIds

_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_MIX = np.uint64(0xBF58476D1CE4E5B9)


class ChunkIndex:
    """The known chunks of every salt, bounded by their number of tokens; the least recently used one goes first.

    Not thread-safe: it belongs to one scheduler.
    """

    def __init__(self, *, window: int = 16, max_tokens: int = 4_000_000, max_candidates: int = 16) -> None:
        self.window = window
        self.max_tokens = max_tokens
        self.max_candidates = max_candidates
        self.num_tokens = 0
        self._chunks: OrderedDict[ChunkKey, Chunk] = OrderedDict()
        self._windows: dict[str, dict[int, list[tuple[ChunkKey, int]]]] = defaultdict(dict)

    def __len__(self) -> int:
        return len(self._chunks)

    def __iter__(self) -> Iterator[Chunk]:
        return iter(self._chunks.values())

    def __contains__(self, chunk: Chunk) -> bool:
        return chunk.key in self._chunks

    def touch(self, chunk: Chunk) -> bool:
        """Whether the chunk is known; it then counts as just used."""
        if chunk.key not in self._chunks:
            return False
        self._chunks.move_to_end(chunk.key)
        return True

    def add(self, chunk: Chunk) -> list[Chunk]:
        """Make a chunk known. Returns the chunks that had to go for it. One larger than the bound isn't taken."""
        if self.touch(chunk) or not 0 < len(chunk) <= self.max_tokens:
            return []
        self._chunks[chunk.key] = chunk
        self.num_tokens += len(chunk)
        windows = self._windows[chunk.salt]
        for offset, value in self._chunk_windows(chunk):
            windows.setdefault(value, []).append((chunk.key, offset))
        dropped = []
        while self.num_tokens > self.max_tokens:
            dropped.append(next(iter(self._chunks.values())))
            self.remove(dropped[-1])
        return dropped

    def remove(self, chunk: Chunk) -> None:
        if self._chunks.pop(chunk.key, None) is None:
            return
        self.num_tokens -= len(chunk)
        windows = self._windows[chunk.salt]
        for offset, value in self._chunk_windows(chunk):
            windows[value].remove((chunk.key, offset))
            if not windows[value]:
                del windows[value]
        if not windows:
            del self._windows[chunk.salt]

    def match(self, token_ids: TokenIds, salt: str = "", *, min_tokens: int = 32) -> list[Span]:
        """Known chunks of `salt` in the prompt, left to right and without overlap.

        A match shorter than `min_tokens` counts only when it is a whole chunk.
        """
        spans: list[Span] = []
        end = 0
        for position in self._hit_positions(token_ids, salt):
            if position < end:
                continue
            span = self._longest_match(token_ids, salt, int(position), end, min_tokens)
            if span:
                self._chunks.move_to_end(span.chunk.key)
                spans.append(span)
                end = span.end
        return spans

    def check_integrity(self) -> None:
        """Compare every derived figure with the chunks themselves. Raises `AssertionError`."""
        assert self.num_tokens == sum(map(len, self._chunks.values())) <= self.max_tokens
        expected = sorted(
            (chunk.salt, value, key, offset)
            for key, chunk in self._chunks.items()
            for offset, value in self._chunk_windows(chunk)
        )
        found = sorted(
            (salt, value, key, offset)
            for salt, windows in self._windows.items()
            for value, places in windows.items()
            for key, offset in places
        )
        assert expected == found, "windows and chunks disagree"

    def _chunk_windows(self, chunk: Chunk) -> list[tuple[int, int]]:
        hashes = window_hashes(chunk.token_ids, self.window)
        return [(offset, int(hashes[offset])) for offset in range(0, len(hashes), self.window)]

    def _hit_positions(self, token_ids: TokenIds, salt: str) -> npt.NDArray[np.int64]:
        windows = self._windows.get(salt)
        hashes = window_hashes(token_ids, self.window)
        if not windows or not len(hashes):
            return np.empty(0, np.int64)
        return np.flatnonzero(np.fromiter((value in windows for value in hashes.tolist()), bool, len(hashes)))

    def _longest_match(self, token_ids: TokenIds, salt: str, position: int, low: int, min_tokens: int) -> Span | None:
        value = int(window_hashes(token_ids[position : position + self.window], self.window)[0])
        best: Span | None = None
        for key, offset in self._windows[salt][value][-self.max_candidates :]:
            span = _extend(token_ids, self._chunks[key], position, offset, low, self.window)
            counts = span and (len(span) >= min_tokens or span.is_whole_chunk)
            if span and counts and (best is None or len(span) > len(best)):
                best = span
        return best


def window_hashes(token_ids: TokenIds, window: int) -> npt.NDArray[np.uint64]:
    """A polynomial hash modulo 2^64 of every window of `window` tokens; empty for a shorter text."""
    count = len(token_ids) - window + 1
    if count <= 0:
        return np.empty(0, np.uint64)
    mixed = (token_ids.astype(np.uint64) + np.uint64(1)) * _MIX
    mixed ^= mixed >> np.uint64(29)
    hashes = np.zeros(count, np.uint64)
    for i in range(window):
        hashes = hashes * _MULTIPLIER + mixed[i : i + count]
    return hashes


def _extend(token_ids: TokenIds, chunk: Chunk, position: int, offset: int, low: int, window: int) -> Span | None:
    """The longest run around a hit in which prompt and chunk agree, not reaching below `low`; None if they don't."""
    ids = chunk.token_ids
    if not np.array_equal(token_ids[position : position + window], ids[offset : offset + window]):
        return None
    back = min(position - low, offset)
    before = token_ids[position - back : position] != ids[offset - back : offset]
    start = position - (int(np.argmax(before[::-1])) if before.any() else back)
    ahead = min(len(token_ids) - position, len(ids) - offset)
    after = token_ids[position : position + ahead] != ids[offset : offset + ahead]
    end = position + (int(np.argmax(after)) if after.any() else ahead)
    return Span(start, end, chunk, offset - (position - start))
