"""Which tasks there are, in a file that processes share: all of a task but its KV.

A row has what a search needs: embedding, length, salt and, where they are known, token ids. Rows are numbered upwards,
and a task that was used gets a new number, so that the lowest are the least recently used, for every process alike. A
process reads what was added since it last looked, and keeps only hashes; the rows it compares with are read again each
time, so that one that another process has removed isn't found any more.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from kvarena.reuse.plan import Chunk, TokenIds
from kvarena.shared_file import SharedFile
from kvarena.simllm.lsh import LSHIndex

_SCHEMA = """CREATE TABLE IF NOT EXISTS tasks (
    number INTEGER PRIMARY KEY AUTOINCREMENT, model TEXT NOT NULL, salt TEXT NOT NULL, task_id TEXT NOT NULL,
    embedding BLOB NOT NULL, num_tokens INTEGER NOT NULL, token_ids BLOB, digest TEXT NOT NULL, added_at REAL NOT NULL,
    UNIQUE (model, salt, task_id));
CREATE INDEX IF NOT EXISTS tasks_by_number ON tasks (model, number);"""
_COLUMNS = "salt, task_id, embedding, num_tokens, token_ids, digest, added_at"
_NAMED = "WHERE model = ? AND salt = ? AND task_id = ?"
_READ_AT_ONCE = 1000
_MAX_COMPARED = 32


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


class TaskDirectory:
    """The rows of one model, at most `max_tasks`, the least recently used out first. Not thread-safe.

    A damaged row is as one that isn't there; a file that fails leaves an empty directory.
    """

    def __init__(
        self,
        path: Path,
        model: str,
        embedding_dim: int,
        num_hyperplanes: int,
        max_tasks: int,
        *,
        have_whole_kv: bool,
    ) -> None:
        if max_tasks < 1:
            raise ValueError(f"max_tasks must be at least 1, not {max_tasks}")
        self.max_tasks = max_tasks
        self._model = model
        self._embedding_dim = embedding_dim
        self._have_whole_kv = have_whole_kv
        self._file = SharedFile(path, _SCHEMA, "shared tasks")
        self._index = LSHIndex(embedding_dim, num_hyperplanes)
        self._names: dict[str, tuple[str, str]] = {}  # of the rows by their numbers, upwards
        self._numbers: dict[tuple[str, str], str] = {}
        self._last_number = 0

    def __len__(self) -> int:
        return len(self._names)

    def near(self, query_embedding: torch.Tensor) -> list[ListedTask]:
        """The tasks of the buckets next to an embedding `(E,)`, in no order."""
        if self._file.has_changed():
            self._read_added()
        numbers = self._index.neighbours(query_embedding, _MAX_COMPARED)
        places = ", ".join("?" * len(numbers))
        rows = self._file.read(
            f"SELECT number, {_COLUMNS} FROM tasks WHERE model = ? AND number IN ({places})",
            (self._model, *map(int, numbers)),
        )
        for number in set(numbers).difference(str(row[0]) for row in rows):
            self._forget(number)
        return [task for row in rows if (task := self._task(*row[1:]))]

    def add(self, task: ListedTask) -> None:
        """One of the same id and salt is replaced."""
        token_ids = None if task.token_ids is None else task.token_ids.tobytes()
        embedding = task.task_embedding.numpy().tobytes()
        row = (task.salt, task.task_id, embedding, task.num_tokens, token_ids, task.digest, task.timestamp)
        self._file.write(
            f"INSERT OR REPLACE INTO tasks (model, {_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)", [(self._model, *row)]
        )
        self._file.write(
            "DELETE FROM tasks WHERE model = ? AND number <= "
            "(SELECT number FROM tasks WHERE model = ? ORDER BY number DESC LIMIT 1 OFFSET ?)",
            [(self._model, self._model, self.max_tasks)],
        )
        self._read_added()

    def touch(self, task: ListedTask) -> None:
        """It was used last."""
        self._file.write(
            f"INSERT OR REPLACE INTO tasks (model, {_COLUMNS}) SELECT model, {_COLUMNS} FROM tasks {_NAMED}",
            [(self._model, task.salt, task.task_id)],
        )
        self._read_added()

    def remove(self, task: ListedTask) -> None:
        """Unless it was replaced by one with other KV."""
        self._file.write(
            f"DELETE FROM tasks {_NAMED} AND digest = ?", [(self._model, task.salt, task.task_id, task.digest)]
        )

    def clear(self) -> None:
        self._file.write("DELETE FROM tasks WHERE model = ?", [(self._model,)])
        for number in list(self._names):
            self._forget(number)

    def close(self) -> None:
        self._file.close()

    def check_integrity(self) -> None:
        """Compare index, names and numbers. Raises `AssertionError`."""
        self._index.check_integrity()
        assert len(self._index) == len(self._names) <= self.max_tasks
        assert {name: number for number, name in self._names.items()} == self._numbers
        numbers = [int(number) for number in self._names]
        assert numbers == sorted(numbers)
        assert not numbers or numbers[-1] <= self._last_number

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
        while rows := self._file.read(added, (self._model, self._last_number)):
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
        return ListedTask(salt, task_id, found, num_tokens, ids, digest, added_at, self._have_whole_kv)

    def _embedding(self, blob: object) -> torch.Tensor | None:
        if not isinstance(blob, bytes) or len(blob) != 4 * self._embedding_dim:
            return None
        embedding = torch.frombuffer(bytearray(blob), dtype=torch.float32)
        return embedding if embedding.isfinite().all() else None
