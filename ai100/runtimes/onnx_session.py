"""A session over ONNX Runtime: runs on any machine the graph that a card would run, in the same static shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from onnxruntime import InferenceSession, OrtValue, SessionOptions

from ai100.runtimes.runtime import StaticShapes
from ai100.runtimes.session import Buffers

NOWHERE = np.iinfo(np.int32).max
"""The card drops what is written to this index, and reads zeros there. ONNX Runtime refuses it."""


class OnnxSession:
    """`Session` over a graph of QEfficient's, or of `export.py`. Everything retained is zero at first.

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
