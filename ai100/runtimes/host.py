"""The runtime of any machine: PyTorch on a CPU or a CUDA device, in the static shapes of the card.

The model is Hugging Face's own, unchanged; what differs is its cache and its attention. The KV of all slots is one
piece of memory, and attention reads it in place: one forward runs rows of different slots at different positions,
the linear layers take them as one batch, and each row attends to its own slot, up to its own end, through views. No
KV is copied but the fresh one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.cache_utils import Cache

from ai100.runtimes.runtime import DeviceLost, Logits, ModelFiles, Runtime, SlotRange, StaticShapes, kv_shape

ATTENTION = "ai100_slots"
"""The name that Hugging Face's models know the attention by."""


class SlotKV(Cache):
    """A `Cache` over `memory` `(L, 2, S, H_kv, ctx_len, D)`. Differs from `Cache` in where fresh KV is written, and in
    what `update` returns: a list of one view per row instead of a tensor, which only `slot_attention` reads.
    """

    def __init__(self, memory: torch.Tensor) -> None:
        super().__init__(layers=[])
        self.memory = memory
        self._layers = [(keys, values) for keys, values in memory]
        self._ranges: Sequence[SlotRange] = ()

    def go_on_with(self, ranges: Sequence[SlotRange]) -> None:
        """What the next forward writes, one range for each row of its batch, all of one length."""
        self._ranges = ranges

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> Any:
        """Writes a layer's fresh `(B, H_kv, T_q, D)`. Returns each row's keys and values, views `(H_kv, end, D)`."""
        keys, values = self._layers[layer_idx]
        for row, written in enumerate(self._ranges):
            keys[written.slot, :, written.start : written.end] = key_states[row]
            values[written.slot, :, written.start : written.end] = value_states[row]
        return (
            [keys[written.slot, :, : written.end] for written in self._ranges],
            [values[written.slot, :, : written.end] for written in self._ranges],
        )


def causal_mask(written: SlotRange, num_groups: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor | None:
    """`(1, 1, G * T_q, end)`, to be added to the scores: each token attends to what is before it, and itself.

    The `G` query heads of a KV head stand below each other, as `slot_attention` lays them. One token needs none.
    """
    if written.end - written.start == 1:
        return None
    positions = torch.arange(written.start, written.end, device=device).repeat(num_groups)
    is_hidden = torch.arange(written.end, device=device) > positions[:, None]
    return torch.zeros(is_hidden.shape, dtype=dtype, device=device).masked_fill_(is_hidden, -torch.inf)[None, None]


def slot_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: Sequence[torch.Tensor],
    value: Sequence[torch.Tensor],
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **arguments: Any,
) -> tuple[torch.Tensor, None]:
    """`query` `(B, H, T_q, D)`, and for each row `(H_kv, end, D)`; returns `(B, T_q, H, D)`.

    The query heads of a KV head become more query positions of that one head: the same sums, without a copy of the
    keys and values for each of them.
    """
    if unknown := {"softcap", "s_aux"} & {name for name, given in arguments.items() if given is not None}:
        raise ValueError(
            f"{type(module).__name__} needs {', '.join(sorted(unknown))}, which attention over slots lacks"
        )
    num_heads, num_queries, head_size = query.shape[1:]
    rows = []
    for row, (keys, values) in enumerate(zip(key, value, strict=True)):
        grouped = query[row].reshape(1, len(keys), -1, head_size)  # (1, H_kv, G * T_q, D)
        output = scaled_dot_product_attention(
            grouped, keys[None], values[None], attn_mask=attention_mask, scale=scaling
        )
        rows.append(output.reshape(num_heads, num_queries, head_size).transpose(0, 1))
    return torch.stack(rows), None


AttentionInterface.register(ATTENTION, slot_attention)


DTYPES = ("auto", "float32", "bfloat16", "float16")
CHECK_TOLERANCE = {torch.float32: 1e-3}
CHECK_TOLERANCE_ROUNDED = 0.05


