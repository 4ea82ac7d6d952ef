"""Exports a Hugging Face causal language model as the graph that QEfficient would give a card, for machines without
QEfficient: the same inputs, outputs and meaning, so that the card's runtime runs over it in ONNX Runtime.

| name | type and shape |
|---|---|
| `input_ids`, `position_ids` | int64 `(B, T)`; a position of -1 is padding: it is written nowhere |
| `batch_index` | int64 `(B, 1)`, the slot of each row |
| `past_key.N`, `past_value.N`, and `..._RetainedState` of them | `(S, H_kv, ctx_len, D)` |
| `logits` | float32 `(B, 1, V)`, of the row's token at the largest position |

The contract is that of `QEFFAutoModelForCausalLM.export` with `continuous_batching=True`, and of `QEffDynamicLayer`
(QEfficient/transformers/cache_utils.py): position INT32_MAX in the graph means nowhere.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.cache_utils import Cache

from ai100.runtimes.model_files import kv_shape

NOWHERE = torch.iinfo(torch.int32).max
HIDDEN = -1e9
OPSET = 17


def past_names(num_layers: int) -> list[str]:
    return [f"past_{kind}.{layer}" for layer in range(num_layers) for kind in ("key", "value")]


def export(path: str, folder: Path) -> Path:
    """Writes `model.onnx` of the model at `path`, in float32. Returns where.

    Any batch size and length of tokens can be asked of the graph, as long as one of the two is 1.
    """
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / "model.onnx"
    names = past_names(model.config.num_hidden_layers)
    tokens, slots = {0: "batch_size", 1: "seq_len"}, {0: "full_batch_size", 2: "ctx_len"}
    retained = [f"{name}_RetainedState" for name in names]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing warns of every Python branch in the model
        torch.onnx.export(
            _Graph(model),
            _example_inputs(model),
            str(target),
            input_names=["input_ids", "position_ids", *names, "batch_index"],
            output_names=["logits", *retained],
            dynamic_axes={
                "input_ids": tokens,
                "position_ids": tokens,
                "batch_index": {0: "batch_size"},
                **dict.fromkeys([*names, *retained], slots),
            },
            opset_version=OPSET,
            dynamo=False,
        )
    return target


class _Graph(torch.nn.Module):
    """The model behind the graph's inputs and outputs."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor, *past_and_index: torch.Tensor) -> Any:
        *past, batch_index = past_and_index
        cache = _SlotTensors(past, batch_index, position_ids)
        ctx_positions = torch.arange(past[0].shape[2], device=position_ids.device)
        is_hidden = ctx_positions > position_ids[:, None, :, None]  # (B, 1, T, ctx_len)
        logits = self.model(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=torch.where(is_hidden, HIDDEN, 0.0),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=position_ids.amax(0).argmax().view(1),
        ).logits
        return logits.float(), *cache.tensors


class _SlotTensors(Cache):
    """Writes fresh keys and values at `position_ids` of the rows' slots, and hands out these slots as they are then."""

    def __init__(self, tensors: list[torch.Tensor], batch_index: torch.Tensor, position_ids: torch.Tensor) -> None:
        super().__init__(layers=[])
        self.tensors = tensors
        self._slots = batch_index[:, 0]
        heads = torch.arange(tensors[0].shape[1], device=position_ids.device)
        positions = torch.where(position_ids < 0, NOWHERE, position_ids)
        self._places = (batch_index[:, :, None], heads[None, :, None], positions[:, None, :])  # to (B, H_kv, T)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        number = 2 * layer_idx
        for offset, fresh in enumerate((key_states, value_states)):  # (B, H_kv, T, D)
            tensor = self.tensors[number + offset].clone()
            tensor[self._places] = fresh
            self.tensors[number + offset] = tensor
        return self.tensors[number][self._slots], self.tensors[number + 1][self._slots]


def _example_inputs(model: Any) -> tuple[torch.Tensor, ...]:
    """Two rows of three tokens: no size is 1, which tracing could take for a constant."""
    num_layers, num_kv_heads, head_size = kv_shape(model.config)
    past = [torch.zeros(4, num_kv_heads, 8, head_size) for _ in past_names(num_layers)]
    token_ids = torch.zeros(2, 3, dtype=torch.int64)
    return token_ids, torch.arange(3).repeat(2, 1), *past, torch.tensor([[0], [1]])
