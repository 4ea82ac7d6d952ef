"""The tasks that were processed, and the search for one that is similar to a new one.

Sim-LLM (Luo et al., NeurIPS 2025, appendix C): a task's embedding is hashed, the tasks of its bucket are compared with
it, and the most similar one above a threshold lends its KV. Here buckets that differ in few bits are searched too.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch

from kvarena.reuse.plan import TokenIds
from kvarena.simllm.device import available_device
from kvarena.simllm.entry import LayerKVShape, TaskCacheEntry, TopLayerKV, WholeKV
from kvarena.simllm.lsh import LSHIndex
from kvarena.simllm.params import checked_threshold

ROUNDING = 1e-6
"""What rounding may take from a cosine: an embedding is similar to itself at a threshold of 1."""


@dataclass(frozen=True)
class TaskMatch:
    """A task that was found, and the cosine of the angle between its embedding and the query's."""

    entry: TaskCacheEntry
    similarity: float


class InterTaskKVManager:
    """Keeps at most `max_cache_size` tasks, the least recently used out first. Thread-safe.

    Entries don't change once they are in, and the KV of one that was found stays valid after it is evicted.
    """

    def __init__(
        self,
        embedding_dim: int = 4096,
        max_cache_size: int = 100,
        similarity_threshold: float = 0.8,
        num_hyperplanes: int = 16,
        device: str = "cuda",
    ) -> None:
        if max_cache_size < 1:
            raise ValueError(f"max_cache_size must be at least 1, not {max_cache_size}")
        self.embedding_dim = embedding_dim
        self.max_cache_size = max_cache_size
        self.similarity_threshold = checked_threshold(similarity_threshold)
        self.num_hyperplanes = num_hyperplanes
        self.device = available_device(device)
        self._kv_shape: LayerKVShape | None = None
        self._lock = threading.RLock()
        self.reset()

    def __len__(self) -> int:
        return len(self._entries)

    def expect(self, embedding_dim: int, kv_shape: LayerKVShape) -> None:
        """Tasks are a model's from now on. Raises `ValueError` when its embeddings or its KV don't fit what is kept."""
        with self._lock:
            if embedding_dim != self.embedding_dim:
                raise ValueError(
                    f"the manager's embedding_dim is {self.embedding_dim}; the model's embeddings have {embedding_dim}"
                )
            if self._entries and self._kv_shape != kv_shape:
                raise ValueError(f"the manager keeps tasks whose KV is {self._kv_shape}; the model's is {kv_shape}")
            self._kv_shape = kv_shape

    def search_similar_task(self, query_embedding: torch.Tensor) -> TaskCacheEntry | None:
        """The kept task most similar to an embedding `(E,)`, if it is at least the threshold."""
        match = self.search(query_embedding)
        return match.entry if match else None

    def search(
        self,
        query_embedding: torch.Tensor,
        is_usable: Callable[[TaskCacheEntry], bool] = lambda entry: True,
        similarity_threshold: float | None = None,
    ) -> TaskMatch | None:
        """The most similar task that `is_usable`. Counts a hit or a miss; damaged entries are dropped on the way.

        `similarity_threshold` None is the manager's own. Raises `ValueError` for an embedding of another size, or one
        that isn't finite.
        """
        with self._lock:
            threshold = self.similarity_threshold if similarity_threshold is None else similarity_threshold
            found = self._by_similarity(query_embedding, threshold)
            match = next((match for match in found if self._serves(match.entry, is_usable)), None)
            if match is None:
                self._num_misses += 1
                return None
            self._entries.move_to_end(match.entry.task_id)
            self._num_hits += 1
            return match

    def add_task(
        self,
        task_id: str,
        task_embedding: torch.Tensor,
        top_layer_kv: TopLayerKV,
        whole_kv: WholeKV | None = None,
        salt: str = "",
        token_ids: TokenIds | None = None,
    ) -> None:
        """Keep a copy of a task's KV; a task of the same id is replaced. `token_ids` say later what its prompt was.

        Raises `ValueError` naming what was expected: `(E,)` finite numbers, and KV of the shape of the first task, or
        of the model that the manager was given to.
        """
        with self._lock:
            lsh_hash = self._index.compute_hash(task_embedding)
            shape = self._kv_shape or LayerKVShape.of(top_layer_kv)
            if problem := shape.problem_of(top_layer_kv):
                raise ValueError(f"top_layer_kv {problem}")
            num_tokens = top_layer_kv[0].shape[2]
            if whole_kv and not whole_kv.is_sound(num_tokens):
                raise ValueError(f"whole_kv must be (2, L, {num_tokens}, H_kv * D) and finite")
            self._kv_shape = shape
            self._entries[task_id] = TaskCacheEntry(
                task_id,
                _own_copy(task_embedding, torch.device("cpu")).float(),
                lsh_hash,
                (_own_copy(top_layer_kv[0], self.device), _own_copy(top_layer_kv[1], self.device)),
                time.time(),
                whole_kv and WholeKV(whole_kv.chunk, _own_copy(whole_kv.kv, self.device)),
                salt,
                token_ids,
            )
            self._entries.move_to_end(task_id)
            self._index.add(task_id, task_embedding)
            while len(self._entries) > self.max_cache_size:
                self._drop(next(iter(self._entries)))
                self._num_evictions += 1

    def get_statistics(self) -> dict[str, int | float]:
        """Counts since the manager was made or reset. `num_damaged`: entries that were dropped as unusable."""
        with self._lock:
            num_searches = self._num_hits + self._num_misses
            return {
                "cache_size": len(self._entries),
                "max_cache_size": self.max_cache_size,
                "num_bytes": sum(entry.num_bytes for entry in self._entries.values()),
                "similarity_threshold": self.similarity_threshold,
                "num_searches": num_searches,
                "num_hits": self._num_hits,
                "num_misses": self._num_misses,
                "hit_ratio": self._num_hits / num_searches if num_searches else 0.0,
                "num_evictions": self._num_evictions,
                "num_damaged": self._num_damaged,
            }

    def reset(self) -> None:
        """Forget all tasks and counts; the expected shapes stay."""
        with self._lock:
            self._entries: OrderedDict[str, TaskCacheEntry] = OrderedDict()
            self._index = LSHIndex(self.embedding_dim, self.num_hyperplanes)
            self._num_hits = self._num_misses = self._num_evictions = self._num_damaged = 0

    def generate_task_id(self, input_text: str, salt: str = "") -> str:
        """The same text always gets the same id, so that it is kept once."""
        digest = hashlib.blake2b(input_text.encode("utf-8", "surrogatepass"), digest_size=12, person=b"kvarena-task")
        digest.update(b"\0" + salt.encode())
        return f"task-{digest.hexdigest()}"

    def check_integrity(self) -> None:
        """Compare index and entries. Raises `AssertionError`."""
        with self._lock:
            self._index.check_integrity()
            assert len(self._index) == len(self._entries) <= self.max_cache_size
            for entry in self._entries.values():
                assert self._index.compute_hash(entry.task_embedding) == entry.lsh_hash

    def _by_similarity(self, query_embedding: torch.Tensor, threshold: float) -> list[TaskMatch]:
        """The tasks that are at least as similar as the threshold, the most similar first."""
        found = [self._entries[task_id] for task_id in self._index.neighbours(query_embedding)]
        if not found:
            return []
        query = query_embedding.detach().to("cpu", torch.float32)
        embeddings = torch.stack([entry.task_embedding for entry in found])
        norms = embeddings.norm(dim=1) * query.norm()
        ordered = (embeddings @ query / norms.clamp(min=1e-30)).clamp(-1, 1).sort(descending=True, stable=True)
        return [
            TaskMatch(found[place], similarity)
            for similarity, place in zip(ordered.values.tolist(), ordered.indices.tolist(), strict=True)
            if similarity >= threshold - ROUNDING
        ]

    def _serves(self, entry: TaskCacheEntry, is_usable: Callable[[TaskCacheEntry], bool]) -> bool:
        assert self._kv_shape is not None, "there are no entries before there is a shape"
        if not entry.is_sound(self._kv_shape):
            self._drop(entry.task_id)
            self._num_damaged += 1
            return False
        return is_usable(entry)

    def _drop(self, task_id: str) -> None:
        del self._entries[task_id]
        self._index.remove(task_id)


def _own_copy(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format).to(device)
