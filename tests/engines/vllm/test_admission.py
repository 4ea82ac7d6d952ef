"""Which new chunks are kept: all, until the store loses what it had; from then on those that come a second time."""

from __future__ import annotations

from kvarena.core.plan import Chunk, as_token_ids
from kvarena.engines.vllm.scheduler import Admission


def chunk_of(seed: int) -> Chunk:
    return Chunk(as_token_ids(range(seed, seed + 40)))


def chunks(first: int, last: int) -> list[Chunk]:
    return [chunk_of(seed) for seed in range(first, last)]


def that_holds(*held: Chunk) -> Admission:
    admission = Admission()
    admission.note(held, ())
    return admission


def test_a_store_with_room_takes_everything() -> None:
    admission = that_holds(*chunks(0, 200))
    admission.note(chunks(0, 200), chunks(0, 5))
    assert all(admission.admits(chunk) for chunk in chunks(1000, 1050))


def test_a_full_store_takes_what_comes_twice() -> None:
    admission = that_holds(*chunks(0, 100))
    admission.note(chunks(0, 100), chunks(0, 20))
    new = [chunk_of(1000 + seed) for seed in (1, 2, 1, 3, 2)]
    assert [admission.admits(chunk) for chunk in new] == [False, False, True, False, True]
    assert not admission.admits(chunk_of(1001)), "that was forgotten when it was let in"
    admission.note(chunks(0, 300), ())
    assert admission.admits(chunk_of(1007)), "nothing was lost lately"


def test_what_is_lost_after_it_was_let_in_counts() -> None:
    admission = Admission()
    assert all(admission.admits(chunk) for chunk in chunks(0, 100))
    admission.note(chunks(0, 20), chunks(0, 20))
    assert not admission.admits(chunk_of(1000))


def test_a_store_that_was_emptied_has_room() -> None:
    """It has nothing any more of what was used just before, nor of what was used long ago."""
    known = chunks(0, 200)
    admission = that_holds(*known)
    for start in (190, 0, 10, 20, 30, 150):
        admission.note(known[start : start + 10], known[start : start + 10])
    assert all(admission.admits(chunk) for chunk in chunks(1000, 1100))
    admission.note(known[:20], known[:20])
    assert not admission.admits(chunk_of(2000)), "what it loses from now on counts"


def test_what_was_seen_is_bounded() -> None:
    admission = that_holds(*chunks(0, 100))
    admission.note(chunks(0, 30), chunks(0, 30))
    for seed in range(Admission.REMEMBERED_CHUNKS + 10):
        assert not admission.admits(Chunk(as_token_ids([seed, 1, 2])))
    assert len(admission._seen) == Admission.REMEMBERED_CHUNKS
