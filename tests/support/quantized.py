"""A saved model's linear layers in INT8, as compressed-tensors writes them, activations quantised token by token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

_INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
_SCHEME: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {**_INT8, "strategy": "channel", "dynamic": False},
            "input_activations": {**_INT8, "strategy": "token", "dynamic": True},
        }
    },
}


def quantize_to_int8(folder: Path) -> Path:
    path = folder / "model.safetensors"
    quantized: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(path).items():
        if name.endswith("_proj.weight"):
            scale = tensor.abs().amax(dim=1, keepdim=True) / 127
            quantized |= {name: (tensor / scale).round().to(torch.int8), f"{name}_scale": scale}
        else:
            quantized[name] = tensor
    save_file(quantized, path, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": _SCHEME}))
    return folder
