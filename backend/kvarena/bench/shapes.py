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


def _shape(
    hidden_size: int, intermediate_size: int, num_layers: int, num_heads: int, num_kv_heads: int, head_dim: int = 64
) -> dict[str, int]:
    return {
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": head_dim,
    }


SHAPES = {
    "180m": _shape(1024, 2048, 16, 16, 4),
    "500m": _shape(1536, 4096, 18, 24, 6),
    "1b": _shape(2048, 8192, 16, 32, 8),
    "8b": _shape(4096, 14_336, 32, 32, 8, 128),
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
