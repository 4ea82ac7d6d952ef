"""A name for a model's KV: two servers share chunks only when their weights and number format are the same."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".gguf"}
_LAYOUT_VERSION = 1


def model_id(vllm_config: Any) -> str:
    """`NAME-DIGEST`, without slashes, the same in every process, after every restart and wherever the folder is."""
    model = vllm_config.model_config
    described = {
        "layout": _LAYOUT_VERSION,
        "config": {key: value for key, value in model.hf_text_config.to_dict().items() if key != "_name_or_path"},
        "dtype": str(model.dtype),
        "quantization": model.quantization,
        "load_format": str(vllm_config.load_config.load_format),
        "seed": model.seed,
        "weights": _weights(model.model, model.revision),
    }
    digest = hashlib.blake2b(json.dumps(described, sort_keys=True, default=str).encode(), digest_size=8)
    return f"{Path(model.model).name}-{digest.hexdigest()}"


def _weights(model: str, revision: str | None) -> Any:
    """What tells one set of weights from another: files with size and time, or the hub's commit."""
    folder = Path(model)
    if folder.is_dir():
        files = sorted(path for path in folder.iterdir() if path.suffix in _WEIGHT_SUFFIXES)
        return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(model, "config.json", revision=revision)
    return [model, Path(cached).parent.name if isinstance(cached, str) else revision]
