"""Which models can be blended in vLLM.

Chunk KV can be moved where every layer attends to the whole text and keys carry their position as a rotation with
constant frequencies. Anything else is refused with the reason when the server starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from vllm.config import ModelConfig, VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheSpec,
    MambaSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)

from kvarena.core.rope import refuse_length_dependent


def refuse_unsupported(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> None:
    """Raise `ValueError` with the reason when this server's KV can't be blended."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    if parallel.pipeline_parallel_size > 1:
        raise ValueError("its layers are spread over several devices (pipeline parallelism)")
    if model.use_mla:
        raise ValueError("its latent attention (MLA) keeps no keys that could be moved")
    if model.uses_mrope:
        raise ValueError("its positions have several dimensions (M-RoPE)")
    refuse_length_dependent(rope_types(model))
    specs = [spec for group in kv_cache_config.kv_cache_groups for spec in _layer_specs(group.kv_cache_spec)]
    for spec in specs:
        refuse_spec(spec, model.max_model_len)
    if len({spec.block_size for spec in specs}) != 1:
        raise ValueError("its layers keep KV in blocks of different sizes, or none at all")


def rope_types(model: ModelConfig) -> set[str]:
    """The kinds of rotary embedding that the model's config names, for all layers or by kind of layer."""
    parameters = getattr(model.hf_text_config, "rope_parameters", None) or {}
    by_kind = [value for value in parameters.values() if isinstance(value, dict)] or [parameters]
    return {str(own.get("rope_type", "default")) for own in by_kind}


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
    for name, words in (("sliding_window", "sliding window"), ("attention_chunk_size", "attention chunk")):
        size = getattr(spec, name, None)
        if size and size < max_model_len:
            raise ValueError(f"its {words} of {size} tokens is shorter than the context of {max_model_len} tokens")


def attention_layers(model: torch.nn.Module) -> list[Any]:
    """The model's attention layers, first to last. Raises `ValueError` when they differ in shape or share KV."""
    layers: list[Any] = [module for module in model.modules() if isinstance(module, Attention)]
    shapes = {(layer.num_kv_heads, layer.head_size, layer.head_size_v) for layer in layers}
    if len(shapes) != 1 or any(layer.head_size != layer.head_size_v for layer in layers):
        raise ValueError(f"its layers' KV differs in shape: {sorted(shapes)}")
    if any(layer.kv_sharing_target_layer_name for layer in layers):
        raise ValueError("its layers share their KV")
    return layers


def decoder_layers(model: torch.nn.Module, attentions: Sequence[torch.nn.Module]) -> list[torch.nn.Module]:
    """For each attention layer, the element of the model's list of layers that it is in.

    Raises `ValueError` for a model that keeps them in no list.
    """
    names = {module: name for name, module in model.named_modules()}
    return [_decoder_layer(model, names[attention].split(".")) for attention in attentions]


def _decoder_layer(model: torch.nn.Module, path: list[str]) -> torch.nn.Module:
    for depth in range(len(path) - 1, 0, -1):
        if isinstance(model.get_submodule(".".join(path[:depth])), torch.nn.ModuleList):
            return model.get_submodule(".".join(path[: depth + 1]))
    raise ValueError("its layers are in no list")
