"""Scores of chunks: by the blend over a tiny model, and by their definition from stock forwards in Hugging Face."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from kvarena.core.attention import MIN_CONTEXT_TOKENS, QUERY_STRIDE
from kvarena.core.plan import Chunk, as_token_ids
from kvarena.core.store import Scores
from kvarena.policies.params import BlendParams
from support.blended import SEPARATOR, Blended
from support.families import save_family
from support.tiny_models import random_text

LENGTHS = (90, 40, 70, 110)


@pytest.fixture(params=["llama", "qwen3", "gemma3_short"])
def blended(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Blended]:
    blended = Blended.load(save_family(tmp_path, request.param))
    yield blended
    blended.model.close()


def texts(seed: int) -> list[str]:
    rng = random.Random(seed)
    return [random_text(rng, length) for length in LENGTHS]


def prompt_of(blended: Blended, of: list[str]) -> list[int]:
    """After the sink, as a chat template would put it there."""
    return [*blended.sink, *blended.encode("".join(SEPARATOR + text for text in of) + SEPARATOR)]


def chunks_of(blended: Blended, ids: list[int]) -> list[tuple[int, Chunk]]:
    """Each with its place; the beginning of the prompt is one too."""
    plan = blended.blender._plan(as_token_ids(ids))
    return [(span.start, span.chunk) for span in plan]


def stored_scores(blended: Blended, chunk: Chunk) -> torch.Tensor | None:
    blended.blender._blender.puts.wait_for([chunk], 60)
    with blended.store.retrieval([chunk]) as retrieval:
        retrieval.take([0])
        return retrieval.scores(0)


def scores_of(blended: Blended, chunk: Chunk) -> list[float]:
    scores = stored_scores(blended, chunk)
    assert scores is not None
    deviation, attention = scores.unbind(1)
    found: list[float] = (deviation * attention.sqrt()).tolist()
    return found


def written_out(blended: Blended, ids: list[int], start: int, chunk: Chunk) -> torch.Tensor:
    """By the definition, from the model's own forwards with eager attention."""
    model, end = blended.reference, start + len(chunk)
    model.set_attn_implementation("eager")
    try:
        with torch.inference_mode():
            whole = model(torch.tensor([ids]), past_key_values=DynamicCache(), output_attentions=True)
            text = torch.tensor([[*chunk.sink.tolist(), *chunk.token_ids.tolist()]])
            alone = model(text, past_key_values=DynamicCache())
    finally:
        model.set_attn_implementation("sdpa")
    deviation, attention = [], []
    for layer, weights in enumerate(whole.attentions):
        in_prompt = whole.past_key_values.layers[layer].values[0, :, start:end]
        by_itself = alone.past_key_values.layers[layer].values[0, :, len(chunk.sink) :]
        moved = (in_prompt - by_itself).square().sum(dim=(0, 2))
        if layer:
            deviation.append(moved / moved.mean())
        after = [row for row in range(0, len(ids) - 1, QUERY_STRIDE) if row >= end]
        received = weights[0, :, after, start:end].sum(dim=(0, 1))
        attention.append(received / received.mean())
    return torch.stack([torch.stack(of).mean(0) for of in (deviation, attention)], dim=1)


def test_scores_are_deviation_and_attention(blended: Blended) -> None:
    ids = prompt_of(blended, texts(1))
    report = blended.blender.score(ids)
    assert (report.num_reused_tokens, report.num_computed_tokens + report.num_recomputed_tokens) == (0, len(ids) - 1)
    scored = 0
    for start, chunk in chunks_of(blended, ids):
        found = stored_scores(blended, chunk)
        if start < MIN_CONTEXT_TOKENS or len(ids) - 1 - start - len(chunk) < MIN_CONTEXT_TOKENS:
            assert found is None, "too little comes before or after it"
        else:
            assert found is not None
            torch.testing.assert_close(found, written_out(blended, ids, start, chunk), rtol=1e-3, atol=1e-3)
            scored += 1
    assert scored >= 2


def test_a_prompt_without_chunks_is_computed_and_shows_no_scores(blended: Blended) -> None:
    ids = blended.encode(random_text(random.Random(9), 60))
    report = blended.blender.score(ids)
    assert (report.blend_failures, report.num_reused_tokens) == (0, 0)
    assert report.num_computed_tokens + report.num_recomputed_tokens == len(ids) - 1


def test_scores_of_several_prompts_are_their_mean(blended: Blended) -> None:
    of = texts(2)
    prompts = [prompt_of(blended, of), prompt_of(blended, [of[3], of[1], of[2], of[0]])]
    for ids in prompts:
        blended.blender.score(ids)
    first, second = ({chunk: start for start, chunk in chunks_of(blended, ids)} for ids in prompts)
    in_both = [chunk for chunk in first if min(first[chunk], second.get(chunk, 0)) >= MIN_CONTEXT_TOKENS]
    chunk = min(in_both, key=lambda chunk: max(first[chunk], second[chunk]))
    expected = [written_out(blended, ids, of[chunk], chunk) for ids, of in zip(prompts, (first, second), strict=True)]
    found = stored_scores(blended, chunk)
    assert found is not None
    torch.testing.assert_close(found, sum(expected) / 2, rtol=1e-3, atol=1e-3)


def test_the_highest_scores_are_recomputed_and_without_scores_a_layer_chooses(blended: Blended) -> None:
    of = texts(3)
    ids = prompt_of(blended, of)
    params = BlendParams("stored_deviation", 0.2, 1)
    assert blended.prefill(ids, params).report.store_misses == len(of)
    unscored = blended.prefill(ids, params).report
    assert unscored.unscored_chunks == len(of) - 1, "before the first one stands next to nothing"
    online = blended.prefill(ids, BlendParams("kv_deviation", 0.2, 1, deviation="values")).report
    assert unscored.num_recomputed_tokens == online.num_recomputed_tokens > 0

    for order in (of, [of[2], of[0], of[3], of[1]], [of[1], of[0], of[3], of[2]], [of[3], of[2], of[1], of[0]]):
        blended.blender.score(prompt_of(blended, order))
    scored = blended.prefill(ids, params)
    assert scored.report.unscored_chunks == 0
    by_score = sorted(
        (-float(score), start + place)
        for start, chunk in chunks_of(blended, ids)
        for place, score in enumerate(scores_of(blended, chunk))
    )
    chosen = {place for _, place in by_score[: scored.report.num_recomputed_tokens]}
    blind, _ = blended.blind(ids, scored.report.spans)
    reused = torch.cat([torch.arange(start, end) for start, end in scored.report.spans])
    differs = (scored.kv.filled(0, len(ids)) - blind)[-1][:, :, reused].abs().amax(dim=(0, 1, 3)) > 2e-3
    recomputed = set(reused[differs].tolist())
    assert recomputed <= chosen
    assert len(recomputed) > 0.8 * len(chosen)


def test_a_mean_follows_what_comes_later() -> None:
    scores: Scores | None = None
    for _ in range(100):
        scores = Scores.with_one_more(scores, torch.zeros(3))
    for _ in range(60):
        scores = Scores.with_one_more(scores, torch.ones(3))
    assert scores is not None
    assert scores.mean.min() > 0.95
