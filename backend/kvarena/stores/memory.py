"""Chunk KV in this process's memory."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from kvarena.core.devices import to_host
from kvarena.core.plan import Chunk, ChunkKey, TokenIds
from kvarena.core.store import FoundKV, Scores, StoreStats


class MemoryStore:
    """Chunk KV in main memory, least recently used out first, never more than `budget_bytes`. Thread-safe."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.num_bytes = 0
        self.stats = StoreStats()
        self._entries: OrderedDict[ChunkKey, tuple[TokenIds, torch.Tensor]] = OrderedDict()
        self._scores: dict[ChunkKey, Scores] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    @contextmanager
    def retrieval(self, chunks: Sequence[Chunk]) -> Iterator[FoundKV]:
        with self._lock:
            all_scores = [self._scores.get(chunk.key) for chunk in chunks]
            found = FoundKV([self._get(chunk) for chunk in chunks], all_scores=all_scores)
        yield found

    def put(self, chunk: Chunk, kv: torch.Tensor) -> bool:
        """Into main memory, wherever the KV is: a device has little of its own."""
        kv = to_host(kv)
        with self._lock:
            self._drop(chunk.key)
            if kv.nbytes > self.budget_bytes:
                return False
            self._entries[chunk.key] = (chunk.token_ids, kv)
            self.num_bytes += kv.nbytes
            while self.num_bytes > self.budget_bytes:
                self._drop(next(iter(self._entries)))
                self.stats.evictions += 1
            self.stats.puts += 1
            self._note_sizes()
            return True

    def add_scores(self, chunk: Chunk, scores: torch.Tensor) -> bool:
        with self._lock:
            if chunk.key not in self._entries:
                return False
            self._scores[chunk.key] = Scores.with_one_more(self._scores.get(chunk.key), scores)
            return True

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()
            self._scores.clear()
            self.num_bytes = 0
            self._note_sizes()

    def close(self) -> None:
        self.clear()

    def check_integrity(self) -> None:
        """Compare every derived figure with the entries themselves. Raises `AssertionError`."""
        with self._lock:
            assert self.num_bytes == sum(kv.nbytes for _, kv in self._entries.values()) <= self.budget_bytes
            assert self._scores.keys() <= self._entries.keys()
            for key, (token_ids, kv) in self._entries.items():
                assert kv.shape[2] == len(token_ids), f"entry {key.hex()} has {kv.shape[2]} of {len(token_ids)} tokens"

    def _note_sizes(self) -> None:
        self.stats.num_entries, self.stats.num_bytes = len(self._entries), self.num_bytes

    def _get(self, chunk: Chunk) -> torch.Tensor | None:
        entry = self._entries.get(chunk.key)
        if entry is None or not np.array_equal(entry[0], chunk.token_ids):
            self.stats.misses += 1
            return None
        self._entries.move_to_end(chunk.key)
        self.stats.hits += 1
        return entry[1]

    def _drop(self, key: ChunkKey) -> None:
        entry = self._entries.pop(key, None)
        self._scores.pop(key, None)
        if entry:
            self.num_bytes -= entry[1].nbytes
