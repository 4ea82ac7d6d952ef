"""Which models can be blended, and how their keys turn.

Chunk KV can be moved where every layer attends to the whole text and keys carry their position as a rotation with
constant frequencies. Anything else is refused with the reason when the server starts.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbeddingBase
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig

from kvarena.reuse.rope import Rotation


def refuse_unsupported(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> None:
    """Raise `ValueError` with the reason when this server's KV can't be blended."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    groups = kv_cache_config.kv_cache_groups
    reason = ""
    if parallel.pipeline_parallel_size > 1:
        reason = "its layers are spread over several devices (pipeline parallelism)"
    elif model.use_mla:
        reason = "its latent attention (MLA) keeps no keys that could be moved"
    elif model.uses_mrope:
        reason = "its positions have several dimensions (M-RoPE)"
    elif len(groups) != 1 or type(groups[0].kv_cache_spec) is not FullAttentionSpec:
        reason = "it mixes kinds of attention or keeps a recurrent state"
    elif (window := groups[0].kv_cache_spec.sliding_window) and window < model.max_model_len:
        reason = f"its sliding window of {window} tokens is shorter than the context of {model.max_model_len}"
    if reason:
        raise ValueError(f"{model.model} can't be blended: {reason}")


def attention_layers(model: torch.nn.Module) -> list[Any]:
    """The model's attention layers, first to last. Raises `ValueError` when they differ in shape or share KV."""
    layers: list[Any] = [module for module in model.modules() if isinstance(module, Attention)]
    shapes = {(layer.num_kv_heads, layer.head_size, layer.head_size_v) for layer in layers}
    if len(shapes) != 1 or any(layer.head_size != layer.head_size_v for layer in layers):
        raise ValueError(f"a model whose layers' KV differs in shape can't be blended: {sorted(shapes)}")
    if any(layer.kv_sharing_target_layer_name for layer in layers):
        raise ValueError("a model whose layers share their KV can't be blended")
    return layers


def rotations_of(model: torch.nn.Module, layers: list[Any]) -> list[Rotation | None]:
    """Each layer's rotation of keys; None for a layer without one, in a model that has them elsewhere.

    Raises `ValueError` when no layer has one (positions are then in the embeddings and can't be moved), or when the
    frequencies are not constant.
    """
    known: dict[int, Rotation] = {}
    rotations: list[Rotation | None] = []
    for layer in layers:
        rotary = _rotary_beside(model, layer)
        if rotary is not None and id(rotary) not in known:
            known[id(rotary)] = _rotation(rotary)
        rotations.append(None if rotary is None else known[id(rotary)])
    if not known:
        raise ValueError("a model without rotary embeddings can't be blended: its keys can't be moved")
    return rotations


def _rotary_beside(model: torch.nn.Module, layer: Any) -> Any:
    """The rotary embedding in the same block as an attention layer."""
    name = next(name for name, module in model.named_modules() if module is layer)
    block = model.get_submodule(name.rpartition(".")[0])
    for child_name, child in block.named_children():
        if isinstance(child, RotaryEmbeddingBase):
            return child
        if "rotary" in child_name:
            raise ValueError(f"a model with {type(child).__name__} can't be blended: its frequencies aren't constant")
    return None


def _rotation(rotary: Any) -> Rotation:
    """The frequencies from the table that the module computes, in fp32: the one it uses is rounded to its dtype."""
    table = rotary._compute_cos_sin_cache().float().cpu()
    cos, sin = table.chunk(2, dim=-1)
    return Rotation.from_cos_sin(cos, sin, is_neox=rotary.is_neox_style)
