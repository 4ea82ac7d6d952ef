"""Every family of models that vLLM serves with ordinary attention is blended by the same code, on real vLLM.

For each, token for token: ratio 1.0 equals plain vLLM, ratio 0 equals naive reuse written with Hugging Face, a ratio in
between equals the blend over Hugging Face. Prompts run in one batch and in pieces, the prefix cache is on.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from kvarena.policies.params import BlendParams
from support.blended import Blended, make_prompts
from support.families import FAMILIES, save_family
from support.quantized import quantize_to_int8
from support.references import NaiveReuse
from support.vllm_engine import MEMORY, PIECES, Outcome, Step, plain_tokens, run_in_engine, run_steps

pytestmark = pytest.mark.slow
NUM_TOKENS = 16
DEVIATION = BlendParams(ratio=0.2, check_layer=2)


def run(model: Path, prompts: list[str]) -> tuple[list[list[int]], Outcome, Outcome, Outcome]:
    """Tokens of plain vLLM, and what the blend did at the ratios 0 and 1, and in between."""
    settings = PIECES | {"disable_hybrid_kv_cache_manager": True}
    plain = run_in_engine(plain_tokens, str(model), prompts, NUM_TOKENS, **PIECES)
    steps = [Step(prompts, NUM_TOKENS, dataclasses.asdict(DEVIATION) | {"ratio": ratio}) for ratio in (0, 1, 0.2)]
    cold = Step(prompts, 1, {"policy": "none"})
    _, naive, exact, blend = run_in_engine(run_steps, str(model), MEMORY, [cold, *steps], settings)
    assert sum(report["num_reused_tokens"] for report in naive.reports) > 500
    assert sum(report["num_recomputed_tokens"] for report in exact.reports) > 500
    assert sum(report["store_errors"] for report in naive.reports + exact.reports + blend.reports) == 0
    return plain, naive, exact, blend


@pytest.mark.parametrize("name", FAMILIES)
def test_family(name: str, tmp_path: Path) -> None:
    model, prompts = save_family(tmp_path, name), make_prompts(0, 5)
    plain, naive, exact, blend = run(model, prompts)
    assert exact.tokens == plain
    assert naive.tokens != plain, "naive reuse changed nothing, so this test shows nothing"
    reference = NaiveReuse(str(model))
    for prompt, report, tokens in zip(prompts, naive.reports, naive.tokens, strict=True):
        assert tokens == reference.generate(prompt, report["spans"], NUM_TOKENS)
    blended = Blended.load(model)
    for prompt in prompts:
        blended.prefill(blended.encode(prompt), BlendParams("none"))
    for prompt, report, tokens in zip(prompts, blend.reports, blend.tokens, strict=True):
        expected = blended.prefill(blended.encode(prompt), DEVIATION)
        assert report["num_recomputed_tokens"] == expected.report.num_recomputed_tokens > 0
        assert tokens == blended.greedy(expected, NUM_TOKENS)
    blended.model.close()


def test_ratio_one_equals_plain_vllm_with_quantized_weights(tmp_path: Path) -> None:
    plain, naive, exact, _ = run(quantize_to_int8(save_family(tmp_path, "llama")), make_prompts(0, 5))
    assert exact.tokens == plain
    assert naive.tokens != plain, "naive reuse changed nothing, so this test shows nothing"
