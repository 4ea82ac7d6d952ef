"""The data folder as `up` and `warm` read it: what can't be used is shown, with its reason."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from kvarena.home import StackError
from kvarena.stack.chunk_cache import WarmResult
from kvarena.stack.record import Record
from kvarena.stack.render import read_documents


def shown(folder: Path) -> tuple[list[str], list[str]]:
    """The chunks' names, and the lines that were printed."""
    console = Console(file=io.StringIO(), width=200)
    documents = read_documents(Record((), "", str(folder), "town", chunk_tokens=64), console)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    return [chunk.name for chunk in documents.chunks], lines


def test_good_files_need_no_word(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Text.")
    assert shown(tmp_path) == (["a"], [])


def test_every_bad_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("A sentence. " * 40)
    (tmp_path / "[b].txt").write_bytes("Über den Fluss".encode("latin-1"))
    (tmp_path / "c.md").touch()
    names, lines = shown(tmp_path)
    assert names == ["a 01", "a 02"]
    assert lines == [
        "Chunks are of an estimated size, 4 bytes to a token: there is no tokenizer.json of this model here.",
        "2 files can't be used:",
        "  [b].txt: not UTF-8 (byte 0), and no other encoding is certain; save it as UTF-8",
        "  c.md: empty",
    ]


def test_they_are_in_the_json_too(tmp_path: Path) -> None:
    (tmp_path / "c.md").touch()
    documents = read_documents(Record((), "", str(tmp_path), "town"), Console(file=io.StringIO()))
    assert WarmResult((), documents.problems).to_json()["unusable"] == [{"file": "c.md", "reason": "empty"}]


def test_no_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StackError, match="no folder of chunk files"):
        shown(tmp_path / "nowhere")
