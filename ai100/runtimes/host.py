"""The runtime of any machine: PyTorch on a CPU or a CUDA device, in the static shapes of the card.

The model is Hugging Face's own, unchanged; what differs is its cache and its attention (`slot_kv.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from ai100.runtimes.filled_slots import FilledSlots, SlotRange
from ai100.runtimes.model_files import ModelFiles, kv_shape
from ai100.runtimes.runtime import DecodeRow, DeviceLost, Logits, StaticShapes
from ai100.runtimes.slot_kv import ATTENTION, SlotKV, causal_mask

DTYPES = ("auto", "float32", "bfloat16", "float16")
CHECK_TOLERANCE = {torch.float32: 1e-3}
CHECK_TOLERANCE_ROUNDED = 0.05


class HostRuntime:
    """`Runtime` over a Hugging Face causal language model with keys and values of one shape in every layer.

    In float32 the seam's equation holds up to the order of sums; in 16 bits, up to their rounding.
    """

    name = "host"

    def __init__(self, model: Any, files: ModelFiles, shapes: StaticShapes) -> None:
        """Raises `ValueError` when this model doesn't run over slots."""
        files.check(shapes)
        self.shapes = shapes
        self.tokenizer = files.tokenizer
        self.vocab_size = files.vocab_size
        self.eos_token_ids = files.eos_token_ids
        self._model = model.eval()
        self._filled = FilledSlots(shapes, self.vocab_size)
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

    def prefill(self, slot: int, token_ids: Sequence[int], position: int) -> Logits:
        written = self._filled.prefill_range(slot, token_ids, position)
        logits: Logits = self._run([token_ids], [written])[0]
        return logits

    def decode(self, rows: Sequence[DecodeRow]) -> Logits:
        written = self._filled.decode_ranges(rows)
        return self._run([[row.token_id] for row in rows], written)

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

    def _run(self, token_ids: Sequence[Sequence[int]], written: Sequence[SlotRange]) -> Logits:
        """One forward over rows of equal length. Returns the logits `(B, V)` of each row's last token."""
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
