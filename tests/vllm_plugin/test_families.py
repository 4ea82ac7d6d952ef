"""Every family of models that vLLM serves with ordinary attention is blended by the same code, on real vLLM.

For each: ratio 1.0 equals plain vLLM, and ratio 0 equals naive reuse written with Hugging Face, token for token, with
prompts in one batch, in pieces, and on what the prefix cache has of each other.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from engine import MEMORY, Outcome, Step, plain_tokens, run_in_engine, run_steps

from blended import make_prompts
from families import FAMILIES, save_family
from quantized import quantize_to_int8
from references import NaiveReuse

pytestmark = pytest.mark.slow
NUM_TOKENS = 16
PIECES: dict[str, Any] = {"max_num_batched_tokens": 128, "max_num_seqs": 4}


def run(model: Path, prompts: list[str]) -> tuple[list[list[int]], Outcome, Outcome]:
    """Tokens of plain vLLM, and what the blend did at the ratios 0 and 1."""
    plain = run_in_engine(plain_tokens, str(model), prompts, NUM_TOKENS, **PIECES)
    steps = [Step(prompts, NUM_TOKENS, {"ratio": ratio}) for ratio in (0, 1)]
    naive, exact = run_in_engine(run_steps, str(model), MEMORY, steps, PIECES)
    assert sum(report["num_reused_tokens"] for report in naive.reports) > 500
    assert sum(report["num_recomputed_tokens"] for report in exact.reports) > 500
    assert sum(report["store_errors"] for report in naive.reports + exact.reports) == 0
    return plain, naive, exact


@pytest.mark.parametrize("name", FAMILIES)
def test_family(name: str, tmp_path: Path) -> None:
    model, prompts = save_family(tmp_path, name), make_prompts(0, 5)
    plain, naive, exact = run(model, prompts)
    assert exact.tokens == plain
    assert naive.tokens != plain, "naive reuse changed nothing, so this test shows nothing"
    reference = NaiveReuse(str(model))
    for prompt, report, tokens in zip(prompts, naive.reports, naive.tokens, strict=True):
        assert tokens == reference.generate(prompt, report["spans"], NUM_TOKENS)


def test_ratio_one_equals_plain_vllm_with_quantized_weights(tmp_path: Path) -> None:
    plain, naive, exact = run(quantize_to_int8(save_family(tmp_path, "llama")), make_prompts(0, 5))
    assert exact.tokens == plain
    assert naive.tokens != plain, "naive reuse changed nothing, so this test shows nothing"
