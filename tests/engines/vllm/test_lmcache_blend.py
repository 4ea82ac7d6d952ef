"""LMCache's own blender on real vLLM, as far as a CPU goes: the model is registered, the rest refused with reasons."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvarena.engines.vllm.config import BlendConfig
from kvarena.engines.vllm.lmcache_blender import lmcache_blend_options
from support.families import save_family
from support.lmcache_engine import refused, registrations
from support.tiny_models import save_tiny_model
from support.vllm_engine import make_engine, run_in_engine

pytestmark = pytest.mark.slow
NO_PREFIX_CACHE: dict[str, Any] = {"enable_prefix_caching": False}
NO_FLASH = "it knows FlashAttention, not CPUAttentionBackendImpl (--attention-backend FLASH_ATTN)"
"""What is left to refuse on this machine of a model that LMCache's blender could serve on a GPU."""


@pytest.mark.parametrize("num_workers", [1, 2])
def test_every_worker_registers_the_model_it_serves(num_workers: int, tmp_path: Path) -> None:
    model = str(save_tiny_model(tmp_path))
    assert run_in_engine(registrations, model, tensor_parallel_size=num_workers) == [True] * num_workers


@pytest.mark.parametrize(
    ("family", "reasons"),
    [
        ("llama", [NO_FLASH]),
        ("qwen2", [NO_FLASH]),
        ("qwen3", [NO_FLASH]),
        ("mistral", ["it knows LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM, not MistralForCausalLM"]),
        ("yarn", ["it moves keys without RoPE scaling, and over whole heads only", NO_FLASH]),
    ],
)
def test_models_that_lmcache_cant_blend_are_refused(family: str, reasons: list[str], tmp_path: Path) -> None:
    model = str(save_family(tmp_path, family))
    assert run_in_engine(refused, model, "cuda", {}, **NO_PREFIX_CACHE) == reasons


def test_settings_that_lmcache_cant_blend_with_are_refused(tmp_path: Path) -> None:
    model = str(save_tiny_model(tmp_path))
    others = {"use_layerwise": False, "enable_async_loading": True, "blend_check_layers": [4]}
    reasons = run_in_engine(refused, model, "cpu", others, kv_transfer_config=None)
    expected = ["not on cpu", "--no-enable-prefix-caching", "unmoved", "CUDA graphs", "in the background"]
    expected += ["FlashAttention", r"among 0 to 3, not [4]"]
    assert len(reasons) == len(expected)
    assert all(part in reason for part, reason in zip(expected, reasons, strict=True))


def test_the_stacks_own_settings_start_nothing_on_a_cpu(tmp_path: Path) -> None:
    options = lmcache_blend_options(BlendConfig(), 1.0)
    transfer = json.loads(options[options.index("--kv-transfer-config") + 1])
    model = str(save_tiny_model(tmp_path))
    with pytest.raises(ValueError, match=r"own blender can't serve .*: it runs on cuda and xpu, not on cpu"):
        run_in_engine(make_engine, model, None, kv_transfer_config=transfer, **NO_PREFIX_CACHE)
