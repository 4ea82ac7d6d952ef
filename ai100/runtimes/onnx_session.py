"""The card's graph on any machine: exported without QEfficient, and run in ONNX Runtime in the same static shapes.

The export has the inputs, outputs and meaning of the graph that QEfficient would give a card:

| name | type and shape |
|---|---|
| `input_ids`, `position_ids` | int64 `(B, T)`; a position of -1 is padding: it is written nowhere |
| `batch_index` | int64 `(B, 1)`, the slot of each row |
| `past_key.N`, `past_value.N`, and `..._RetainedState` of them | `(S, H_kv, ctx_len, D)` |
| `comp_ctx_lengths`, if asked for | int64 `(C,)`, of any content: attention reads the first `C` positions of a slot |
| `logits` | float32 `(B, 1, V)`, of the row's token at the largest position |

The contract is that of `QEFFAutoModelForCausalLM.export` with `continuous_batching=True`, and of `QEffDynamicLayer`
(QEfficient/transformers/cache_utils.py): position INT32_MAX in the graph means nowhere.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from onnxruntime import InferenceSession, OrtValue, SessionOptions
from transformers import AutoModelForCausalLM
from transformers.cache_utils import Cache

from ai100.runtimes.card import Buffers
from ai100.runtimes.runtime import StaticShapes, kv_shape

NOWHERE_IN_GRAPH = torch.iinfo(torch.int32).max
HIDDEN = -1e9
OPSET = 17


def past_names(num_layers: int) -> list[str]:
    return [f"past_{kind}.{layer}" for layer in range(num_layers) for kind in ("key", "value")]


def export(path: str, folder: Path, has_context_lengths: bool = False) -> Path:
    """Writes `model.onnx` of the model at `path`, in float32, with the input `comp_ctx_lengths` or without. Returns
    where.

    Any batch size and length of tokens can be asked of the graph, as long as one of the two is 1.
    """
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / "model.onnx"
    names = past_names(model.config.num_hidden_layers)
    tokens, slots = {0: "batch_size", 1: "seq_len"}, {0: "full_batch_size", 2: "ctx_len"}
    lengths = {"comp_ctx_lengths": {0: "comp_ctx_lengths"}} if has_context_lengths else {}
    retained = [f"{name}_RetainedState" for name in names]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing warns of every Python branch in the model
        torch.onnx.export(
            _Graph(model, has_context_lengths),
            _example_inputs(model, has_context_lengths),
            str(target),
            input_names=["input_ids", "position_ids", *names, "batch_index", *lengths],
            output_names=["logits", *retained],
            dynamic_axes={
                "input_ids": tokens,
                "position_ids": tokens,
                "batch_index": {0: "batch_size"},
                **lengths,
                **dict.fromkeys([*names, *retained], slots),
            },
            opset_version=OPSET,
            dynamo=False,
        )
    return target


class _Graph(torch.nn.Module):
    """The model behind the graph's inputs and outputs."""

    def __init__(self, model: Any, has_context_lengths: bool) -> None:
        super().__init__()
        self.model = model
        self.has_context_lengths = has_context_lengths

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor, *others: torch.Tensor) -> Any:
        *past, batch_index = others[:-1] if self.has_context_lengths else others
        length = others[-1].shape[0] if self.has_context_lengths else past[0].shape[2]
        cache = _SlotTensors(past, batch_index, position_ids, length)
        ctx_positions = torch.arange(length, device=position_ids.device)
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
    """Writes fresh keys and values at `position_ids` of the rows' slots, and hands out the first `length` positions of
    these slots as they are then."""

    def __init__(
        self, tensors: list[torch.Tensor], batch_index: torch.Tensor, position_ids: torch.Tensor, length: int
    ) -> None:
        super().__init__(layers=[])
        self.tensors = tensors
        self._length = length
        self._slots = batch_index[:, 0]
        heads = torch.arange(tensors[0].shape[1], device=position_ids.device)
        positions = torch.where(position_ids < 0, NOWHERE_IN_GRAPH, position_ids)
        self._places = (batch_index[:, :, None], heads[None, :, None], positions[:, None, :])  # to (B, H_kv, T)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        number = 2 * layer_idx
        for offset, fresh in enumerate((key_states, value_states)):  # (B, H_kv, T, D)
            tensor = self.tensors[number + offset].clone()
            tensor[self._places] = fresh
            self.tensors[number + offset] = tensor
        keys, values = self.tensors[number][self._slots], self.tensors[number + 1][self._slots]
        return keys[:, :, : self._length], values[:, :, : self._length]


