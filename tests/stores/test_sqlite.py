"""A file that several connections share, and what is left of one that fails."""

from __future__ import annotations

import logging
import sqlite3
from pathlib import Path

import pytest

from kvarena.stores import sqlite
from kvarena.stores.sqlite import SharedFile

SCHEMA = "CREATE TABLE IF NOT EXISTS words (id INTEGER PRIMARY KEY, word TEXT UNIQUE);"


def opened(path: Path) -> SharedFile:
    return SharedFile(path, SCHEMA, "words")


def words(file: SharedFile) -> list[str]:
    return [word for (word,) in file.read("SELECT word FROM words ORDER BY id") or ()]


def test_what_one_writes_the_other_sees_and_hears_of(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "words.sqlite"
    one, other = opened(path), opened(path)
    assert other.has_changed(), "the first time"
    assert not other.has_changed()
    one.write("INSERT INTO words (word) VALUES (?)", [("tea",), ("rain",)])
    assert other.has_changed()
    assert not other.has_changed()
    assert words(other) == ["tea", "rain"]
    assert path.stat().st_mode & 0o077 == 0, "its owner's alone"
    one.close()
    assert (words(one), words(opened(path))) == ([], ["tea", "rain"])


def test_all_rows_are_written_or_none(tmp_path: Path) -> None:
    file = opened(tmp_path / "words.sqlite")
    file.write("INSERT INTO words (word) VALUES (?)", [("tea",), ("tea",)])
    file.write("INSERT INTO words (word) VALUES (?)", [("rain",)])
    assert words(opened(tmp_path / "words.sqlite")) == [], "nor anything after that"


def test_a_damaged_file_is_given_up_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "words.sqlite"
    path.write_bytes(b"not a database" * 100)
    with caplog.at_level(logging.WARNING):
        file = opened(path)
    assert f"words are no longer kept in {path}" in caplog.text
    file.write("INSERT INTO words (word) VALUES (?)", [("tea",)])
    assert (file.has_changed(), words(file)) == (False, [])


def test_a_folder_that_cant_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    file = opened(tmp_path / "file" / "words.sqlite")
    file.write("INSERT INTO words (word) VALUES (?)", [("tea",)])
    assert (file.has_changed(), words(file)) == (False, [])


def test_a_file_that_is_locked_is_written_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One busy time-out used to end it for good."""
    monkeypatch.setattr(sqlite, "BUSY_TIMEOUT_S", 0.05)
    monkeypatch.setattr(sqlite, "PAUSE_S", 0.0)
    path = tmp_path / "words.sqlite"
    file = opened(path)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    file.write("INSERT INTO words (word) VALUES (?)", [("tea",)])
    file.write("INSERT INTO words (word) VALUES (?)", [("rain",)])
    assert words(opened(path)) == []
    other.execute("ROLLBACK")
    file.write("INSERT INTO words (word) VALUES (?)", [("hill",)])
    assert words(file) == ["tea", "rain", "hill"]
    assert words(opened(path)) == ["tea", "rain", "hill"]


def test_a_locked_file_is_waited_for_once_in_a_while_and_not_for_each_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A scheduler with 200 new chunks waited 200 times."""
    monkeypatch.setattr(sqlite, "PAUSE_S", 60.0)
    path = tmp_path / "words.sqlite"
    file = opened(path)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with caplog.at_level(logging.WARNING):
        for number in range(200):
            file.write("INSERT INTO words (word) VALUES (?)", [(f"word {number}",)])
            assert file.read("SELECT word FROM words") is None, "it isn't empty: it can't be read now"
    assert len(caplog.records) == 1
    other.execute("ROLLBACK")
    monkeypatch.setattr(file, "_paused_until_s", 0.0)
    file.write("INSERT INTO words (word) VALUES (?)", [("last",)])
    assert len(words(opened(path))) == 201


def test_a_file_that_was_locked_at_first_is_opened_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite, "BUSY_TIMEOUT_S", 0.0)
    monkeypatch.setattr(sqlite, "PAUSE_S", 0.0)
    path = tmp_path / "words.sqlite"
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    file = opened(path)
    assert not file.has_changed()
    other.execute("ROLLBACK")
    other.close()
    file.write("INSERT INTO words (word) VALUES (?)", [("tea",)])
    assert file.has_changed()
    assert words(file) == ["tea"]


def test_what_waits_for_a_locked_file_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite, "BUSY_TIMEOUT_S", 0.0)
    monkeypatch.setattr(sqlite, "PAUSE_S", 0.0)
    monkeypatch.setattr(sqlite, "MAX_WAITING_ROWS", 3)
    path = tmp_path / "words.sqlite"
    file = opened(path)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    for number in range(9):
        file.write("INSERT INTO words (word) VALUES (?)", [(f"word {number}",)])
    other.execute("ROLLBACK")
    file.write("INSERT INTO words (word) VALUES (?)", [("last",)])
    assert words(file) == ["word 6", "word 7", "word 8", "last"]
