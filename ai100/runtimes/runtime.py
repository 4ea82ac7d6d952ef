"""The seam between slots and what they run on: a model compiled for static shapes, whose KV slots stay on its device.

Who does what: a runtime runs tokens at positions of slots and gives logits. Which slot, which position, which token
comes next, sampling, stop strings and text are its caller's.

| range of a slot `[0, ctx_len)` | owner |
|---|---|
| `[0, position)` | written by earlier calls, read by this one |
| `[position, position + n)` | written by this call |
| behind | undefined; never read |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kvarena.api.tokenizer import Tokenizer

Logits = NDArray[np.float32]


@dataclass(frozen=True)
class StaticShapes:
    """What a model is compiled for. `kv_cache_batch_size` slots of `ctx_len` tokens; a decode step runs at most
    `full_batch_size` of them, a prefill step one, with at most `prefill_seq_len` tokens.

    Raises `ValueError` naming the value.
    """

    prefill_seq_len: int = 128
    ctx_len: int = 4096
    full_batch_size: int = 2
    kv_cache_batch_size: int = 4

    def __post_init__(self) -> None:
        for name in ("prefill_seq_len", "ctx_len", "full_batch_size", "kv_cache_batch_size"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if self.prefill_seq_len > self.ctx_len:
            raise ValueError(f"prefill_seq_len {self.prefill_seq_len} is more than ctx_len {self.ctx_len}")
        if self.full_batch_size > self.kv_cache_batch_size:
            raise ValueError(
                f"full_batch_size {self.full_batch_size} is more than the {self.kv_cache_batch_size} slots "
                "of kv_cache_batch_size"
            )

    @property
    def prefill_batch_size(self) -> int:
        """Rows of a prefill run: one; but a prefill of one token at a time is compiled as decode is."""
        return self.full_batch_size if self.prefill_seq_len == 1 else 1


@dataclass(frozen=True, slots=True)
class DecodeRow:
    """One token to be run at the position of its slot."""

    slot: int
    token_id: int
    position: int


class DeviceLost(RuntimeError):
    """The device is gone, in the middle of a call or before it: every slot's KV is lost with it.

    `reopen` may bring it back, with empty slots.
    """


class Runtime(Protocol):
    """One model on one device. Not thread-safe: one call at a time, from any thread.

    Equation: the logits of a slot that was filled by any cut of a text into `prefill` and `decode` calls are those of
    one forward pass over that text, whatever other slots did in between.

    Every call checks its arguments and raises `ValueError` naming the value and the bounds before it touches a slot
    (a slot that doesn't exist, a slot twice in one batch, no tokens or too many, ids outside of the vocabulary,
    positions behind what the slot holds or past `ctx_len`); `DeviceLost` when the device is gone, or closed.
    """

    name: str
    shapes: StaticShapes
    tokenizer: Tokenizer
    vocab_size: int
    eos_token_ids: frozenset[int]

    def prefill(self, slot: int, token_ids: Sequence[int], position: int) -> Logits:
        """Runs 1 to `prefill_seq_len` tokens from `position` on, one run of the device.

        Returns the logits `(V,)` of the last token.
        """
        ...

    def decode(self, rows: Sequence[DecodeRow]) -> Logits:
        """Runs one token in each of 1 to `full_batch_size` slots, one run of the device; other slots stay as they are.

        Returns the logits `(len(rows), V)`.
        """
        ...

    def clear(self, slot: int) -> None:
        """Nothing that the slot held can show in any later call."""
        ...

    def reopen(self) -> None:
        """Brings a lost or closed device back with empty slots. Raises `DeviceLost` when it can't."""
        ...

    def close(self) -> None:
        """Gives the device back; more than once is no error."""
        ...
