"""The texts of a data folder: what is read of a file, and which files are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvarena.context import TextChunk, load_chunks, load_system_prompt

LATIN_1 = "Über den Fluss".encode("latin-1")


def test_texts_are_read_without_byte_order_mark_and_carriage_returns(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("Über\r\nden Fluss\n".encode("utf-8-sig"))
    assert load_chunks(tmp_path) == [TextChunk("a", "Über\nden Fluss")]
    assert load_system_prompt(tmp_path) == ""


def test_a_file_in_another_encoding_is_refused_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text("Über den Fluss", encoding="utf-8")
    (tmp_path / "bad.md").write_bytes(LATIN_1)
    with pytest.raises(ValueError, match=r"bad\.md can't be read as UTF-8 text: .*0xdc in position 0"):
        load_chunks(tmp_path)
    (tmp_path / "sys_prompt.txt").write_bytes(LATIN_1)
    with pytest.raises(ValueError, match=r"sys_prompt\.txt can't be read as UTF-8 text"):
        load_system_prompt(tmp_path)
