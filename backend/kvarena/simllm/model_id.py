"""A name for a model's KV: two processes share tasks only when their weights and number format are the same."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

_NOT_THE_KVS = ("_name_or_path", "transformers_version", "architectures")


def model_id(model: Any) -> str:
    """`TYPE-DIGEST` of a Hugging Face model's configuration and of every weight: where it was loaded from says less.

    The same in every process. It reads all weights once, about a gigabyte in a second.
    """
    config = {name: value for name, value in model.config.to_dict().items() if name not in _NOT_THE_KVS}
    digest = hashlib.blake2b(json.dumps(config, sort_keys=True, default=str).encode(), digest_size=16)
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return f"{model.config.model_type}-{digest.hexdigest()}"
