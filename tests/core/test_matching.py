"""Known chunks are found wherever they stand, and the index stays whole under any sequence of operations."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvarena.core.matching import ChunkIndex, window_hashes
from kvarena.core.plan import Chunk, TokenIds, as_token_ids


def ids(rng: random.Random, count: int, vocabulary: int = 1000) -> TokenIds:
    return as_token_ids([rng.randrange(vocabulary) for _ in range(count)])


def test_finds_chunks_anywhere_in_any_order() -> None:
    rng = random.Random(1)
    chunks = [Chunk(ids(rng, n)) for n in (40, 300, 77, 16)]
    index = ChunkIndex()
    for chunk in chunks:
        index.add(chunk)
    order = [2, 0, 3, 1, 2]
    pieces = [ids(rng, 5)]
    for i in order:
        pieces += [chunks[i].token_ids, ids(rng, rng.randrange(9))]
    prompt = np.concatenate(pieces)
    spans = index.match(prompt)
    assert [span.chunk for span in spans] == [chunks[i] for i in order]
    for span in spans:
        assert span.is_whole_chunk
        assert np.array_equal(prompt[span.start : span.end], span.chunk.token_ids)


def test_finds_a_chunk_whose_ends_tokenised_differently() -> None:
    rng = random.Random(2)
    chunk = Chunk(ids(rng, 120))
    index = ChunkIndex()
    index.add(chunk)
    prompt = np.concatenate([ids(rng, 30), chunk.token_ids[1:-1], ids(rng, 30)])
    (span,) = index.match(prompt)
    assert (span.start, span.end, span.offset) == (30, 148, 1)


def test_another_salt_finds_nothing() -> None:
    rng = random.Random(3)
    index = ChunkIndex()
    chunk = Chunk(ids(rng, 64), salt="a")
    index.add(chunk)
    assert index.match(chunk.token_ids, "a")
    assert not index.match(chunk.token_ids, "b")
    assert not index.match(chunk.token_ids)


def test_short_partial_matches_do_not_count() -> None:
    rng = random.Random(4)
    index = ChunkIndex()
    index.add(Chunk(ids(rng, 200)))
    (chunk,) = index
    assert not index.match(np.concatenate([ids(rng, 9), chunk.token_ids[:31], ids(rng, 9)]), min_tokens=32)
    assert index.match(np.concatenate([ids(rng, 9), chunk.token_ids[:32], ids(rng, 9)]), min_tokens=32)


def test_a_hash_hit_still_compares_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvarena.core.matching.window_hashes", lambda t, w: np.zeros(max(0, len(t) - w + 1), np.uint64))
    rng = random.Random(5)
    index = ChunkIndex()
    index.add(Chunk(ids(rng, 64)))
    assert index.match(ids(rng, 200)) == []


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(1, 20))
def test_rolling_hash_depends_on_the_window_only(tokens: list[int], window: int) -> None:
    array = as_token_ids(tokens)
    hashes = window_hashes(array, window)
    assert len(hashes) == max(0, len(tokens) - window + 1)
    for i, value in enumerate(hashes):
        assert window_hashes(array[i : i + window], window)[0] == value


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32))
def test_matches_are_real_and_nothing_long_is_missed(seed: int) -> None:
    rng = random.Random(seed)
    index = ChunkIndex(window=4)
    chunks = [Chunk(ids(rng, rng.randrange(4, 30), 4)) for _ in range(4)]
    for chunk in chunks:
        index.add(chunk)
    prompt = ids(rng, 80, 4)
    spans = index.match(prompt, min_tokens=6)
    end = 0
    for span in spans:
        assert span.start >= end
        end = span.end
        part = span.chunk.token_ids[span.offset : span.offset + len(span)]
        assert np.array_equal(prompt[span.start : span.end], part)
        assert len(span) >= 6 or span.is_whole_chunk
    covered = {i for span in spans for i in range(span.start, span.end)}
    for chunk in chunks:
        for start in range(len(prompt) - len(chunk) + 1):
            if np.array_equal(prompt[start : start + len(chunk)], chunk.token_ids):
                assert covered & set(range(start, start + len(chunk))), "a whole chunk was overlooked"


def records(rng: random.Random, num_lines: int, *, fixed: TokenIds) -> TokenIds:
    """Lines as logs and JSON have them: field names that are the same on each, values that aren't."""
    return np.concatenate([part for _ in range(num_lines) for part in (fixed, ids(rng, 9, 50_000))])


@pytest.mark.parametrize("num_lines", [500, 1000, 3000])
def test_the_work_is_linear_on_text_that_repeats_itself(num_lines: int) -> None:
    """Each line's field names are in every known chunk, and nothing is long enough to count."""
    rng = random.Random(7)
    fixed = ids(rng, 24)
    index = ChunkIndex()
    for _ in range(100):
        index.add(Chunk(records(rng, 15, fixed=fixed)))
    prompt = records(rng, num_lines, fixed=fixed)
    assert index.match(prompt) == []
    assert index.num_comparisons <= 2 * index.FREE_COMPARISONS, "repeated windows are given up"

    (known, *_) = index
    (span,) = index.match(np.concatenate([prompt, known.token_ids, prompt]))
    assert span.is_whole_chunk
    assert span.start == len(prompt), "a chunk of such lines is found among them"


def test_the_work_has_a_bound_on_any_text() -> None:
    """Every window of the prompt is known, from places that go on differently."""
    rng = random.Random(8)
    index = ChunkIndex()
    windows = [ids(rng, 16) for _ in range(2000)]
    for _ in range(20):
        index.add(Chunk(np.concatenate([part for window in windows for part in (window, ids(rng, 16, 50_000))])))
    before = index.num_comparisons
    prompt = np.concatenate([part for window in windows for part in (window, ids(rng, 1, 50_000))])
    index.match(prompt, min_tokens=64)
    assert index.num_comparisons - before <= len(prompt) // 2 + index.FREE_COMPARISONS + index.max_candidates


def test_integrity_under_random_operations() -> None:
    rng = random.Random(6)
    index = ChunkIndex(window=4, max_tokens=400)
    pool = [Chunk(ids(rng, rng.randrange(1, 90), 5), rng.choice(["", "a"])) for _ in range(40)]
    for _ in range(3000):
        chunk = rng.choice(pool)
        match rng.randrange(4):
            case 0 | 1:
                dropped = index.add(chunk)
                assert not any(gone in index for gone in dropped)
            case 2:
                index.remove(chunk)
                assert chunk not in index
            case _:
                index.match(np.concatenate([c.token_ids for c in rng.choices(pool, k=3)]), chunk.salt)
        index.check_integrity()
