"""A SQLite file that several processes of one machine read and write: SQLite does the locking.

What is in such a file can be found out again. So one that is damaged or can't be written is given up with a warning:
reading then gives nothing and writing does nothing, and no answer fails for it.
"""

from __future__ import annotations

import logging
import os
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

BUSY_TIMEOUT_S = 1.0


class SharedFile:
    """Not thread-safe. Readable by its owner only. `what` names what it keeps, in warnings."""

    def __init__(self, path: Path, schema: str, what: str) -> None:
        self._what = what
        self._data_version = -1
        self._file: sqlite3.Connection | None = None
        try:
            self._file = _open(path, schema)
        except (OSError, sqlite3.Error) as error:
            logger.warning("%s can't be kept in %s: %s", what, path, error)

    @property
    def is_open(self) -> bool:
        return self._file is not None

    def has_changed(self) -> bool:
        """Whether others have written since it was last asked; the first time it is true."""
        version = self.read("PRAGMA data_version")
        if not version or version[0][0] == self._data_version:
            return False
        self._data_version = version[0][0]
        return True

    def read(self, statement: str, values: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        if self._file is None:
            return []
        try:
            return self._file.execute(statement, values).fetchall()
        except sqlite3.Error as error:
            self._give_up(error)
            return []

    def write(self, statement: str, rows: Sequence[Sequence[object]]) -> None:
        """The statement for each of the rows, all or none of them."""
        if self._file is None:
            return
        try:
            with self._file:
                self._file.executemany(statement, rows)
        except sqlite3.Error as error:
            self._give_up(error)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None

    def _give_up(self, error: sqlite3.Error) -> None:
        logger.warning("%s are no longer kept on disk: %s", self._what, error)
        self.close()


def _open(path: Path, schema: str) -> sqlite3.Connection:
    path.parent.mkdir(parents=True, exist_ok=True)
    os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    file = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, check_same_thread=False)
    file.execute("PRAGMA journal_mode = WAL")
    file.execute("PRAGMA synchronous = NORMAL")
    file.executescript(schema)
    return file
