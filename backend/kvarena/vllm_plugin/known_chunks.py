"""The known chunks on disk: their token ids survive a restart and are shared by the servers of one machine.

Only token ids are kept here; the KV is the store's. A chunk known here and lost there is computed again. SQLite does
the locking; a file that is damaged or can't be written costs what it would have remembered, never an answer.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import time
from pathlib import Path

import numpy as np

from kvarena.reuse.matcher import ChunkIndex
from kvarena.reuse.plan import Chunk

logger = logging.getLogger(__name__)

_SCHEMA = """CREATE TABLE IF NOT EXISTS chunks (
    id INTEGER PRIMARY KEY, model TEXT NOT NULL, key BLOB NOT NULL, salt TEXT NOT NULL, token_ids BLOB NOT NULL,
    added_at REAL NOT NULL, UNIQUE (model, key))"""


class KnownChunks:
    """A `ChunkIndex` for one model, written through to a file. An empty path keeps it in memory only."""

    def __init__(self, path: str, model: str) -> None:
        self.index = ChunkIndex()
        self._model = model
        self._last_id = 0
        self._data_version = -1
        self._file = self._open(Path(path)) if path else None
        self.refresh()

    def refresh(self) -> None:
        """Take over what other servers have added since."""
        if self._file is None:
            return
        try:
            (version,) = self._file.execute("PRAGMA data_version").fetchone()
            if version == self._data_version:
                return
            self._data_version = version
            rows = self._file.execute(
                "SELECT id, salt, token_ids FROM chunks WHERE model = ? AND id > ? ORDER BY id",
                (self._model, self._last_id),
            ).fetchall()
        except sqlite3.Error as error:
            self._give_up(error)
            return
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
        self._file = None

    def _forget(self, dropped: list[Chunk]) -> None:
        if dropped:
            self._write(
                "DELETE FROM chunks WHERE model = ? AND key = ?", [(self._model, chunk.key) for chunk in dropped]
            )

    def _write(self, statement: str, rows: list[tuple[object, ...]]) -> None:
        if self._file is None:
            return
        try:
            with self._file:
                self._file.executemany(statement, rows)
        except sqlite3.Error as error:
            self._give_up(error)

    def _give_up(self, error: sqlite3.Error) -> None:
        logger.warning("known chunks are no longer kept on disk: %s", error)
        self.close()

    @staticmethod
    def _open(path: Path) -> sqlite3.Connection | None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
            file = sqlite3.connect(path, timeout=1.0, check_same_thread=False)
            file.execute("PRAGMA journal_mode = WAL")
            file.execute("PRAGMA synchronous = NORMAL")
            file.execute(_SCHEMA)
            file.commit()
        except (OSError, sqlite3.Error) as error:
            logger.warning("known chunks can't be kept in %s: %s", path, error)
            return None
        return file
