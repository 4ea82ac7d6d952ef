"""Tasks shared between processes: their KV in a `ChunkStore`, and a directory of them in a file.

| what | where | who sees it |
|---|---|---|
| a task's embedding, length, salt, token ids, its KV's digest | the directory, a SQLite file | a machine's processes |
| the KV, `(2, L, T, H_kv * D)` | the store | whom the store serves |

A chunk store gives KV to who can name it; it finds nothing similar. So the directory finds a task, and the digest in
its row names the KV: what comes back is compared with it. KV that is lost, damaged, of another shape, or of other
bytes than the row says is a miss, and the row goes. A store that is down is a miss too, and the row stays. Rows and
chunks carry the format of the tasks, of which the model's identity is a part, and the salt; so nothing is found or
fetched across them. A task is listed once the store has it.

Rows are numbered upwards, and a task that was used gets a new number, so that the lowest are the least recently used,
for every process alike. A process reads what was added since it last looked, and keeps only hashes; the rows it
compares with are read again each time, so that one that another process has removed isn't found any more. Each side
forgets by itself: the directory keeps the `max_tasks` that were added or fetched last, the store goes by its own
budget.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from kvarena.contenders.simllm.similarity import LSHIndex, most_similar_first
from kvarena.contenders.simllm.task import KnownTask, TaskCacheEntry, TopLayerKV, WholeKV
from kvarena.core.plan import Chunk, TokenIds
from kvarena.core.store import ChunkStore, get
from kvarena.engines.hf.sequence_kv import KVShape
from kvarena.stores.sqlite import SharedFile

_SCHEMA = """CREATE TABLE IF NOT EXISTS tasks (
    number INTEGER PRIMARY KEY AUTOINCREMENT, model TEXT NOT NULL, salt TEXT NOT NULL, task_id TEXT NOT NULL,
    embedding BLOB NOT NULL, num_tokens INTEGER NOT NULL, token_ids BLOB, digest TEXT NOT NULL, added_at REAL NOT NULL,
    UNIQUE (model, salt, task_id));
