"""Models of a chosen size with random weights: speed at real sizes, without a download.

A shape is a folder with a config and a tokenizer; servers load it with random weights (`--load-format dummy`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from kvarena.home import Home, project_root
from kvarena.model import SHIPPED_MODELS, TOWN, find_model

SHAPES: dict[str, dict[str, int]] = {
    "180m": {
        "hidden_size": 1024,
        "intermediate_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
    },
    "500m": {
        "hidden_size": 1536,
        "intermediate_size": 4096,
        "num_hidden_layers": 18,
        "num_attention_heads": 24,
        "num_key_value_heads": 6,
    },
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
}
VOCAB_SIZE = 32_000
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def write_shape(
    name: str, folder: Path, tokenizer_from: Path, changes: Mapping[str, Any] = MappingProxyType({})
) -> Path:
    """A Llama of this shape in `folder`, in bf16, with the tokenizer of another model's folder; or with `changes` of
    its config another model.

    Raises `ValueError` with the choices for an unknown name.
    """
    if name not in SHAPES:
        raise ValueError(f"no shape {name!r}; there are {', '.join(SHAPES)}")
    folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "head_dim": 64,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
        "max_position_embeddings": 32_768,
        "tie_word_embeddings": True,
        "vocab_size": VOCAB_SIZE,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **SHAPES[name],
        **changes,
    }
    tokenizer = [tokenizer_from / name for name in TOKENIZER_FILES]
    contents = {path.name: path.read_bytes() for path in tokenizer if path.is_file()}
    for name, content in {**contents, "config.json": json.dumps(config, indent=1).encode()}.items():
        path = folder / name
        if not path.is_file() or path.read_bytes() != content:  # others may be reading it
            path.write_bytes(content)
    return folder


def model_folder(model: str | None, shape: str | None) -> str:
    """A model's name or folder, by default the stack's; of a shape one that stays, with what vLLM compiled for it.

    Raises `ValueError` when both are given, and for an unknown shape; `StackError` for a folder that isn't there.
    """
    if model and shape:
        raise ValueError("--model and --shape exclude each other")
    if not shape:
        return find_model(model, "cpu").name
    tokenizer_from = project_root() / SHIPPED_MODELS[TOWN]
    return str(write_shape(shape, Home.find().cache / "shapes" / shape, tokenizer_from))
