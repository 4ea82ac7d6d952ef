"""Plans: spans, gaps and clipping, and how known chunks and marked segments become one plan."""

from __future__ import annotations

import random

import numpy as np
import pytest

from kvarena.core.matching import ChunkIndex, Planner
from kvarena.core.plan import Chunk, ReusePlan, Span, TokenIds, as_token_ids


def ids(rng: random.Random, count: int) -> TokenIds:
    return as_token_ids([rng.randrange(1000) for _ in range(count)])


@pytest.fixture
def rng() -> random.Random:
    return random.Random(7)


def test_gaps_and_clipping_cover_every_token_once(rng: random.Random) -> None:
    plan = ReusePlan(
        (Span(3, 10, Chunk(ids(rng, 7))), Span(10, 15, Chunk(ids(rng, 9)), 2), Span(20, 30, Chunk(ids(rng, 10))))
    )
    for start in range(0, 34):
        for end in range(start, 34):
            clipped = plan.clipped(start, end)
            covered = [i for span in clipped for i in range(span.start, span.end)]
            covered += [i for low, high in plan.gaps(start, end) for i in range(low, high)]
            assert sorted(covered) == list(range(start, end))
            for span in clipped:
                whole = next(s for s in plan if s.start <= span.start < s.end)
                assert span.offset - whole.offset == span.start - whole.start


def test_overlapping_spans_are_a_bug(rng: random.Random) -> None:
    chunk = Chunk(ids(rng, 10))
    with pytest.raises(AssertionError, match="overlap"):
        ReusePlan((Span(0, 10, chunk), Span(9, 19, chunk)))


def test_keys_tell_tokens_and_salts_apart() -> None:
    keys = {Chunk(as_token_ids(t), s).key for t in ([1, 2], [2, 1], [1], []) for s in ("", "a", "b")}
    assert len(keys) == 12
    assert Chunk(as_token_ids([1, 2])) == Chunk(as_token_ids([1, 2]))


def test_keys_tell_sinks_apart() -> None:
    sinks = [as_token_ids(sink) for sink in ([], [1], [1, 2], [2, 1])]
    assert len({Chunk(as_token_ids([7, 8]), salt, sink).key for sink in sinks for salt in ("", "a")}) == 8
    assert Chunk(as_token_ids([7, 8]), "", sinks[0]) == Chunk(as_token_ids([7, 8])), "as if there were no sinks"
    assert Chunk(as_token_ids([7, 8]), "", sinks[2]).after_sink.tolist() == [1, 2, 7, 8]


def test_only_an_unmoved_beginning_is_exact(rng: random.Random) -> None:
    chunk = Chunk(ids(rng, 10))
    assert ReusePlan().is_prefix
    assert ReusePlan((Span(0, 10, chunk),)).is_prefix
    assert not ReusePlan((Span(1, 11, chunk),)).is_prefix
    assert not ReusePlan((Span(0, 8, chunk, 2),)).is_prefix
    assert not ReusePlan((Span(0, 10, chunk), Span(10, 20, chunk))).is_prefix


def test_chunks_follow_the_sink_but_for_those_that_begin_with_it(rng: random.Random) -> None:
    sink, first, second = as_token_ids([2000, 2001]), ids(rng, 40), ids(rng, 40)
    system = np.concatenate([sink, ids(rng, 30)])
    planner = Planner(ChunkIndex(), sink=sink)

    plan = planner.plan(np.concatenate([system, first, second]), [(0, 32), (32, 72), (72, 112)])
    assert [span.chunk.sink.tolist() for span in plan] == [[], [2000, 2001], [2000, 2001]]
    assert [span.is_exact for span in plan] == [True, False, False]
    assert [span.start for span in plan.inexact] == [32, 72]

    directly = planner.plan(np.concatenate([sink, first, second]), [(2, 42), (42, 82)])
    assert [span.is_exact for span in directly] == [True, False]
    assert not directly.is_prefix
    assert planner.plan(np.concatenate([sink, first]), [(2, 42)]).is_prefix
    assert planner.plan(np.concatenate([sink, first]), [(2, 42)]).clipped(10, 42).is_prefix, "it goes on exactly"
    other = planner.plan(np.concatenate([sink[::-1], first]), [(2, 42)])
    assert not other.is_prefix, "what stands before it isn't the sink"
    alone = planner.plan(first, [(0, 40)])
    assert not alone.is_prefix, "it was computed after the sink, which isn't there"


