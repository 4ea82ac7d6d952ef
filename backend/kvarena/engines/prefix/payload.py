"""What the prefix cache keeps: KV of tokens, and logits behind them, as tensors on the CPU or on the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvarena.engines import host_memory


@dataclass(frozen=True)
class KVSegment:
    """KV `(L, 2, H_kv, T, D)`; `storage` is where copies go."""

    kv: torch.Tensor
    storage: torch.device

    @property
    def num_bytes(self) -> int:
        return self.kv.nbytes

    def __len__(self) -> int:
        return self.kv.shape[3]

    def slice(self, start: int, end: int) -> KVSegment:
        return KVSegment(self.kv[:, :, :, start:end], self.storage)

    def copy(self) -> KVSegment:
        return KVSegment(_copy(self.kv, self.storage), self.storage)


@dataclass(frozen=True)
class LastLogits:
    """Logits `(V,)` in the model's own type, so that they come back as they were."""

    logits: torch.Tensor
    storage: torch.device

    @property
    def num_bytes(self) -> int:
        return self.logits.nbytes

    def copy(self) -> LastLogits:
        return LastLogits(_copy(self.logits, self.storage), self.storage)


def _copy(tensor: torch.Tensor, storage: torch.device) -> torch.Tensor:
    """Pinned where a device will read it from the CPU's memory: those transfers are several times as fast."""
    if storage.type != "cpu":
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, device=storage)
    elif tensor.device.type == "cuda":
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    else:
        copy = host_memory.empty(tensor.shape, tensor.dtype)
    return copy.copy_(tensor)
