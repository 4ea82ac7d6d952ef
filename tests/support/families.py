"""Tiny random models of families that differ in what a blend has to get right, made from their configs.

`initializer_range` and Gemma's scale are such that answers depend on the whole prompt.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from support.tiny_models import SHAPE, tiny_tokenizer

MIXED = ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"]
UNSCALED = {"rope_type": "default", "rope_theta": 1e4}
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
}
LENGTH_DEPENDENT: dict[str, tuple[str, dict[str, Any]]] = {
    "dynamic": ("llama", {"rope_parameters": UNSCALED | {"rope_type": "dynamic", "factor": 2.0}}),
    "longrope": (
        "phi3",
        {
            "pad_token_id": 0,
            "original_max_position_embeddings": 512,
            "rope_parameters": UNSCALED
            | {"rope_type": "longrope", "short_factor": [1.0] * 16, "long_factor": [2.0] * 16},
        },
    ),
}
"""Frequencies that aren't constant: their keys can't be moved."""
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "mistral": ("mistral", {"sliding_window": 4096}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
    "qwen3_moe": ("qwen3_moe", {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}),
    "gemma3": (
        "gemma3_text",
        {"sliding_window": 2048, "layer_types": MIXED, "query_pre_attn_scalar": 4, "tie_word_embeddings": False},
    ),
    "gemma3_short": (
        "gemma3_text",
        {"sliding_window": 48, "layer_types": MIXED, "query_pre_attn_scalar": 4, "tie_word_embeddings": False},
    ),
    "phi3": ("phi3", {"rope_parameters": UNSCALED | {"partial_rotary_factor": 0.5}}),
    "granite": ("granite", {}),
    "stablelm": ("stablelm", {"rope_parameters": UNSCALED | {"partial_rotary_factor": 0.25}}),
    "glm4": ("glm4", {"rope_parameters": UNSCALED | {"partial_rotary_factor": 0.5}}),
    "cohere2": ("cohere2", {"sliding_window": 2048, "layer_types": MIXED}),
    "olmo2": ("olmo2", {}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0, 1, 0]}),
    **{name: ("llama", {"rope_parameters": UNSCALED | own}) for name, own in SCALINGS.items()},
}
"""Windows as long as the context and shorter ones, biased, normed, fused and partly rotated keys, pairs side by side,
layers without rotation or with another one, tied embeddings, experts; vLLM has no code of its own for olmo2 and
smollm3, and takes Transformers'.
"""


def save_family(folder: Path, name: str, **settings: Any) -> Path:
    """A model of four layers in fp32, with a tokenizer."""
    kind, own = FAMILIES[name]
    return save_kind(folder, kind, **(own | settings))


def save_kind(folder: Path, kind: str, **settings: Any) -> Path:
    """A model of any of Hugging Face's kinds."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **(SHAPE | {"vocab_size": len(tokenizer), "pad_token_id": 0} | settings))
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
