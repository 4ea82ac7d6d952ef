"""What is kept of a processed task, when it is sound, and what reuse did for one prompt."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch

from kvarena.contenders.simllm.similarity import AgreementSample
from kvarena.core.plan import Chunk, TokenIds
from kvarena.core.store import is_finite

TopLayerKV = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class LayerKVShape:
    """What one layer keeps of a token: `H_kv` heads of size `D`."""

    num_kv_heads: int
    head_size: int

    @classmethod
    def of(cls, kv: TopLayerKV) -> LayerKVShape:
        """The shape of keys and values `(1, H_kv, T, D)`. Raises `ValueError` for anything else."""
        if len(kv) != 2 or not all(isinstance(part, torch.Tensor) and part.dim() == 4 for part in kv):
            raise ValueError("top_layer_kv must be two tensors, keys and values, each (1, H_kv, T, D)")
        return cls(kv[0].shape[1], kv[0].shape[3])

    def problem_of(self, kv: TopLayerKV) -> str | None:
        """What is wrong with keys and values of one layer; None when they are `(1, H_kv, T, D)` each and finite."""
        expected = f"must be keys and values (1, {self.num_kv_heads}, T, {self.head_size}), T from 1"
        if len(kv) != 2:
            return f"{expected}, not {len(kv)} tensors"
        keys, values = kv
        num_tokens = keys.shape[2] if keys.dim() == 4 else 0
        shape = (1, self.num_kv_heads, num_tokens, self.head_size)
        if num_tokens == 0 or keys.shape != shape or values.shape != shape:
            return f"{expected}, not {tuple(keys.shape)} and {tuple(values.shape)}"
        if not (is_finite(keys) and is_finite(values)):
            return f"{expected}, and finite; there is NaN or infinity in it"
        return None


@dataclass(frozen=True, eq=False)
class WholeKV:
    """A prompt's token ids and its KV of all layers, `(2, L, T, H_kv * D)`, keys rotated for positions 0 to T-1."""

    chunk: Chunk
    kv: torch.Tensor

    def is_sound(self, num_tokens: int) -> bool:
        has_shape = self.kv.dim() == 4 and self.kv.shape[2] == len(self.chunk) == num_tokens
        return has_shape and is_finite(self.kv)


class KnownTask(Protocol):
    """What is known of a task before its KV is there. `chunk` is its prompt in mode "aligned"."""

    @property
    def num_tokens(self) -> int: ...

    @property
    def salt(self) -> str: ...

    @property
    def chunk(self) -> Chunk | None: ...


@dataclass(frozen=True, eq=False)
class TaskCacheEntry:
    """A task whose KV was computed in full.

    `task_embedding` `(E,)` is the mean of the prompt's input embeddings, fp32, on the CPU. `top_layer_kv` are the last
    layer's keys, rotated for positions 0 to T-1, and values, each `(1, H_kv, T, D)`, on the manager's device.
    `timestamp` is when it was added, in seconds since the epoch. `whole_kv` is there in mode "aligned". Tasks of
    different salts never match. `token_ids` are the prompt's, where they were given.
    """

    task_id: str
    task_embedding: torch.Tensor
    lsh_hash: str
    top_layer_kv: TopLayerKV
    timestamp: float
    whole_kv: WholeKV | None = None
    salt: str = ""
    token_ids: TokenIds | None = None

    @property
    def num_tokens(self) -> int:
        return self.top_layer_kv[0].shape[2]

    @property
    def num_bytes(self) -> int:
        """Of its KV."""
        kept = [*self.top_layer_kv, *([self.whole_kv.kv] if self.whole_kv else [])]
        return sum(tensor.nbytes for tensor in kept)

    @property
    def chunk(self) -> Chunk | None:
        return self.whole_kv.chunk if self.whole_kv else None

    def is_sound(self, shape: LayerKVShape) -> bool:
        if shape.problem_of(self.top_layer_kv) is not None:
            return False
        return self.whole_kv is None or self.whole_kv.is_sound(self.num_tokens)


@dataclass(frozen=True)
class TaskOutcome:
    """`num_layer_passes` counts a prompt token once for each layer that ran over it: `T * L` without reuse.

    `num_prompt_tokens = num_reused_tokens + num_recomputed_tokens + num_computed_tokens`. But in mode "aligned" every
    token of a hit counts as reused: the earlier task's KV stands for what they would have been computed for.
    `matched_token_ids` are the earlier prompt's. `check` is there when reuse was tried beside a full prefill, to be
    compared with it; that counts as a miss.
    """

    task_id: str
    num_prompt_tokens: int
    num_layer_passes: int
    matched_task_id: str | None = None
    similarity: float | None = None
    is_approximate: bool = False
    num_reused_tokens: int = 0
    num_recomputed_tokens: int = 0
    spans: tuple[tuple[int, int], ...] = ()
    matched_token_ids: TokenIds | None = field(default=None, compare=False)
    check: AgreementSample | None = None

    @property
    def is_hit(self) -> bool:
        return self.matched_task_id is not None

    @property
    def num_computed_tokens(self) -> int:
        return self.num_prompt_tokens - self.num_reused_tokens - self.num_recomputed_tokens
