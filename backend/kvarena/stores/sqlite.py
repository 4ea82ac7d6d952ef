"""A SQLite file that several processes of one machine read and write, and the known chunks kept in one.

SQLite does the locking. Nothing in such a file is irreplaceable, so no request fails for it. While others keep the file
locked, or the disk is full, nothing is read, and writes wait for the next try. A damaged file is given up with a
warning: reading then gives nothing, and writing does nothing. Of known chunks only the token ids are kept, so that they
survive a restart; the KV is the store's. A chunk that is known here and lost there is computed again.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kvarena.core.matching import ChunkIndex, sink_of
from kvarena.core.plan import NO_SINK, Chunk, ChunkKey, TokenIds

logger = logging.getLogger(__name__)

BUSY_TIMEOUT_S = 0.1
"""Short, for a scheduler waits; writes can be made later."""
PAUSE_S = 2.0
"""After a failure the file is left alone for so long."""
MAX_VALUES = 500
"""In one statement; SQLite limits it."""
_PASSING = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR}
"""Errors that may pass."""
MAX_WAITING_ROWS = 10_000


class SharedFile:
    """Not thread-safe. Readable by its owner only. `what` names what it keeps, in warnings."""

    def __init__(self, path: Path, schema: str, what: str) -> None:
        self._path, self._schema, self._what = path, schema, what
        self._data_version = -1
        self._waiting: deque[tuple[str, Sequence[Sequence[object]]]] = deque()
        self._num_waiting_rows = 0
        self._file: sqlite3.Connection | None = None
        self._is_given_up = False
        self._paused_until_s = 0.0
        self._opened()

    def has_changed(self) -> bool:
        """Whether others have written since the last call; at first it is true."""
        version = self.read("PRAGMA data_version")
        if not version or version[0][0] == self._data_version:
            return False
        self._data_version = version[0][0]
        return True

    def read(self, statement: str, values: Sequence[object] = ()) -> list[tuple[Any, ...]] | None:
        """None where nothing could be read; `has_changed` is true again then."""
        try:
            if (file := self._opened()) is not None:
                return file.execute(statement, values).fetchall()
        except sqlite3.Error as error:
            self._fail(error)
        self._data_version = -1
        return None

    def write(self, statement: str, rows: Sequence[Sequence[object]]) -> None:
        """Run the statement for all rows, or none. What couldn't be written before goes first."""
        if self._is_given_up:
            return
        self._waiting.append((statement, rows))
        self._num_waiting_rows += len(rows)
        try:
            while self._waiting and (file := self._opened()) is not None:
                with file:
                    file.executemany(*self._waiting[0])
                self._drop_oldest()
        except sqlite3.Error as error:
            self._fail(error)
        while self._num_waiting_rows > MAX_WAITING_ROWS:
            self._drop_oldest()

    def _opened(self) -> sqlite3.Connection | None:
        """None after a failure: for a while, or for good."""
        if self._is_given_up or time.monotonic() < self._paused_until_s:
            return None
        if self._file is None:
            try:
                self._file = _open(self._path, self._schema)
            except sqlite3.Error as error:
                self._fail(error)
            except OSError as error:
                logger.warning("%s can't be kept in %s: %s", self._what, self._path, error)
                self.close()
        return self._file

    def _drop_oldest(self) -> None:
        _, rows = self._waiting.popleft()
        self._num_waiting_rows -= len(rows)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file, self._is_given_up = None, True
        self._waiting.clear()

    def _fail(self, error: sqlite3.Error) -> None:
        if (getattr(error, "sqlite_errorcode", 0) & 0xFF) in _PASSING:
            logger.warning("%s can't be read or written for now: %s", self._what, error)
            self._paused_until_s = time.monotonic() + PAUSE_S
        else:
            logger.warning("%s are no longer kept in %s: %s", self._what, self._path, error)
            self.close()


def _open(path: Path, schema: str) -> sqlite3.Connection:
    path.parent.mkdir(parents=True, exist_ok=True)
    os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    file = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, check_same_thread=False)
    file.execute("PRAGMA journal_mode = WAL")
    file.execute("PRAGMA synchronous = NORMAL")
    file.executescript(schema)
    return file


_SCHEMA = """CREATE TABLE IF NOT EXISTS chunks (
    id INTEGER PRIMARY KEY, model TEXT NOT NULL, key BLOB NOT NULL, salt TEXT NOT NULL, token_ids BLOB NOT NULL,
    added_at REAL NOT NULL, UNIQUE (model, key));
CREATE INDEX IF NOT EXISTS chunks_by_key ON chunks (key);"""


class KnownChunks:
    """A `ChunkIndex` for one model, written through to a file. An empty path keeps it in memory only.

    Chunks of other models go after `KEPT_DAYS`, so that a model that was changed or isn't served any more leaves
    nothing behind.
    """

    KEPT_DAYS = 30

    def __init__(self, path: str, model: str, sink: TokenIds = NO_SINK) -> None:
        """`sink`: what the model's chunks are computed after; with another sink they count as another model's."""
        self.index = ChunkIndex()
        self._sink = sink
        self._model = model = f"{model}-after-{'-'.join(map(str, sink))}" if len(sink) else model
        self._last_id = 0
        self._file = SharedFile(Path(path), _SCHEMA, "known chunks") if path else None
        self._write(
            "DELETE FROM chunks WHERE model != ? AND added_at < ?", [(model, time.time() - 86_400 * self.KEPT_DAYS)]
        )
        self.refresh()

    def refresh(self) -> None:
        """Take over what other servers have added since."""
        if self._file is None or not self._file.has_changed():
            return
        rows = self._file.read(
            "SELECT id, salt, token_ids FROM chunks WHERE model = ? AND id > ? ORDER BY id",
            (self._model, self._last_id),
        )
        for self._last_id, salt, token_ids in rows or ():
            ids = np.frombuffer(token_ids, np.int32)
            self._forget(self.index.add(Chunk(ids, salt, sink_of(ids, self._sink))))

    def add(self, *chunks: Chunk) -> None:
        if not (new := [chunk for chunk in dict.fromkeys(chunks) if chunk not in self.index]):
            return
        dropped = [one for chunk in new for one in self.index.add(chunk)]
        self._write(
            "INSERT OR IGNORE INTO chunks (model, key, salt, token_ids, added_at) VALUES (?, ?, ?, ?, ?)",
            [(self._model, chunk.key, chunk.salt, chunk.token_ids.tobytes(), time.time()) for chunk in new],
        )
        self._forget(dropped)  # which may be some of the new

    def of_other_models(self, chunks: Sequence[Chunk]) -> set[ChunkKey]:
        """Those of these chunks that are known for other models; none where no file is kept."""
        found: set[ChunkKey] = set()
        for start in range(0, len(chunks) if self._file is not None else 0, MAX_VALUES):
            assert self._file is not None
            keys = [chunk.key for chunk in chunks[start : start + MAX_VALUES]]
            marks = ", ".join("?" * len(keys))
            statement = f"SELECT DISTINCT key FROM chunks WHERE model != ? AND key IN ({marks})"
            found |= {ChunkKey(key) for (key,) in self._file.read(statement, [self._model, *keys]) or ()}
        return found

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
