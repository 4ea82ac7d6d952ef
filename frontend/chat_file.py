"""Chats that outlast the page: a SQLite file in the state folder. No Streamlit.

Each chat is one document, found by its key alone; nothing lists them. If the file can't be read or written, `problem`
says why, and chats then live only as long as the page. Several threads and processes may use one file. At most
`max_chats` and `max_bytes` are kept: the chat written last always is, and the longest unwritten ones go first. Votes
are kept beside the chats, and longer.
"""

from __future__ import annotations

import os
import sqlite3
import time
import zlib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter

from chat import Chat
from votes import Ballot, ballot_of

MAX_KEPT_CHATS = 1000
MAX_KEPT_BYTES = 256 << 20
BUSY_TIMEOUT_S = 2.0
MAX_KEPT_VOTES = 100_000
_SCHEMA = """CREATE TABLE IF NOT EXISTS chats (
    key TEXT PRIMARY KEY, kind TEXT NOT NULL, kept_s REAL NOT NULL, document BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS votes (
    number INTEGER PRIMARY KEY AUTOINCREMENT, key TEXT NOT NULL, turn INTEGER NOT NULL, ballot TEXT NOT NULL,
    UNIQUE (key, turn));"""
_DROP_OLDEST = """DELETE FROM chats WHERE key IN (
    SELECT key FROM (
        SELECT key, row_number() OVER latest AS place, sum(length(document)) OVER latest AS num_bytes
        FROM chats WINDOW latest AS (ORDER BY kept_s DESC, rowid DESC))
    WHERE place > 1 AND (place > ? OR num_bytes > ?))"""

SomeChat = TypeVar("SomeChat", bound=Chat)
_BALLOT = TypeAdapter(Ballot)
_FORMS: dict[type[Chat], TypeAdapter[Any]] = {}


def chat_form(kind: type[SomeChat]) -> TypeAdapter[SomeChat]:
    """How a chat is written as JSON, and read."""
    if kind not in _FORMS:
        _FORMS[kind] = TypeAdapter(kind)
    return _FORMS[kind]


class ChatFile:
    """`problem` says why chats don't last; empty while they do."""

    def __init__(self, path: Path, max_chats: int = MAX_KEPT_CHATS, max_bytes: int = MAX_KEPT_BYTES) -> None:
        self.problem = ""
        self._path, self._limits = path, (max_chats, max_bytes)
        with self._explained(), self._opened():
            pass

    def keep(self, chat: Chat) -> None:
        """Writes the chat as it is now."""
        with self._explained(), self._opened() as file:
            document = zlib.compress(chat_form(type(chat)).dump_json(chat), 1)
            file.execute(
                "INSERT OR REPLACE INTO chats (key, kind, kept_s, document) VALUES (?, ?, ?, ?)",
                (chat.key, type(chat).__name__, time.time(), document),
            )
            file.execute(_DROP_OLDEST, self._limits)
            votes = [(chat.key, at, ballot) for at, turn in enumerate(chat.turns) if (ballot := ballot_of(turn))]
            file.executemany(
                "INSERT OR IGNORE INTO votes (key, turn, ballot) VALUES (?, ?, ?)",
                [(key, at, _BALLOT.dump_json(ballot)) for key, at, ballot in votes],
            )
            file.execute("DELETE FROM votes WHERE number <= (SELECT max(number) FROM votes) - ?", (MAX_KEPT_VOTES,))
            self.problem = ""

    def ballots(self) -> list[Ballot]:
        """All votes, including those of chats that are no longer kept."""
        with self._explained(), self._opened() as file:
            rows = file.execute("SELECT ballot FROM votes ORDER BY number").fetchall()
            return [_BALLOT.validate_json(ballot) for (ballot,) in rows]
        return []

    def load(self, key: str, kind: type[SomeChat]) -> SomeChat | None:
        """None if there is no such chat of this kind, or it can't be read. Unfinished answers are interrupted."""
        rows: list[tuple[bytes]] = []
        with self._explained(), self._opened() as file:
            rows = file.execute(
                "SELECT document FROM chats WHERE key = ? AND kind = ?", (key, kind.__name__)
            ).fetchall()
        try:
            chat: SomeChat = chat_form(kind).validate_json(zlib.decompress(rows[0][0]))
        except (IndexError, ValueError, zlib.error):
            return None
        for turn in chat.turns:
            for answer in turn.answers.values():
                answer.interrupt()
        return chat

    @contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        """A transaction: all of it is written, or nothing. Only the owner can read the file."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if not self._path.exists():
            os.close(os.open(self._path, os.O_CREAT | os.O_RDWR, 0o600))
        with closing(sqlite3.connect(self._path, timeout=BUSY_TIMEOUT_S)) as file, file:
            file.execute("PRAGMA journal_mode = WAL")
            file.executescript(_SCHEMA)
            yield file

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (OSError, sqlite3.Error, ValueError) as error:
            self.problem = f"Chats last only until the page is restarted: {self._path} can't be used ({error})."
