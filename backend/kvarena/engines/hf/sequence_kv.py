"""The KV of one sequence while it is being generated, in memory that is reserved from the start.

Hugging Face's own cache concatenates: every token copies everything before it. This one writes a token's keys and
values after the others and hands out views. Large tensors in main memory get a mapping of their own, which goes back
to the system as soon as nobody holds it: the C library keeps freed memory between other blocks, and with entries of
every size coming and going a process would grow to several times what it holds.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache, DynamicLayer

SMALLEST_MAPPING_BYTES = 1 << 16


def empty_host_tensor(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised tensor; small ones come from the usual place."""
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes < SMALLEST_MAPPING_BYTES:
        return torch.empty(tuple(shape), dtype=dtype)
    return torch.frombuffer(mmap.mmap(-1, num_bytes), dtype=dtype).view(tuple(shape))


def _empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type == "cpu":
        return empty_host_tensor(shape, dtype)
    return torch.empty(tuple(shape), dtype=dtype, device=device)


GROWTH = 1.5


def grown(memory: torch.Tensor, num_filled: int, num_tokens: int) -> torch.Tensor:
    """Memory `(..., capacity, D)` with room for `num_tokens`, the filled ones kept: itself, or a larger copy."""
    *before, capacity, head_size = memory.shape
    if num_tokens <= capacity:
        return memory
    shape = (*before, max(num_tokens, int(GROWTH * capacity)), head_size)
    larger = _empty(shape, memory.dtype, memory.device)
    larger[..., :num_filled, :] = memory[..., :num_filled, :]
    return larger


@dataclass(frozen=True)
class KVShape:
    """What a model keeps of a token: `L` layers of `H_kv` heads of size `D`, keys and values."""

    num_layers: int
    num_kv_heads: int
    head_size: int
    dtype: torch.dtype
    device: torch.device

    def empty(self, num_tokens: int) -> torch.Tensor:
        """Memory `(L, 2, H_kv, T, D)` for so many tokens."""
        shape = (self.num_layers, 2, self.num_kv_heads, num_tokens, self.head_size)
        return _empty(shape, self.dtype, self.device)


class SequenceKV(Cache):
    """A `Cache` for a batch of one. `length` tokens of it are filled; it grows when `capacity` is reached.

    Its layers refer to its memory and not to itself, so that the memory is freed with the sequence.
    """

    def __init__(self, shape: KVShape, capacity: int) -> None:
        self._memory = _Memory(shape, capacity)
        super().__init__(layers=[_Layer(self._memory, layer) for layer in range(shape.num_layers)])

    @property
    def length(self) -> int:
        return self._memory.length

    @property
    def capacity(self) -> int:
        return self._memory.capacity

    def extend(self, num_tokens: int) -> torch.Tensor:
        """Count so many more tokens as filled. Returns their memory `(L, 2, H_kv, T, D)`, for the caller to fill."""
        start, end = self.length, self.length + num_tokens
        self._memory.reserve(end)
        self._memory.length = end
        return self.filled(start, end)

    def truncate(self, num_tokens: int) -> None:
        """Forgets all tokens after the first `num_tokens`."""
        assert 0 <= num_tokens <= self.length, f"{num_tokens} of {self.length} tokens"
        self._memory.length = num_tokens

    def restore(self, kv: torch.Tensor) -> None:
        """Append kept KV `(L, 2, H_kv, T, D)`, from whichever device."""
        self.extend(kv.shape[3]).copy_(kv, non_blocking=True)

    def filled(self, start: int, end: int) -> torch.Tensor:
        """A view `(L, 2, H_kv, end - start, D)`."""
        assert end <= self.length, f"{end} of {self.length} tokens"
        return self._memory.kv[:, :, :, start:end]


class _Memory:
    """`kv` `(L, 2, H_kv, capacity, D)`, of which `length` tokens are filled."""

    def __init__(self, shape: KVShape, capacity: int) -> None:
        self.kv = shape.empty(capacity)
        self.length = 0

    @property
    def capacity(self) -> int:
        return self.kv.shape[3]

    def reserve(self, num_tokens: int) -> None:
        self.kv = grown(self.kv, self.length, num_tokens)

    def append(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes a layer's `(1, H_kv, T, D)` and returns all of that layer's. The last layer ends the step."""
        end = self.length + keys.shape[2]
        self.reserve(end)
        own = self.kv[layer]  # (2, H_kv, capacity, D)
        own[0, :, self.length : end] = keys[0]
        own[1, :, self.length : end] = values[0]
        if layer == len(self.kv) - 1:
            self.length = end
        return own[0:1, :, :end], own[1:2, :, :end]


class _Layer(DynamicLayer):
    """One layer's view of the memory. Differs from `DynamicLayer` in where keys and values are."""

    def __init__(self, memory: _Memory, layer: int) -> None:
        super().__init__()
        self.is_initialized = True
        self._memory = memory
        self._layer = layer

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self._memory.append(self._layer, key_states, value_states)

    def get_seq_length(self) -> int:
        return self._memory.length
