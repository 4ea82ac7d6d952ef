"""Models that can't be blended, on real vLLM: the server doesn't start and says why, or serves them as plain does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import CUDAGraphMode, KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    EncoderOnlyAttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    SlidingWindowSpec,
)

from kvarena.engines.vllm.lmcache_connector import FailSafeLMCacheConnector
from kvarena.engines.vllm.model import with_rows
from kvarena.engines.vllm.supported import refuse_group, refuse_spec, refuse_unsupported
from support.blended import make_prompts
from support.families import LENGTH_DEPENDENT, MIXED, save_kind
from support.tiny_models import save_adapter, save_tiny_model
from support.vllm_engine import (
    MEMORY,
    PIECES,
    Step,
    adapted_tokens,
    plain_tokens,
    run_in_engine,
    run_steps,
)
from support.vllm_server import api_server

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
    "some windows": (
        "gemma3_text",
        {"sliding_window": 64, "layer_types": MIXED},
        "sliding window of 64 tokens is shorter than the context of 2048 tokens, "
        "and vLLM keeps no more of it: --disable-hybrid-kv-cache-manager is needed",
    ),
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


def test_adapters_are_refused_or_served_plain(tmp_path: Path) -> None:
    """Two adapters share a name, as they may over time: each has its own answers, and the base model has its own."""
    model, prompts = str(save_tiny_model(tmp_path / "model")), make_prompts(0, 2)
    adapters = [
        None,
        *(("adapter", str(save_adapter(tmp_path / str(seed), seed))) for seed in (1, 2)),
    ]
    with pytest.raises(ValueError, match=r"can't be blended: .*\(LoRA\).*--blend-unsupported plain"):
        run_in_engine(adapted_tokens, model, MEMORY, prompts, adapters)
    expected, _ = run_in_engine(adapted_tokens, model, None, prompts, adapters)
    assert len({str(tokens) for tokens in expected}) == len(adapters), "the adapters change the answers"
    tokens, reports = run_in_engine(adapted_tokens, model, PLAIN, prompts, adapters)
    assert tokens == expected
    for report in reports:
        assert not report["approximate"]
        assert report["num_recomputed_tokens"] == report["store_misses"] == 0
        assert report["num_reused_tokens"] == report["num_prefix_tokens"]


def test_adapters_are_refused_with_lmcache_too(tmp_path: Path) -> None:
    """Its keys don't tell one adapter's KV from another's."""
    transfer: dict[str, Any] = {
        "kv_connector": "FailSafeLMCacheConnector",
        "kv_connector_module_path": "kvarena.engines.vllm.lmcache_connector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
    }
    arguments = EngineArgs(
        str(save_tiny_model(tmp_path)),
        enable_lora=True,
        max_lora_rank=8,
        kv_transfer_config=KVTransferConfig(**transfer),
    )
    config = arguments.create_engine_config()
    with pytest.raises(ValueError, match=r"adapters \(LoRA\)"):
        FailSafeLMCacheConnector(config, KVConnectorRole.WORKER, KVCacheConfig(0, [], []))


def test_a_draft_models_kv_is_refused(tmp_path: Path) -> None:
    """A blend would leave it out."""
    model, draft = str(save_tiny_model(tmp_path / "model")), str(save_tiny_model(tmp_path / "draft", seed=1))
    settings = {"speculative_config": {"model": draft, "method": "draft_model", "num_speculative_tokens": 2}}
    with pytest.raises(ValueError, match=r"can't be blended: layers beside its own keep KV.*--blend-unsupported plain"):
        run_in_engine(run_steps, model, MEMORY, [], settings)


@pytest.mark.parametrize(
    ("degrees", "reason"),
    [
        ({"decode_context_parallel_size": 2}, "context parallelism"),
        ({"prefill_context_parallel_size": 2}, "context parallelism"),
        ({"data_parallel_size": 2}, "data-parallel ranks"),
    ],
)
def test_kv_or_experts_over_several_devices(degrees: dict[str, int], reason: str, tmp_path: Path) -> None:
    config = EngineArgs(str(save_kind(tmp_path, "qwen3_moe"))).create_engine_config()
    for name, degree in degrees.items():
        setattr(config.parallel_config, name, degree)
    with pytest.raises(ValueError, match=reason):
        refuse_unsupported(torch.nn.Module(), config, KVCacheConfig(0, [], []))


def test_kernels_with_smaller_blocks_than_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashInfer's take blocks of a few sizes, whatever the cache has."""
    group = KVCacheGroupSpec(["layer.0"], FullAttentionSpec(**SHAPE))
    layers = {"layer.0": SimpleNamespace(get_attn_backend=lambda: CPUAttentionBackend)}
    refuse_group(group, layers)
    monkeypatch.setattr(CPUAttentionBackend, "get_supported_kernel_block_sizes", lambda _spec: [16, 32, 64])
    with pytest.raises(ValueError, match=r"blocks of 64 tokens: --block-size 64 is needed"):
        refuse_group(group, layers)


def test_metadata_has_room_for_a_row_for_each_token_of_a_batch(tmp_path: Path) -> None:
    """FlashAttention and FlashInfer have buffers for as many rows as there may be sequences, or CUDA graphs."""
    config = EngineArgs(str(save_tiny_model(tmp_path)), max_num_seqs=4).create_engine_config()
    config.compilation_config.cudagraph_mode = CUDAGraphMode.FULL
    roomy = with_rows(config, 2048)
    assert roomy.scheduler_config.max_num_seqs == 2048
    assert not roomy.compilation_config.cudagraph_mode.has_full_cudagraphs()
    assert config.scheduler_config.max_num_seqs == 4
    assert config.compilation_config.cudagraph_mode == CUDAGraphMode.FULL


SHAPE: dict[str, Any] = {"block_size": 128, "num_kv_heads": 2, "head_size": 32, "dtype": torch.float32}


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (ChunkedLocalAttentionSpec(**SHAPE, attention_chunk_size=512), "attention chunk of 512 tokens is shorter"),
        (SlidingWindowSpec(**SHAPE, sliding_window=1023), "sliding window of 1023 tokens is shorter than the context"),
        (FullAttentionSpec(**SHAPE, non_causal=True), "not causal"),
        (EncoderOnlyAttentionSpec(**SHAPE), "of ordinary attention"),
    ],
    ids=["chunks", "window", "prefix LM", "encoder"],
)
def test_attention_that_doesnt_see_just_all_before_it_is_refused(spec: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        refuse_spec(spec, 1024)


def test_a_window_as_long_as_the_context_is_ordinary_attention_and_so_is_one_with_all_blocks() -> None:
    refuse_spec(FullAttentionSpec(**SHAPE, sliding_window=1023), 1024)
    refuse_spec(SlidingWindowSpec(**SHAPE, sliding_window=1024), 1024)
    refuse_spec(ChunkedLocalAttentionSpec(**SHAPE, attention_chunk_size=1024), 1024)
    refuse_spec(FullAttentionSpec(**SHAPE), 1024)


def test_the_server_says_so(tmp_path: Path) -> None:
    """The API server isn't the process that finds out."""
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
