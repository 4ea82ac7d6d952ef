"""Models that can't be blended, on real vLLM: the server doesn't start and says why, or serves them as plain does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from engine import MEMORY, PIECES, Step, plain_tokens, run_in_engine, run_steps

from blended import make_prompts
from families import save_kind

pytestmark = pytest.mark.slow
PLAIN = replace(MEMORY, unsupported="plain")
MLA: dict[str, Any] = {
    "kv_lora_rank": 32,
    "q_lora_rank": None,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    "num_key_value_heads": 4,
    "head_dim": None,
    "first_k_dense_replace": 4,
}
HYBRID: dict[str, Any] = {
    "layer_types": ["mamba", "attention", "mamba", "attention"],
    "mamba_n_heads": 8,
    "mamba_d_head": 32,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "num_local_experts": 0,
    "shared_intermediate_size": 256,
}
KINDS: dict[str, tuple[str, dict[str, Any], str]] = {
    "window": ("mistral", {"sliding_window": 64}, "sliding window of 64 tokens is shorter than the context of 2048"),
    "hybrid": ("granitemoehybrid", HYBRID, "it keeps a recurrent state"),
    "dynamic": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
        r"depend on the length of the text \(dynamic\)",
    ),
    "mla": ("deepseek_v2", MLA, "latent attention"),
}


@pytest.mark.parametrize("name", KINDS)
def test_it_is_refused_at_start_with_the_reason(name: str, tmp_path: Path) -> None:
    kind, settings, reason = KINDS[name]
    model = str(save_kind(tmp_path, kind, **settings))
    with pytest.raises(ValueError, match=f"can't be blended: .*{reason}.*--blend-unsupported plain"):
        run_in_engine(run_steps, model, MEMORY, [], {})


@pytest.mark.parametrize("name", ["window", "hybrid"])
def test_it_is_served_plain_where_that_is_wanted(name: str, tmp_path: Path) -> None:
    kind, settings, _ = KINDS[name]
    model, prompts = str(save_kind(tmp_path, kind, **settings)), make_prompts(0, 4)
    expected = run_in_engine(plain_tokens, model, prompts, 16, **PIECES)
    steps = [Step(prompts, 16, {"ratio": 0})] * 2
    for outcome in run_in_engine(run_steps, model, PLAIN, steps, PIECES):
        assert outcome.tokens == expected
        assert outcome.num_left_behind == 0
        for report in outcome.reports:
            assert not report["approximate"]
            assert {span["source"] for span in report["spans"]} <= {"computed", "prefix"}
            assert report["num_recomputed_tokens"] == report["store_misses"] == 0
            assert report["num_reused_tokens"] == report["num_prefix_tokens"]
