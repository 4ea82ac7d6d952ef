"""Tasks shared between processes: their KV in a `ChunkStore`, and a directory of them in a file.

| what | where | who sees it |
|---|---|---|
| a task's embedding, length, salt, token ids, its KV's digest | the directory, a SQLite file | a machine's processes |
| the KV, `(2, L, T, H_kv * D)` | the store | whom the store serves |

A chunk store gives KV to who can name it; it finds nothing similar. So the directory finds a task, and the digest in
its row names the KV: what comes back is compared with it. KV that is lost, damaged, of another shape, or of other bytes
than the row says is a miss, and the row goes. A store that is down is a miss too, and the row stays. Rows and chunks
carry the format of the tasks, of which the model's identity is a part, and the salt; so nothing is found or fetched
across them. A task is listed once the store has it.

Each side forgets by itself. The directory keeps the `max_tasks` that were added or fetched last, the store goes by its
own budget; KV that is no longer listed is never asked for, and a row without KV is a miss.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from kvarena.engines.sequence_kv import KVShape
from kvarena.reuse.plan import Chunk
from kvarena.reuse.store import ChunkStore, get
from kvarena.simllm.entry import KnownTask, TaskCacheEntry, TopLayerKV, WholeKV
from kvarena.simllm.similarity import most_similar_first
from kvarena.simllm.task_directory import ListedTask, TaskDirectory

MAX_TASKS = 10_000


@dataclass(frozen=True)
class TaskFormat:
    """What the tasks of a model are: those of different formats share nothing.

    `kv_shape` is of the KV that is kept of a task: all layers in mode "aligned", the last one alone in "top_layer".
    """

    model_id: str
    mode: str
    embedding_dim: int
    kv_shape: KVShape

    @property
    def has_all_layers(self) -> bool:
        return self.mode == "aligned"

    @property
    def name(self) -> str:
        shape = self.kv_shape
        sizes = f"{self.embedding_dim}-{shape.num_layers}-{shape.num_kv_heads}-{shape.head_size}-{shape.dtype}"
        return f"{self.model_id}-{self.mode}-{sizes}"

    def is_of(self, kv: torch.Tensor, num_tokens: int) -> bool:
        shape = self.kv_shape
        expected = (2, shape.num_layers, num_tokens, shape.num_kv_heads * shape.head_size)
        return kv.shape == expected and kv.dtype == shape.dtype


@dataclass(frozen=True, eq=False)
class SharedMatch:
    """A task that was found, with its KV, and how similar it is. `whole_kv` is there in mode "aligned"."""

    task: ListedTask
    similarity: float
    top_layer_kv: TopLayerKV
    whole_kv: WholeKV | None


class SharedTasks:
    """Tasks of one format in one store, listed in the file `path`. Thread-safe."""

    def __init__(
        self,
        store: ChunkStore,
        path: str | Path,
        task_format: TaskFormat,
        max_tasks: int = MAX_TASKS,
        num_hyperplanes: int = 16,
    ) -> None:
        self.task_format = task_format
        self._store = store
        self._directory = TaskDirectory(
            Path(path),
            task_format.name,
            task_format.embedding_dim,
            num_hyperplanes,
            max_tasks,
            have_whole_kv=task_format.has_all_layers,
        )
        self._lock = threading.Lock()
        self._num_hits = self._num_lost = 0

    def kv_of(self, entry: TaskCacheEntry) -> torch.Tensor | None:
        """What of a task is shared; None when it doesn't have all layers and they are.

        Raises `ValueError` for KV of another format.
        """
        if not self.task_format.has_all_layers:
            kv = torch.stack([part[0].transpose(0, 1).flatten(1) for part in entry.top_layer_kv])[:, None]
        elif entry.whole_kv is not None:
            kv = entry.whole_kv.kv
        else:
            return None
        if not self.task_format.is_of(kv, entry.num_tokens):
            raise ValueError(f"shared KV must be {self.task_format.name}, not {tuple(kv.shape)} of {kv.dtype}")
        return kv.cpu()

    def add(self, entry: TaskCacheEntry, kv: torch.Tensor) -> None:
        """Share a task and its `kv_of`."""
        digest = _digest(kv)
        task = ListedTask(
            entry.salt,
            entry.task_id,
            entry.task_embedding,
            entry.num_tokens,
            entry.chunk.token_ids if entry.chunk else entry.token_ids,
            digest,
            entry.timestamp,
            self.task_format.has_all_layers,
        )
        if self._store.put(self._chunk(task), kv):
            with self._lock:
                self._directory.add(task)

    def find(
        self, query_embedding: torch.Tensor, above: float, is_usable: Callable[[KnownTask], bool]
    ) -> SharedMatch | None:
        """The most similar usable task above a similarity. One is fetched: if it is lost, none is found."""
        with self._lock:
            listed = self._directory.near(query_embedding)
        found = most_similar_first(query_embedding, listed)
        for task, similarity in found:
            if similarity > above and is_usable(task):
                kv = self._fetch(task)
                return None if kv is None else self._match(task, similarity, kv)
        return None

    def clear(self) -> None:
        """Forget all tasks, for all processes. The store's memory is its own to give back: it may serve others."""
        with self._lock:
            self._directory.clear()
            self._num_hits = self._num_lost = 0

    def close(self) -> None:
        """The store is its owner's to close."""
        with self._lock:
            self._directory.close()

    def get_statistics(self) -> dict[str, int]:
        """`num_shared_lost`: listed tasks whose KV was gone or damaged. `num_store_errors` is the store's own count."""
        with self._lock:
            return {
                "num_shared_tasks": len(self._directory),
                "num_shared_hits": self._num_hits,
                "num_shared_lost": self._num_lost,
                "num_store_errors": self._store.stats.errors,
            }

    def check_integrity(self) -> None:
        """Raises `AssertionError`."""
        with self._lock:
            self._directory.check_integrity()

    def _fetch(self, task: ListedTask) -> torch.Tensor | None:
        num_errors = self._store.stats.errors
        kv = get(self._store, self._chunk(task))
        is_sound = kv is not None and self.task_format.is_of(kv, task.num_tokens) and _digest(kv) == task.digest
        store_failed = kv is None and self._store.stats.errors > num_errors
        with self._lock:
            if is_sound:
                self._directory.touch(task)
                self._num_hits += 1
            elif not store_failed:
                self._directory.remove(task)
                self._num_lost += 1
        return kv if is_sound else None

    def _match(self, task: ListedTask, similarity: float, kv: torch.Tensor) -> SharedMatch:
        shape = self.task_format.kv_shape
        heads = kv[:, -1].view(2, task.num_tokens, shape.num_kv_heads, shape.head_size).transpose(1, 2)
        whole_kv = WholeKV(task.chunk, kv) if task.chunk else None
        return SharedMatch(task, similarity, (heads[:1], heads[1:]), whole_kv)

    def _chunk(self, task: ListedTask) -> Chunk:
        """A name for its KV, made of what it holds; the token ids only say how long it is."""
        salt = f"simllm {self.task_format.name} {task.digest} {task.salt}"
        return Chunk(np.arange(task.num_tokens, dtype=np.int32), salt)


def _digest(kv: torch.Tensor) -> str:
    values = kv.contiguous().flatten().view(torch.uint8).numpy()
    return hashlib.blake2b(values.data, digest_size=16).hexdigest()
