"""The seam between slots and what they run on: a model compiled for static shapes, whose KV slots stay on its device.

Who does what: a runtime runs tokens at positions of slots and gives logits. Which slot, which position, which token
comes next, sampling, stop strings and text are its caller's.

| range of a slot `[0, ctx_len)` | owner |
|---|---|
| `[0, position)` | written by earlier calls, read by this one |
| `[position, position + n)` | written by this call |
| after that | undefined; never read |

`FilledSlots` counts how many tokens each slot holds and refuses the same calls for every runtime. A slot is filled
without holes, so a call reads nothing but what was written since the slot was last emptied: that is how a slot's old
text can't show, even where a device can't be told to wipe it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvarena.engines.base import Tokenizer

Logits = NDArray[np.float32]
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


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


@dataclass(frozen=True)
class ModelFiles:
    """What a runtime has to know of a model beside its weights. `path` is a local folder or a hub name."""

    path: str
    config: Any
    tokenizer: Tokenizer
    eos_token_ids: frozenset[int]

    @classmethod
    def read(cls, path: str) -> ModelFiles:
        """Raises `OSError` when there is no such model."""
        from transformers import AutoConfig, AutoTokenizer  # here, for the command line knows cards without it

        config = AutoConfig.from_pretrained(path)
        return cls(path, config, AutoTokenizer.from_pretrained(path), _eos_token_ids(path, config))

    @property
    def vocab_size(self) -> int:
        return int(self.config.vocab_size)

    def check(self, shapes: StaticShapes) -> None:
        """Raises `ValueError` when slots of this length can't hold the model's KV exactly."""
        longest = getattr(self.config, "max_position_embeddings", None)
        if longest and shapes.ctx_len > longest:
            raise ValueError(f"ctx_len {shapes.ctx_len} is more than the {longest} positions of {self.path}")
        window = getattr(self.config, "sliding_window", None)
        kinds = getattr(self.config, "layer_types", None) or ["sliding_attention"]
        if window and "sliding_attention" in kinds and window < shapes.ctx_len:
            raise ValueError(f"ctx_len {shapes.ctx_len} is more than the sliding window of {window} tokens")
        rope = str((getattr(self.config, "rope_parameters", None) or {}).get("rope_type", "default"))
        if rope in LENGTH_DEPENDENT_ROPE:
            raise ValueError(f"rope_type {rope!r}: frequencies that depend on the length don't fit kept keys")


def kv_shape(config: Any) -> tuple[int, int, int]:
    """Layers, KV heads and head size of a model whose layers are alike. Raises `ValueError` for any other."""
    try:
        head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return config.num_hidden_layers, config.num_key_value_heads, head_size
    except AttributeError as error:
        raise ValueError(f"a {config.model_type} doesn't run over KV slots: {error}") from error


def _eos_token_ids(path: str, config: Any) -> frozenset[int]:
    from transformers import GenerationConfig

    try:
        found = GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:  # a model without generation_config.json
        found = None
    if found is None:
        found = config.eos_token_id
    return frozenset([] if found is None else [found] if isinstance(found, int) else found)


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


class Runtime(ABC):
    """One model on one device. Not thread-safe: one call at a time, from any thread.

    Equation: the logits of a slot that was filled by any cut of a text into `prefill` and `decode` calls are those of
    one forward pass over that text, whatever other slots did in between.

    Every call checks its arguments and raises `ValueError` naming the value and the bounds before it touches a slot
    (a slot that doesn't exist, a slot twice in one batch, no tokens or too many, ids outside of the vocabulary,
    positions after what the slot holds or past `ctx_len`); `DeviceLost` when the device is gone, or closed.
    """

    name: str

    def __init__(self, files: ModelFiles, shapes: StaticShapes) -> None:
        """Raises `ValueError` when slots of these shapes can't hold the model's KV exactly."""
        files.check(shapes)
        self.shapes = shapes
        self.tokenizer = files.tokenizer
        self.vocab_size = files.vocab_size
        self.eos_token_ids = files.eos_token_ids
        self._filled = FilledSlots(shapes, files.vocab_size)

    def prefill(self, slot: int, token_ids: Sequence[int], position: int) -> Logits:
        """Runs 1 to `prefill_seq_len` tokens from `position` on, one run of the device.

        Returns the logits `(V,)` of the last token.
        """
        written = self._filled.prefill_range(slot, token_ids, position)
        logits: Logits = self._run([token_ids], [written], decodes=False)[0]
        return logits

    def decode(self, rows: Sequence[DecodeRow]) -> Logits:
        """Runs one token in each of 1 to `full_batch_size` slots, one run of the device; other slots stay as they are.

        Returns the logits `(len(rows), V)`.
        """
        written = self._filled.decode_ranges(rows)
        return self._run([[row.token_id] for row in rows], written, decodes=True)

    @abstractmethod
    def clear(self, slot: int) -> None:
        """Nothing that the slot held can show in any later call."""

    @abstractmethod
    def reopen(self) -> None:
        """Brings a lost or closed device back with empty slots. Raises `DeviceLost` when it can't."""

    @abstractmethod
    def close(self) -> None:
        """Gives the device back; more than once is no error."""

    @abstractmethod
    def _run(self, token_ids: Sequence[Sequence[int]], written: Sequence[SlotRange], *, decodes: bool) -> Logits:
        """One run over rows of equal length, in the shapes of a decode step or of a prefill. Writes and counts what
        each row brings. Returns the logits `(B, V)` of each row's last token.
        """


