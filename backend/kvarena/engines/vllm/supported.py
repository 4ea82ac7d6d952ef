"""Which models can be blended in vLLM.

Chunk KV can be moved where layers have ordinary attention, over the whole text or over a sliding window whose blocks
vLLM keeps, and keys carry their position as a rotation with constant frequencies. Anything else is refused with the
reason when the server starts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
    MambaSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)
from vllm.v1.worker.utils import select_common_block_size

from kvarena.core.rope import refuse_length_dependent

KEEP_ALL_KV = "--disable-hybrid-kv-cache-manager"
"""With this option of vLLM's, layers with a sliding window keep all KV, like a model's other layers."""


def refuse_unsupported(module: torch.nn.Module, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> None:
    """Raise `ValueError` with the reason when this server's KV can't be blended."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    if parallel.pipeline_parallel_size > 1:
        raise ValueError("its layers are spread over several devices (pipeline parallelism)")
    if parallel.prefill_context_parallel_size * parallel.decode_context_parallel_size > 1:
        raise ValueError("its KV is spread over several devices token by token (context parallelism)")
    if parallel.data_parallel_size > 1 and model.is_moe:
        raise ValueError("its experts are spread over data-parallel ranks, all of which a forward has to wait for")
    if vllm_config.lora_config:
        raise ValueError("its layers take adapters, and vLLM maps these (LoRA) to the tokens of its own steps only")
    if model.use_mla:
        raise ValueError("its latent attention (MLA) keeps no keys that could be moved")
    if model.uses_mrope:
        raise ValueError("its positions have several dimensions (M-RoPE)")
    refuse_length_dependent(model.hf_text_config, module)
    specs = [spec for group in kv_cache_config.kv_cache_groups for spec in _layer_specs(group.kv_cache_spec)]
    try:
        for spec in specs:
            refuse_spec(spec, model.max_model_len)
    except ValueError as error:
        if {type(spec) for spec in specs} != {FullAttentionSpec, SlidingWindowSpec}:
            raise
        raise ValueError(f"{error}, and vLLM keeps no more of it: {KEEP_ALL_KV} is needed") from error
    if len({spec.block_size for spec in specs}) != 1:
        raise ValueError("its layers keep KV in blocks of different sizes, or none at all")
    layers = {module.layer_name: module for module in module.modules() if isinstance(module, Attention)}
    for group in kv_cache_config.kv_cache_groups:
        refuse_group(group, layers)


def refuse_group(group: KVCacheGroupSpec, layers: Mapping[str, Any]) -> None:
    """Raise `ValueError` with the reason when some of these layers aren't the model's own (`layers`, by name), or have
    kernels that use smaller blocks than the cache.
    """
    if others := [name for name in group.layer_names if name not in layers]:
        raise ValueError(f"layers beside its own keep KV, such as a draft model's ({others[0]}), and would lack it")
    block_size = group.kv_cache_spec.block_size
    backends = {layers[name].get_attn_backend() for name in group.layer_names}
    kernel_size = select_common_block_size(block_size, list(backends))
    if kernel_size != block_size:
        raise ValueError(f"its attention has blocks of {kernel_size} tokens: --block-size {kernel_size} is needed")


def _layer_specs(spec: KVCacheSpec) -> list[KVCacheSpec]:
    return list(spec.kv_cache_specs.values()) if isinstance(spec, UniformTypeKVCacheSpecs) else [spec]


def refuse_spec(spec: KVCacheSpec, max_model_len: int) -> None:
    """Raise `ValueError` with the reason when layers with such a cache can't be blended."""
    if isinstance(spec, MambaSpec):
        raise ValueError("it keeps a recurrent state, which depends on all the text before it")
    if type(spec) not in (FullAttentionSpec, SlidingWindowSpec, ChunkedLocalAttentionSpec):
        raise ValueError(f"its KV cache ({type(spec).__name__}) is not that of ordinary attention")
    if getattr(spec, "non_causal", False):
        raise ValueError("its attention is not causal")
    if isinstance(spec, SlidingWindowSpec):  # others with a window have a `FullAttentionSpec`, and all of their KV
        _refuse_short_window("sliding window", spec.sliding_window, max_model_len)
    _refuse_short_window("attention chunk", getattr(spec, "attention_chunk_size", None), max_model_len)


def _refuse_short_window(window: str, num_tokens: int | None, max_model_len: int) -> None:
    """Raise `ValueError` where layers attend to fewer tokens than a context may have. `window`: what they attend to."""
    if num_tokens and num_tokens < max_model_len:
        raise ValueError(f"its {window} of {num_tokens} tokens is shorter than the context of {max_model_len} tokens")


def attention_layers(model: torch.nn.Module) -> list[Any]:
    """The model's attention layers, first to last. Raises `ValueError` when they differ in shape or share KV."""
    layers: list[Any] = [module for module in model.modules() if isinstance(module, Attention)]
    shapes = {(layer.num_kv_heads, layer.head_size, layer.head_size_v) for layer in layers}
    if len(shapes) != 1 or any(layer.head_size != layer.head_size_v for layer in layers):
        raise ValueError(f"its layers' KV differs in shape: {sorted(shapes)}")
    if any(layer.kv_sharing_target_layer_name for layer in layers):
        raise ValueError("its layers share their KV")
    return layers