def test_a_known_chunk_is_found_with_its_sink_and_exact_where_it_follows_it(rng: random.Random) -> None:
    sink, text = as_token_ids([2000]), ids(rng, 60)
    planner = Planner(ChunkIndex(), sink=sink)
    (span,) = planner.plan(text, [(0, 60)])
    planner.index.add(span.chunk)
    (moved,) = planner.plan(np.concatenate([ids(rng, 5), text, ids(rng, 5)]))
    (placed,) = planner.plan(np.concatenate([sink, text, ids(rng, 5)]))
    assert moved.chunk == placed.chunk == span.chunk
    assert (moved.is_exact, placed.is_exact) == (False, True)


def test_an_unknown_segment_becomes_a_chunk_and_a_known_one_is_found_without_boundaries(rng: random.Random) -> None:
    planner = Planner(ChunkIndex())
    prompt = ids(rng, 200)
    (span,) = planner.plan(prompt, [(20, 120)])
    assert (span.start, span.end, span.is_whole_chunk) == (20, 120, True)
    planner.index.add(span.chunk)
    moved = np.concatenate([ids(rng, 50), prompt[20:120], ids(rng, 50)])
    assert [(s.start, s.end) for s in planner.plan(moved)] == [(50, 150)]


def test_a_segment_made_of_known_chunks_is_not_stored_again(rng: random.Random) -> None:
    planner = Planner(ChunkIndex())
    parts = [Chunk(ids(rng, 100)), Chunk(ids(rng, 60))]
    for part in parts:
        planner.index.add(part)
    prompt = np.concatenate([ids(rng, 10), parts[0].token_ids, parts[1].token_ids, ids(rng, 30)])
    plan = planner.plan(prompt, [(10, 180)])
    assert [span.chunk for span in plan] == parts


def test_short_segments_and_empty_prompts_have_no_plan(rng: random.Random) -> None:
    planner = Planner(ChunkIndex(), min_chunk_tokens=16)
    assert not planner.plan(ids(rng, 100), [(0, 15), (20, 20), (40, 50)]).spans
    assert not planner.plan(ids(rng, 0)).spans


def test_a_chunk_twice_in_a_prompt_is_two_spans_of_one_chunk(rng: random.Random) -> None:
    planner = Planner(ChunkIndex())
    text = ids(rng, 50)
    plan = planner.plan(np.concatenate([text, ids(rng, 5), text]), [(0, 50), (55, 105)])
    assert [span.start for span in plan] == [0, 55]
    assert len({span.chunk for span in plan}) == 1


def test_the_question_joins_a_blend_only_where_that_runs_the_model_anyway(rng: random.Random) -> None:
    planner = Planner(ChunkIndex())
    first, second = Chunk(ids(rng, 40)), Chunk(ids(rng, 60))
    last = 120
    moved = ReusePlan((Span(0, 40, first), Span(40, 100, second)))
    assert planner.blend_end(moved, 0, last) == last
    assert planner.blend_end(moved, 0, last, recomputes_none=True) == 100, "vLLM's own pass is the only one"
    with_gap = ReusePlan((Span(0, 40, first), Span(42, 102, second)))
    assert planner.blend_end(with_gap, 0, last, recomputes_none=True) == last
    exact = ReusePlan((Span(0, 40, first),))
    assert planner.blend_end(exact, 0, 60) == 40, "nothing of it is recomputed"
    assert planner.blend_end(moved, 0, 100 + planner.max_joined_tokens + 1) == 100
