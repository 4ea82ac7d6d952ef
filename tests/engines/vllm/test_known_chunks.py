"""Known chunks in a file: servers of one model share them, and each keeps what it knows when the file fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvarena.core.plan import Chunk, as_token_ids
from kvarena.stores.sqlite import KnownChunks


def chunk_of(seed: int, salt: str = "") -> Chunk:
    return Chunk(as_token_ids(range(seed, seed + 40)), salt)


def test_servers_of_a_model_know_each_others_chunks(tmp_path: Path) -> None:
    path = str(tmp_path / "known.sqlite")
    one, other, stranger = KnownChunks(path, "a"), KnownChunks(path, "a"), KnownChunks(path, "b")
    one.add(chunk_of(0))
    one.add(chunk_of(1, "mine"))
    for known in (other, stranger):
        known.refresh()
    assert set(other.index) == {chunk_of(0), chunk_of(1, "mine")}
    assert set(stranger.index) == set()
    one.clear()
    assert set(KnownChunks(path, "a").index) == set()


def test_a_damaged_file_costs_only_what_it_knew(tmp_path: Path) -> None:
    (tmp_path / "known.sqlite").write_bytes(b"not a database" * 100)
    known = KnownChunks(str(tmp_path / "known.sqlite"), "a")
    known.add(chunk_of(0))
    known.refresh()
    assert set(known.index) == {chunk_of(0)}


def test_chunks_of_models_long_gone_are_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "known.sqlite")
    old, mine = KnownChunks(path, "old"), KnownChunks(path, "mine")
    old.add(chunk_of(0))
    mine.add(chunk_of(1))
    KnownChunks(path, "mine").close()
    assert set(KnownChunks(path, "old").index) == {chunk_of(0)}, "it may be served beside"
    monkeypatch.setattr(KnownChunks, "KEPT_DAYS", -1)
    assert set(KnownChunks(path, "mine").index) == {chunk_of(1)}
    assert set(KnownChunks(path, "old").index) == set()
