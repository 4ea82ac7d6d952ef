"""Models that can't be blended, on real vLLM: the server doesn't start and says why, or serves them as plain does."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    EncoderOnlyAttentionSpec,
    FullAttentionSpec,
    SlidingWindowSpec,
)

from kvarena.engines.vllm.config import BlendConfig, kv_transfer_config
from kvarena.engines.vllm.supported import refuse_spec
from support.blended import make_prompts
from support.families import LENGTH_DEPENDENT, save_kind
from support.lmcache_server import free_port
from support.vllm_engine import ENVIRONMENT, MEMORY, PIECES, Step, plain_tokens, run_in_engine, run_steps

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
    **{name: (*model, rf"depend on the length of the text \({name}\)") for name, model in LENGTH_DEPENDENT.items()},
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


SHAPE: dict[str, Any] = {"block_size": 128, "num_kv_heads": 2, "head_size": 32, "dtype": torch.float32}


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (ChunkedLocalAttentionSpec(**SHAPE, attention_chunk_size=512), "attention chunk of 512 tokens is shorter"),
        (FullAttentionSpec(**SHAPE, sliding_window=1023), "sliding window of 1023 tokens is shorter than the context"),
        (FullAttentionSpec(**SHAPE, non_causal=True), "not causal"),
        (EncoderOnlyAttentionSpec(**SHAPE), "of ordinary attention"),
    ],
    ids=["chunks", "window", "prefix LM", "encoder"],
)
def test_attention_that_doesnt_see_just_all_before_it_is_refused(spec: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        refuse_spec(spec, 1024)


def test_a_window_as_long_as_the_context_is_ordinary_attention() -> None:
    refuse_spec(SlidingWindowSpec(**SHAPE, sliding_window=1024), 1024)
    refuse_spec(ChunkedLocalAttentionSpec(**SHAPE, attention_chunk_size=1024), 1024)
    refuse_spec(FullAttentionSpec(**SHAPE), 1024)


@contextmanager
def api_server(model: str, config: BlendConfig, log: Path) -> Iterator[httpx.Client]:
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--port", str(port)]
    command += ["--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager", "--served-model-name", "tiny"]
    command += ["--kv-transfer-config", kv_transfer_config(config)]
    command += ["--middleware", "kvarena.engines.vllm.middleware.KVArenaMiddleware"]
    environment = os.environ | ENVIRONMENT | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client:
            wait_for_health(client, process, log)
            yield client
    finally:
        process.terminate()
        process.wait(30)


def wait_for_health(client: httpx.Client, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 300
    while True:
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        try:
            client.get("/health").raise_for_status()
            return
        except httpx.HTTPError:
            time.sleep(0.5)


def test_the_server_says_so(tmp_path: Path) -> None:
    """Workers, scheduler and API server are processes of their own here."""
    kind, settings, reason = KINDS["window"]
    model, log = str(save_kind(tmp_path / "model", kind, **settings)), tmp_path / "server.log"
    (prompt,) = make_prompts(0, 1)
    with api_server(model, PLAIN, log) as client:
        told = client.get("/kvarena").raise_for_status().json()
        assert told["blends"] is False
        assert told["reason"] == f"{model} can't be blended: its {reason} tokens"
        request = {"model": "tiny", "prompt": prompt, "max_tokens": 4}
        answer = client.post("/v1/completions", json=request).raise_for_status().json()
        assert answer["kv_transfer_params"]["kvarena"]["num_reused_tokens"] == 0
    assert f"{reason} tokens; it is served without blending" in log.read_text()
