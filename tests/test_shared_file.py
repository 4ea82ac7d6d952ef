"""A file that several connections share, and what is left of one that fails."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from kvarena.stores.sqlite import SharedFile

SCHEMA = "CREATE TABLE IF NOT EXISTS words (id INTEGER PRIMARY KEY, word TEXT UNIQUE);"


def opened(path: Path) -> SharedFile:
    return SharedFile(path, SCHEMA, "words")


def words(file: SharedFile) -> list[str]:
    return [word for (word,) in file.read("SELECT word FROM words ORDER BY id")]


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
    assert "words can't be kept" in caplog.text
    file.write("INSERT INTO words (word) VALUES (?)", [("tea",)])
    assert (file.has_changed(), words(file)) == (False, [])


def test_a_folder_that_cant_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    file = opened(tmp_path / "file" / "words.sqlite")
    file.write("INSERT INTO words (word) VALUES (?)", [("tea",)])
    assert (file.has_changed(), words(file)) == (False, [])