def _example_inputs(model: Any, has_context_lengths: bool) -> tuple[torch.Tensor, ...]:
    """Two rows of three tokens: no size is 1, which tracing could take for a constant."""
    num_layers, num_kv_heads, head_size = kv_shape(model.config)
    past = [torch.zeros(4, num_kv_heads, 8, head_size) for _ in past_names(num_layers)]
    token_ids = torch.zeros(2, 3, dtype=torch.int64)
    inputs = (token_ids, torch.arange(3).repeat(2, 1), *past, torch.tensor([[0], [1]]))
    return (*inputs, torch.zeros(6, dtype=torch.int64)) if has_context_lengths else inputs


NOWHERE = np.iinfo(np.int32).max
"""The card drops what is written to this index, and reads zeros there. ONNX Runtime refuses it."""


class OnnxSession:
    """`Session` over a graph of QEfficient's, or of `export`. Everything retained is zero at first.

    Differs from the card's: index NOWHERE becomes -1, the last position, and one spare position is there to be it;
    positions stay below `ctx_len`, so the model never looks at the spare.
    """

    def __init__(self, graph: Path, shapes: StaticShapes) -> None:
        options = SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        runnable = str(host_graph(graph))
        self._session = InferenceSession(runnable, options, providers=["CPUExecutionProvider"])
        self._token_shapes = {(shapes.prefill_batch_size, shapes.prefill_seq_len), (shapes.full_batch_size, 1)}
        self._past = [value for value in self._session.get_inputs() if value.name.startswith("past_")]
        self._buffers: Buffers = {}
        self._skipped: frozenset[str] = frozenset()
        self.state: dict[str, OrtValue] = {}
        """What is retained, `(S, H_kv, ctx_len + 1, D)` by the names of the inputs."""
        for value in self._past:
            _, num_heads, _, head_size = value.shape
            shape = (shapes.kv_cache_batch_size, num_heads, shapes.ctx_len + 1, head_size)
            self.state[value.name] = OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype=np.float32))

    @property
    def input_names(self) -> list[str]:
        return [value.name for value in self._session.get_inputs()]

    @property
    def output_names(self) -> list[str]:
        return [value.name for value in self._session.get_outputs()]

    def skip_buffers(self, skipped_buffer_names: list[str]) -> None:
        self._skipped |= frozenset(skipped_buffer_names)

    def set_buffers(self, buffers: Buffers) -> None:
        self._buffers |= buffers

    def run(self, inputs: Buffers) -> Buffers:
        """Raises `ValueError` for a shape that the graph wasn't compiled for, as the card does."""
        self.set_buffers(inputs)
        if (shape := self._buffers["input_ids"].shape) not in self._token_shapes:
            raise ValueError(f"input_ids have shape {shape}; the graph is compiled for {sorted(self._token_shapes)}")
        given = {name: OrtValue.ortvalue_from_numpy(self._buffers[name]) for name in inputs}
        outputs = self._session.run_with_ort_values(self.output_names, given | self.state)
        by_name = dict(zip(self.output_names, outputs, strict=True))
        self.state = {value.name: by_name[f"{value.name}_RetainedState"] for value in self._past}
        results = {name: value.numpy() for name, value in by_name.items() if name not in self._skipped}
        if (expected := self._buffers["logits"].shape) != results["logits"].shape:
            raise ValueError(f"logits have shape {results['logits'].shape}; their buffer is {expected}")
        return results

    def deactivate(self) -> None:
        self.state = {}


def host_graph(graph: Path) -> Path:
    """Writes the graph as ONNX Runtime takes it beside the other, whose files of weights it shares. Returns where."""
    model = onnx.load(str(graph), load_external_data=False)
    for node in [*model.graph.node, *(node for function in model.functions for node in function.node)]:
        if node.op_type == "Constant":
            for attribute in node.attribute:
                if attribute.name == "value" and _is_nowhere(numpy_helper.to_array(attribute.t)):
                    attribute.t.CopyFrom(_last_position(attribute.t))
    for tensor in model.graph.initializer:
        if not tensor.external_data and _is_nowhere(numpy_helper.to_array(tensor)):
            tensor.CopyFrom(_last_position(tensor))
    target = graph.with_suffix(".host.onnx")
    onnx.save(model, str(target))
    return target


def _is_nowhere(array: Any) -> bool:
    return bool(array.shape == () and array.dtype.kind == "i" and array == NOWHERE)


def _last_position(tensor: onnx.TensorProto) -> onnx.TensorProto:
    array = numpy_helper.to_array(tensor)
    return numpy_helper.from_array(np.full_like(array, -1), tensor.name)
