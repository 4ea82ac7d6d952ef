"""The known chunks on disk: their token ids survive a restart and are shared by the servers of one machine.

Only token ids are kept here; the KV is the store's. A chunk known here and lost there is computed again.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from kvarena.reuse.matcher import ChunkIndex
from kvarena.reuse.plan import Chunk
from kvarena.shared_file import SharedFile

_SCHEMA = """CREATE TABLE IF NOT EXISTS chunks (
    id INTEGER PRIMARY KEY, model TEXT NOT NULL, key BLOB NOT NULL, salt TEXT NOT NULL, token_ids BLOB NOT NULL,
    added_at REAL NOT NULL, UNIQUE (model, key));"""


class KnownChunks:
    """A `ChunkIndex` for one model, written through to a file. An empty path keeps it in memory only."""

    def __init__(self, path: str, model: str) -> None:
        self.index = ChunkIndex()
        self._model = model
        self._last_id = 0
        self._file = SharedFile(Path(path), _SCHEMA, "known chunks") if path else None
        self.refresh()

    def refresh(self) -> None:
        """Take over what other servers have added since."""
        if self._file is None or not self._file.has_changed():
            return
        rows = self._file.read(
            "SELECT id, salt, token_ids FROM chunks WHERE model = ? AND id > ? ORDER BY id",
            (self._model, self._last_id),
        )
        for self._last_id, salt, token_ids in rows:
            self._forget(self.index.add(Chunk(np.frombuffer(token_ids, np.int32), salt)))

    def add(self, chunk: Chunk) -> None:
        if chunk in self.index:
            return
        self._forget(self.index.add(chunk))
        self._write(
            "INSERT OR IGNORE INTO chunks (model, key, salt, token_ids, added_at) VALUES (?, ?, ?, ?, ?)",
            [(self._model, chunk.key, chunk.salt, chunk.token_ids.tobytes(), time.time())],
        )

    def clear(self) -> None:
        for chunk in list(self.index):
            self.index.remove(chunk)
        self._write("DELETE FROM chunks WHERE model = ?", [(self._model,)])

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _forget(self, dropped: list[Chunk]) -> None:
        if dropped:
            self._write(
                "DELETE FROM chunks WHERE model = ? AND key = ?", [(self._model, chunk.key) for chunk in dropped]
            )

    def _write(self, statement: str, rows: list[tuple[object, ...]]) -> None:
        if self._file is not None:
            self._file.write(statement, rows)