CREATE INDEX IF NOT EXISTS tasks_by_number ON tasks (model, number);"""
_COLUMNS = "salt, task_id, embedding, num_tokens, token_ids, digest, added_at"
_NAMED = "WHERE model = ? AND salt = ? AND task_id = ?"
_READ_AT_ONCE = 1000
_MAX_COMPARED = 32
MAX_TASKS = 10_000


@dataclass(frozen=True, eq=False)
class ListedTask:
    """A row. `task_embedding` is `(E,)`, fp32, on the CPU; `digest` is that of the KV's bytes.

    `has_whole_kv`: that KV is of all layers.
    """

    salt: str
    task_id: str
    task_embedding: torch.Tensor
    num_tokens: int
    token_ids: TokenIds | None
    digest: str
    timestamp: float
    has_whole_kv: bool

    @cached_property
    def chunk(self) -> Chunk | None:
        return Chunk(self.token_ids) if self.has_whole_kv and self.token_ids is not None else None


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


class SharedTasks:
    """Tasks of one format in one store, listed in the file `path`: at most `max_tasks`, the least recently used out
    first. Thread-safe. A damaged row is as one that isn't there; a file that fails leaves an empty directory.
    """

    def __init__(
        self,
        store: ChunkStore,
        path: str | Path,
        task_format: TaskFormat,
        max_tasks: int = MAX_TASKS,
        num_hyperplanes: int = 16,
    ) -> None:
        if max_tasks < 1:
            raise ValueError(f"max_tasks must be at least 1, not {max_tasks}")
        self.task_format = task_format
        self.max_tasks = max_tasks
        self._store = store
        self._file = SharedFile(Path(path), _SCHEMA, "shared tasks")
        self._index = LSHIndex(task_format.embedding_dim, num_hyperplanes)
        self._names: dict[str, tuple[str, str]] = {}  # of the rows by their numbers, upwards
        self._numbers: dict[tuple[str, str], str] = {}
        self._last_number = 0
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
        """Share a task and its `kv_of`. One of the same id and salt is replaced."""
        digest, ids = _digest(kv), entry.chunk.token_ids if entry.chunk else entry.token_ids
        if not self._store.put(self._chunk(entry, digest), kv):
            return
        embedding, token_ids = entry.task_embedding.numpy().tobytes(), None if ids is None else ids.tobytes()
        row = (entry.salt, entry.task_id, embedding, entry.num_tokens, token_ids, digest, entry.timestamp)
        model = self.task_format.name
        with self._lock:
            self._file.write(
                f"INSERT OR REPLACE INTO tasks (model, {_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)", [(model, *row)]
            )
            self._file.write(
                "DELETE FROM tasks WHERE model = ? AND number <= "
                "(SELECT number FROM tasks WHERE model = ? ORDER BY number DESC LIMIT 1 OFFSET ?)",
                [(model, model, self.max_tasks)],
            )
            self._read_added()

    def find(
        self, query_embedding: torch.Tensor, above: float, is_usable: Callable[[KnownTask], bool]
    ) -> tuple[ListedTask, float, TopLayerKV, WholeKV | None] | None:
        """The most similar usable task above a similarity, how similar it is, and its KV, that of all layers in mode
        "aligned". One is fetched: if it is lost, none is found.
        """
        with self._lock:
            listed = self._near(query_embedding)
        for task, similarity in most_similar_first(query_embedding, listed):
            if similarity > above and is_usable(task):
                if (kv := self._fetch(task)) is None:
                    return None
                shape = self.task_format.kv_shape
                heads = kv[:, -1].view(2, task.num_tokens, shape.num_kv_heads, shape.head_size).transpose(1, 2)
                return task, similarity, (heads[:1], heads[1:]), WholeKV(task.chunk, kv) if task.chunk else None
        return None

    def clear(self) -> None:
        """Forget all tasks, for all processes. The store's memory is its own to give back: it may serve others."""
        with self._lock:
            self._file.write("DELETE FROM tasks WHERE model = ?", [(self.task_format.name,)])
            for number in list(self._names):
                self._forget(number)
            self._num_hits = self._num_lost = 0

    def close(self) -> None:
        """The store is its owner's to close."""
        with self._lock:
            self._file.close()

    def get_statistics(self) -> dict[str, int]:
        """`num_shared_lost`: listed tasks whose KV was gone or damaged. `num_store_errors` is the store's own count."""
        with self._lock:
            return {
                "num_shared_tasks": len(self._names),
                "num_shared_hits": self._num_hits,
                "num_shared_lost": self._num_lost,
                "num_store_errors": self._store.stats.errors,
            }

    def check_integrity(self) -> None:
        """Compare index, names and numbers. Raises `AssertionError`."""
        with self._lock:
            self._index.check_integrity()
            assert len(self._index) == len(self._names) <= self.max_tasks
            assert {name: number for number, name in self._names.items()} == self._numbers
            numbers = [int(number) for number in self._names]
            assert numbers == sorted(numbers)
            assert not numbers or numbers[-1] <= self._last_number

    def _fetch(self, task: ListedTask) -> torch.Tensor | None:
        num_errors = self._store.stats.errors
        kv = get(self._store, self._chunk(task, task.digest))
        is_sound = kv is not None and self.task_format.is_of(kv, task.num_tokens) and _digest(kv) == task.digest
        store_failed = kv is None and self._store.stats.errors > num_errors
        named = (self.task_format.name, task.salt, task.task_id)
        with self._lock:
            if is_sound:  # it was used last
                self._file.write(
                    f"INSERT OR REPLACE INTO tasks (model, {_COLUMNS}) SELECT model, {_COLUMNS} FROM tasks {_NAMED}",
                    [named],
                )
                self._read_added()
                self._num_hits += 1
            elif not store_failed:  # unless it was replaced by one with other KV
                self._file.write(f"DELETE FROM tasks {_NAMED} AND digest = ?", [(*named, task.digest)])
                self._num_lost += 1
        return kv if is_sound else None

    def _chunk(self, task: KnownTask, digest: str) -> Chunk:
        """A name for its KV, made of what it holds; the token ids only say how long it is."""
        salt = f"simllm {self.task_format.name} {digest} {task.salt}"
        return Chunk(np.arange(task.num_tokens, dtype=np.int32), salt)

    # -- the directory, under the lock -----------------------------------------------------------------------------

    def _near(self, query_embedding: torch.Tensor) -> list[ListedTask]:
        """The tasks of the buckets next to an embedding `(E,)`, in no order."""
        if self._file.has_changed():
            self._read_added()
        numbers = self._index.neighbours(query_embedding, _MAX_COMPARED)
        places = ", ".join("?" * len(numbers))
        rows = self._file.read(
            f"SELECT number, {_COLUMNS} FROM tasks WHERE model = ? AND number IN ({places})",
            (self.task_format.name, *map(int, numbers)),
        )
        if rows is None:
            return []
        for number in set(numbers).difference(str(row[0]) for row in rows):
            self._forget(number)
        return [task for row in rows if (task := self._task(*row[1:]))]

    def _read_added(self) -> None:
        for number, name, blob in self._added():
            embedding = self._embedding(blob)
            if embedding is None:
                continue
            if name in self._numbers:
                self._forget(self._numbers[name])
            self._index.add(number, embedding)
            self._names[number] = name
            self._numbers[name] = number
        while len(self._names) > self.max_tasks:
            self._forget(next(iter(self._names)))

    def _added(self) -> Iterator[tuple[str, tuple[str, str], object]]:
        """Number, name and embedding of the rows that this process hasn't read yet."""
        added = (
            "SELECT number, salt, task_id, embedding FROM tasks WHERE model = ? AND number > ? "
            f"ORDER BY number LIMIT {_READ_AT_ONCE}"
        )
        while rows := self._file.read(added, (self.task_format.name, self._last_number)):
            for self._last_number, salt, task_id, embedding in rows:
                yield str(self._last_number), (salt, task_id), embedding

    def _forget(self, number: str) -> None:
        del self._numbers[self._names.pop(number)]
        self._index.remove(number)

    def _task(
        self,
        salt: str,
        task_id: str,
        embedding: object,
        num_tokens: int,
        token_ids: object,
        digest: str,
        added_at: float,
    ) -> ListedTask | None:
        found = self._embedding(embedding)
        ids = np.frombuffer(token_ids, np.int32) if isinstance(token_ids, bytes) and len(token_ids) % 4 == 0 else None
        is_damaged = token_ids is not None and (ids is None or len(ids) != num_tokens)
        if found is None or is_damaged:
            return None
        return ListedTask(salt, task_id, found, num_tokens, ids, digest, added_at, self.task_format.has_all_layers)

    def _embedding(self, blob: object) -> torch.Tensor | None:
        if not isinstance(blob, bytes) or len(blob) != 4 * self.task_format.embedding_dim:
            return None
        embedding = torch.frombuffer(bytearray(blob), dtype=torch.float32)
        return embedding if embedding.isfinite().all() else None


def _digest(kv: torch.Tensor) -> str:
    values = kv.contiguous().flatten().view(torch.uint8).numpy()
    return hashlib.blake2b(values.data, digest_size=16).hexdigest()
