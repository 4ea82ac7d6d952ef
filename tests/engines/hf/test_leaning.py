"""The chunk that a recomputed token leans on: by the blend over a tiny model, and from stock eager attention."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicCache

from kvarena.core.blend import BlendTask
from kvarena.core.plan import as_token_ids
from kvarena.core.report import BlendReport
from kvarena.engines.hf.blend import HFPrefilledModel
from kvarena.policies.params import BlendParams, make_policy
from support.blended import SEPARATOR, Blended
from support.families import save_family
from support.tiny_models import random_text

LENGTHS = (50, 30, 40)


@pytest.fixture(params=["llama", "qwen3", "gemma3_short"])
def blended(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Blended]:
    blended = Blended.load(save_family(tmp_path, request.param))
    yield blended
    blended.model.close()


class KeptCache(DynamicCache):  # type: ignore[misc]
    """In which some tokens' KV is what it was before from some layer on, as in a blend that recomputes the others."""

    def __init__(self, kept: torch.Tensor, before: torch.Tensor, first_layer: int) -> None:
        """`before` is `(L, 2, H_kv, T, D)`."""
        super().__init__()
        self._kept, self._before, self._first_layer = kept, before, first_layer

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        kv: tuple[torch.Tensor, torch.Tensor] = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        for own, before in zip(kv, self._before[layer_idx], strict=True):
            if layer_idx >= self._first_layer:
                own[0, :, self._kept] = before[:, self._kept]
        return kv


@torch.inference_mode()
def attention_in_blend(
    blended: Blended, ids: list[int], report: BlendReport, layer: int, chosen_at: int
) -> torch.Tensor:
    """`(T, T)`, averaged over heads; of the tokens that are run the rows are those of the blend."""
    before, _ = blended.blind(ids, report.spans)
    recomputed = {at for start, end in report.recomputed_spans for at in range(start, end)}
    kept = torch.tensor([at for start, end in report.spans for at in range(start, end) if at not in recomputed])
    blended.reference.set_attn_implementation("eager")
    try:
        whole = blended.reference(
            torch.tensor([ids]), past_key_values=KeptCache(kept, before, chosen_at), output_attentions=True
        )
    finally:
        blended.reference.set_attn_implementation("sdpa")
    mean: torch.Tensor = whole.attentions[layer][0].mean(dim=0)
    return mean


def blend(blended: Blended, ids: list[int], params: BlendParams, piece_tokens: int, details: bool) -> Any:
    """The report and the KV of all but the last token."""
    token_ids, end = as_token_ids(ids), len(ids) - 1
    report, kv = BlendReport(wants_scores=details), blended.model.new_kv(len(ids))

    def run() -> None:
        prompt = HFPrefilledModel(blended.blender._blendable, token_ids[:end], kv)
        task = BlendTask(blended.blender._plan(token_ids), 0, end, make_policy(params))
        for _ in blended.blender._blender.in_pieces(prompt, task, report, piece_tokens):
            pass

    blended.model.run(run)
    assert report.blend_failures == 0
    return report, kv.filled(0, end)


@pytest.mark.parametrize("piece_tokens", [7, 4096])
@pytest.mark.parametrize(("policy", "layer"), [("query_attention", 1), ("kv_deviation", 2), ("kv_deviation", 0)])
def test_a_token_leans_on_the_other_chunk_that_it_attends_to_most(
    blended: Blended, policy: str, layer: int, piece_tokens: int
) -> None:
    rng = random.Random(layer)
    ids = blended.encode("".join(SEPARATOR + random_text(rng, length) for length in LENGTHS) + SEPARATOR + "who?")
    params = BlendParams(policy, 0.4, layer)
    blended.prefill(ids, params)
    report, kv = blend(blended, ids, params, piece_tokens, details=True)
    stock, stock_kv = blend(blended, ids, params, piece_tokens, details=False)
    assert stock.leans_on is None
    assert (report.recomputed_spans, report.spans) == (stock.recomputed_spans, stock.spans)
    torch.testing.assert_close(kv, stock_kv)

    told = {at: (start, end, share) for at, start, end, share in report.leans_on.tokens}
    assert report.leans_on.what == f"share of its attention, layer {layer}"
    chosen_at = layer if policy == "kv_deviation" else 0  # before that layer it has run all tokens
    attention = attention_in_blend(blended, ids, report, layer, chosen_at)
    spans = [span for span in report.spans if span[0] > 0]
    expected = {}
    for low, high in report.recomputed_spans:
        for at in range(low, high):
            others = [span for span in spans if span[1] <= at]
            if low > 0 and others and any(start <= at < end for start, end in spans):
                expected[at] = {span: float(attention[at, span[0] : span[1]].sum()) for span in others}
    assert set(told) == set(expected)
    assert len(told) > 10
    for at, (start, end, share) in told.items():
        assert share == pytest.approx(expected[at][start, end], rel=1e-3, abs=1e-5)
        assert share == pytest.approx(max(expected[at].values()), rel=1e-3, abs=1e-5)


def test_of_a_long_blend_nothing_is_told(blended: Blended, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(5)
    ids = blended.encode("".join(SEPARATOR + random_text(rng, length) for length in LENGTHS) + SEPARATOR + "who?")
    params = BlendParams("kv_deviation", 0.4, 1)
    blended.prefill(ids, params)
    monkeypatch.setattr("kvarena.core.blend.MAX_WATCHED_TOKENS", len(ids) - 10)
    report, _ = blend(blended, ids, params, 4096, details=True)
    assert report.token_scores is not None
    assert report.leans_on is None
