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


def test_of_many_at_once_those_that_had_to_go_are_not_in_the_file(tmp_path: Path) -> None:
    path = str(tmp_path / "known.sqlite")
    known = KnownChunks(path, "a")
    known.index.max_tokens = 80
    known.add(*map(chunk_of, range(4)))
    assert set(known.index) == set(KnownChunks(path, "a").index) == {chunk_of(2), chunk_of(3)}


def test_many_can_be_asked_for_at_once(tmp_path: Path) -> None:
    """SQLite takes some 32,000 values in a statement."""
    path = str(tmp_path / "known.sqlite")
    KnownChunks(path, "a").add(chunk_of(7))
    asked = [Chunk(as_token_ids([number, 1])) for number in range(40_000)]
    assert KnownChunks(path, "b").of_other_models([*asked, chunk_of(7)]) == {chunk_of(7).key}


def test_what_another_model_knows_is_told(tmp_path: Path) -> None:
    path = str(tmp_path / "known.sqlite")
    one, other = KnownChunks(path, "a"), KnownChunks(path, "b")
    one.add(chunk_of(0))
    one.add(chunk_of(1, "mine"))
    asked = [chunk_of(0), chunk_of(1), chunk_of(1, "mine"), chunk_of(2)]
    assert other.of_other_models(asked) == {chunk_of(0).key, chunk_of(1, "mine").key}
    assert one.of_other_models(asked) == other.of_other_models([]) == set()
    assert KnownChunks("", "b").of_other_models(asked) == set()


def test_chunks_are_known_for_one_sink(tmp_path: Path) -> None:
    path, sink = str(tmp_path / "known.sqlite"), as_token_ids([500, 501])
    known = KnownChunks(path, "a", sink)
    after_sink, begins_with_it = Chunk(as_token_ids(range(40)), "", sink), Chunk(as_token_ids([500, 501, 7]))
    known.add(after_sink)
    known.add(begins_with_it)
    assert set(KnownChunks(path, "a", sink).index) == {after_sink, begins_with_it}
    assert set(KnownChunks(path, "a").index) == set()
    assert set(KnownChunks(path, "a", sink[:1]).index) == set()


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
