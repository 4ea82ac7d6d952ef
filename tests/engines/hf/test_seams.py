"""Chunks after the very chunk before them: their KV by stock forwards in Hugging Face, and what stands for what."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from kvarena.core.plan import Span, as_token_ids
from kvarena.core.store import get
from kvarena.engines.hf.blend import HFBlender
from kvarena.policies.params import BlendParams
from support.blended import SEPARATOR, Blended, cached_kv
from support.families import save_family
from support.tiny_models import random_text

NONE = BlendParams("none")
LENGTHS = (90, 40, 70, 60)


@pytest.fixture(params=["llama", "gemma3_short"])
def blended(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Blended]:
    blended = Blended.load(save_family(tmp_path, request.param))
    blended.blender = HFBlender(blended.model, blended.store, separator=SEPARATOR, sink_tokens=1, seams=True)
    yield blended
    blended.model.close()


def texts(seed: int) -> list[str]:
    rng = random.Random(seed)
    return [random_text(rng, length) for length in LENGTHS]


def prompt_of(blended: Blended, of: list[str], head: str = "") -> list[int]:
    return [*blended.sink, *blended.encode(head + "".join(SEPARATOR + text for text in of) + SEPARATOR + "who?")]


def spans_of(blended: Blended, ids: list[int]) -> list[Span]:
    return list(blended.blender._plan(as_token_ids(ids)))


@torch.inference_mode()
def kv_after(blended: Blended, before: list[int], ids: list[int], start: int) -> torch.Tensor:
    """KV `(L, 2, H_kv, T, D)` of tokens that begin at `start`, with only these before them."""
    positions = torch.arange(start - len(before), start + len(ids))[None]
    cache = DynamicCache()
    blended.reference(torch.tensor([before + ids]), position_ids=positions, past_key_values=cache, use_cache=True)
    return cached_kv(cache)[:, :, :, len(before) :]


def test_a_chunk_has_seen_the_one_before_it(blended: Blended) -> None:
    ids = prompt_of(blended, texts(1))
    made = blended.blender.make_seams(ids)
    assert (made.num_seams, made.store_misses) == (0, 1), "the first chunk stands after none"
    report = blended.prefill(ids, NONE)
    spans = spans_of(blended, ids)
    assert (report.report.num_seams, report.report.store_misses) == (len(spans) - 1, 0)
    for before, span in zip([None, *spans], spans, strict=False):
        own = ids[span.start : span.end]
        seen = [*blended.sink, *(ids[before.start : before.end] if before else [])]
        seen = [] if before is None and span.is_exact else seen
        expected = kv_after(blended, seen, own, span.start)
        torch.testing.assert_close(report.kv.filled(span.start, span.end), expected, atol=2e-3, rtol=1e-3)


def test_in_another_order_only_the_pairs_that_are_left_count(blended: Blended) -> None:
    first, second, third, fourth = texts(2)
    blended.blender.make_seams(prompt_of(blended, [first, second, third, fourth]))
    other = prompt_of(blended, [third, fourth, first, second])
    assert blended.prefill(other, NONE).report.num_seams == 2
    backwards = prompt_of(blended, [fourth, third, second, first])
    assert blended.prefill(backwards, NONE).report.num_seams == 0


def test_everything_recomputed_is_full_prefill(blended: Blended) -> None:
    ids = prompt_of(blended, texts(3))
    blended.blender.make_seams(ids)
    result = blended.prefill(ids, BlendParams("all"))
    kv, logits = blended.blind(ids, [])
    torch.testing.assert_close(result.kv.filled(0, len(ids)), kv, atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(result.logits, logits, atol=2e-3, rtol=1e-3)


def test_a_chunk_after_all_that_stands_before_it_is_exact(blended: Blended) -> None:
    """The prompt's beginning is a chunk, and the seam after it has seen everything."""
    ids = prompt_of(blended, texts(4)[:1], head=random_text(random.Random(4), 30))
    spans = spans_of(blended, ids)
    assert [span.start for span in spans][:1] == [0]
    blended.blender.make_seams(ids)
    result = blended.prefill(ids, BlendParams(ratio=0.5, check_layer=1))
    assert (result.report.num_seams, result.report.num_recomputed_tokens) == (1, 0)
    kv, _ = blended.blind(ids, [])
    torch.testing.assert_close(result.kv.filled(0, len(ids)), kv, atol=2e-3, rtol=1e-3)


def test_without_a_seam_the_chunk_by_itself_is_taken(blended: Blended) -> None:
    of = texts(5)
    ids = prompt_of(blended, of)
    blended.prefill(ids, NONE)
    report = blended.prefill(ids, NONE).report
    assert (report.num_seams, report.store_misses, report.misses) == (0, 0, [])
    blended.blender.make_seams(prompt_of(blended, of[:2]))
    assert blended.prefill(ids, NONE).report.num_seams == 1


def test_seams_are_not_looked_for_where_they_are_not_wanted(blended: Blended) -> None:
    ids = prompt_of(blended, texts(6))
    blended.blender.make_seams(ids)
    without = HFBlender(blended.model, blended.store, separator=SEPARATOR, sink_tokens=1)
    result = without.prefill(ids, NONE, len(ids))
    assert (result.report.num_seams, result.report.store_misses) == (0, len(spans_of(blended, ids)) - 1)


def test_scores_of_a_chunk_go_on_to_its_seam(blended: Blended) -> None:
    ids = prompt_of(blended, texts(7))
    blended.blender.score(ids)
    spans = spans_of(blended, ids)
    blended.blender._blender.puts.wait_for([span.chunk for span in spans], 60)
    blended.blender.make_seams(ids)
    seams = blended.blender._planner.seams(blended.blender._plan(as_token_ids(ids)), as_token_ids(ids))
    blended.blender._blender.puts.wait_for([seam.chunk for seam in seams.values()], 60)
    scored = 0
    for span in spans[1:]:
        seam = seams[span.start].chunk
        assert get(blended.store, seam) is not None
        with blended.store.retrieval([span.chunk, seam]) as retrieval:
            retrieval.take([0, 1])
            own, of_seam = retrieval.scores(0), retrieval.scores(1)
        assert (own is None) == (of_seam is None)
        if own is not None and of_seam is not None:
            torch.testing.assert_close(own, of_seam)
            scored += 1
    assert scored > 0