@dataclass(frozen=True, slots=True)
class SlotRange:
    """The positions `[start, end)` of a slot, which one row of a run writes. It reads `[0, end)`."""

    slot: int
    start: int
    end: int


class FilledSlots:
    """The lengths of all slots. The methods that check raise `ValueError` naming the value and the bounds."""

    def __init__(self, shapes: StaticShapes, vocab_size: int) -> None:
        self._shapes = shapes
        self._vocab_size = vocab_size
        self._num_tokens = [0] * shapes.kv_cache_batch_size
        self._num_touched = [0] * shapes.kv_cache_batch_size

    def num_touched(self, slot: int) -> int:
        """How many positions were written since the slot was emptied: more than it holds when it went back."""
        self._check_slot(slot)
        return self._num_touched[slot]

    def prefill_range(self, slot: int, token_ids: Sequence[int], position: int) -> SlotRange:
        """What this prefill would write."""
        most = self._shapes.prefill_seq_len
        if not 1 <= len(token_ids) <= most:
            raise ValueError(f"{len(token_ids)} tokens to prefill; a run of the device takes 1 to {most}")
        return self._range(slot, token_ids, position)

    def decode_ranges(self, rows: Sequence[DecodeRow]) -> list[SlotRange]:
        """What this decode step would write, row by row."""
        most = self._shapes.full_batch_size
        if not 1 <= len(rows) <= most:
            raise ValueError(f"{len(rows)} rows to decode; a run of the device takes 1 to {most}")
        slots = [row.slot for row in rows]
        if len(set(slots)) < len(slots):
            raise ValueError(f"a slot stands twice in one batch: {slots}")
        return [self._range(row.slot, (row.token_id,), row.position) for row in rows]

    def touch(self, ranges: Iterable[SlotRange]) -> None:
        """These are about to be written."""
        for written in ranges:
            self._num_touched[written.slot] = max(written.end, self._num_touched[written.slot])

    def fill(self, ranges: Iterable[SlotRange]) -> None:
        """These were written; what was after them is undefined now."""
        for written in ranges:
            self._num_tokens[written.slot] = written.end

    def empty(self, slot: int) -> None:
        self._num_tokens[slot] = self._num_touched[slot] = 0

    def empty_all(self) -> None:
        for slot in range(len(self._num_tokens)):
            self.empty(slot)

    def _range(self, slot: int, token_ids: Sequence[int], position: int) -> SlotRange:
        self._check_slot(slot)
        for token_id in token_ids:
            if not 0 <= token_id < self._vocab_size:
                raise ValueError(f"no token {token_id}; the vocabulary has 0 to {self._vocab_size - 1}")
        held, end = self._num_tokens[slot], position + len(token_ids)
        if not 0 <= position <= held:
            raise ValueError(f"position {position} of slot {slot}, which holds {held} tokens; choose 0 to {held}")
        if end > self._shapes.ctx_len:
            raise ValueError(f"tokens up to position {end - 1} of slot {slot}; ctx_len is {self._shapes.ctx_len}")
        return SlotRange(slot, position, end)

    def _check_slot(self, slot: int) -> None:
        if not 0 <= slot < len(self._num_tokens):
            raise ValueError(f"no slot {slot}; there are 0 to {len(self._num_tokens) - 1}")