class HostRuntime(Runtime):
    """`Runtime` over a Hugging Face causal language model with keys and values of one shape in every layer.

    In float32 the seam's equation holds up to the order of sums; in 16 bits, up to their rounding.
    """

    name = "host"

    def __init__(self, model: Any, files: ModelFiles, shapes: StaticShapes) -> None:
        """Raises `ValueError` when this model doesn't run over slots."""
        super().__init__(files, shapes)
        self._model = model.eval()
        self._kv: SlotKV | None = self._new_kv()
        self._check_model()

    @classmethod
    def load(
        cls, path: str, shapes: StaticShapes, device: str = "auto", dtype: str = "float32", random: bool = False
    ) -> HostRuntime:
        """From a local folder or a hub name. `random` makes the weights up from the config: any shape, no download.

        `dtype` "auto" is the checkpoint's. Raises `OSError` when there is no such model, `ValueError` for what can't
        run.
        """
        if dtype not in DTYPES:
            raise ValueError(f"no dtype {dtype!r}; choose one of {', '.join(DTYPES)}")
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        files = ModelFiles.read(path)
        if random:
            torch_dtype = files.config.dtype if dtype == "auto" else getattr(torch, dtype)
            model = AutoModelForCausalLM.from_config(files.config, dtype=torch_dtype)
        else:
            model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        return cls(model.to(device), files, shapes)

    def clear(self, slot: int) -> None:
        touched = self._filled.num_touched(slot)
        with self._device_errors():
            self._opened().memory[:, :, slot, :, :touched].zero_()
        self._filled.empty(slot)

    def reopen(self) -> None:
        self.close()
        with self._device_errors():
            self._kv = self._new_kv()

    def close(self) -> None:
        self._kv = None
        self._filled.empty_all()

    def slot_kv(self, slot: int) -> torch.Tensor:
        """What the slot's memory holds, for whoever wants to look: a view `(L, 2, H_kv, ctx_len, D)`."""
        return self._opened().memory[:, :, slot]

    def _run(self, token_ids: Sequence[Sequence[int]], written: Sequence[SlotRange], *, decodes: bool) -> Logits:
        kv, device = self._opened(), self._model.device
        kv.go_on_with(written)
        self._filled.touch(written)  # a forward that fails may have written some of it
        positions = [range(row.start, row.end) for row in written]
        with torch.inference_mode(), self._device_errors():
            logits = self._model(
                input_ids=torch.tensor(token_ids, device=device),
                position_ids=torch.tensor(positions, device=device),
                attention_mask=causal_mask(written[0], self._num_groups, self._model.dtype, device),
                past_key_values=kv,
                use_cache=True,
                logits_to_keep=1,
            ).logits
            result: Logits = logits[:, -1].float().cpu().numpy()
        self._filled.fill(written)
        return result

    def _opened(self) -> SlotKV:
        if self._kv is None:
            raise DeviceLost("the host runtime is closed")
        return self._kv

    def _new_kv(self) -> SlotKV:
        num_layers, num_kv_heads, head_size = kv_shape(self._model.config)
        shape = (num_layers, 2, self.shapes.kv_cache_batch_size, num_kv_heads, self.shapes.ctx_len, head_size)
        return SlotKV(torch.zeros(shape, dtype=self._model.dtype, device=self._model.device))

    @property
    def _num_groups(self) -> int:
        return int(self._model.config.num_attention_heads // self._model.config.num_key_value_heads)

    def _check_model(self) -> None:
        """Tries the seam's equation on a few tokens, against the model's own eager forward: families differ in more
        than a config says.
        """
        token_ids = [token % self.vocab_size for token in (3, 1, 4, 1, 5)][: self.shapes.ctx_len]
        expected = self._eager_logits(token_ids)
        self._model.set_attn_implementation(ATTENTION)
        try:
            step = min(2, self.shapes.prefill_seq_len)
            for position in range(0, len(token_ids), step):
                logits = torch.from_numpy(self.prefill(0, token_ids[position : position + step], position))
        except (torch.OutOfMemoryError, DeviceLost):
            raise
        except (AttributeError, RuntimeError, TypeError) as error:
            raise ValueError(f"{type(self._model).__name__} doesn't run over KV slots: {error}") from error
        self.clear(0)
        tolerance = CHECK_TOLERANCE.get(self._model.dtype, CHECK_TOLERANCE_ROUNDED) * float(expected.abs().max())
        if not (difference := float((logits - expected).abs().max())) <= tolerance:  # NaN is no likeness
            raise ValueError(f"{type(self._model).__name__} gives other logits over KV slots, off by {difference:.3g}")

    def _eager_logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        self._model.set_attn_implementation("eager")
        with torch.inference_mode():
            output = self._model(torch.tensor([token_ids], device=self._model.device), use_cache=False)
        logits: torch.Tensor = output.logits[0, -1].float().cpu()
        return logits

    @contextmanager
    def _device_errors(self) -> Iterator[None]:
        """A CUDA error takes the whole device with it. Running out of its memory, for one, isn't such an error."""
        try:
            yield
        except RuntimeError as error:
            if not str(error).startswith("CUDA error"):
                raise
            self.close()
            raise DeviceLost(f"the device is lost: {error}") from error
