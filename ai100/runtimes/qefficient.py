"""The runtime of the card: a graph compiled by QEfficient, in a session on Cloud AI 100.

A session holds a compiled graph on a device, and between runs the graph's retained state: every `past_*` input, whose
next value is the output of the same name plus `_RetainedState`. `Session` is the part of QEfficient's
`QAICInferenceSession` that is used (QEfficient/generation/cloud_infer.py). It is injected, so that the same code
runs over ONNX Runtime (`onnx_session.py`). Not here: QEfficient's own decode loop, which is greedy only and writes
into the slots of idle rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ai100.runtimes.model_files import ModelFiles
from ai100.runtimes.runtime import DecodeRow, DeviceLost, FilledSlots, Logits, SlotRange, StaticShapes

Buffers = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class ContextLengths:
    """Over how many positions a run can attend, in ascending order; none: over all `ctx_len`, however few are filled.
    They are the shapes of the graph's input `comp_ctx_lengths`."""

    prefill: tuple[int, ...] = ()
    decode: tuple[int, ...] = ()

    def check(self, ctx_len: int) -> None:
        """Raises `ValueError` where one doesn't reach to the end."""
        for name, lengths in (("prefill", self.prefill), ("decode", self.decode)):
            if lengths and lengths[-1] < ctx_len:
                raise ValueError(f"{name} attends over {lengths[-1]} positions at most, and ctx_len is {ctx_len}")


class Session(Protocol):
    """One thread at a time."""

    @property
    def input_names(self) -> Sequence[str]: ...

    @property
    def output_names(self) -> Sequence[str]: ...

    def skip_buffers(self, skipped_buffer_names: list[str]) -> None:
        """These stay on the device: they are neither given nor given back."""
        ...

    def set_buffers(self, buffers: Buffers) -> None:
        """Sets inputs, and the shapes of outputs."""
        ...

    def run(self, inputs: Buffers) -> Buffers:
        """Every failure is an exception, of many types; the retained state is lost with it."""
        ...

    def deactivate(self) -> None:
        """Gives the device back."""
        ...


def skip_retained_state(session: Session) -> None:
    names = [*session.input_names, *session.output_names]
    session.skip_buffers([name for name in names if name.startswith("past_")])


def logits_buffer(batch_size: int, vocab_size: int) -> Buffers:
    return {"logits": np.zeros((batch_size, 1, vocab_size), dtype=np.float32)}


NOWHERE = -1
"""The position of padding and of idle rows: what they compute is written into no slot, and their logits mean
nothing."""
WIPING_TOKEN = 0


ALL_OF_THE_CONTEXT = ContextLengths()


class QEfficientRuntime:
    """`Runtime` over a session. `open_session` opens one with empty slots, at the start and after each loss.

    Once a run has failed, what the device holds is unknown, whatever the reason was: that is a lost device.
    """

    def __init__(
        self,
        open_session: Callable[[], Session],
        files: ModelFiles,
        shapes: StaticShapes,
        name: str = "qaic",
        context_lengths: ContextLengths = ALL_OF_THE_CONTEXT,
    ) -> None:
        """Raises what `open_session` raises, and `ValueError` for context lengths that end before `ctx_len`."""
        files.check(shapes)
        context_lengths.check(shapes.ctx_len)
        self._context_lengths = context_lengths
        self.name = name
        self.shapes = shapes
        self.tokenizer = files.tokenizer
        self.vocab_size = files.vocab_size
        self.eos_token_ids = files.eos_token_ids
        self._filled = FilledSlots(shapes, self.vocab_size)
        self._open_session = open_session
        self.session: Session | None = None
        """None while the device is lost or closed."""
        self._open()

    def prefill(self, slot: int, token_ids: Sequence[int], position: int) -> Logits:
        written = self._filled.prefill_range(slot, token_ids, position)
        batch_size, seq_len = self.shapes.prefill_batch_size, self.shapes.prefill_seq_len
        logits: Logits = self._run([token_ids], [written], batch_size, seq_len, self._context_lengths.prefill)[0]
        return logits

    def decode(self, rows: Sequence[DecodeRow]) -> Logits:
        written = self._filled.decode_ranges(rows)
        token_ids = [[row.token_id] for row in rows]
        return self._run(token_ids, written, self.shapes.full_batch_size, 1, self._context_lengths.decode)

    def clear(self, slot: int) -> None:
        """Overwrites what the slot held: a host has no other hand on one slot of the device."""
        self._opened()
        step = self.shapes.prefill_seq_len
        num_tokens = self._filled.num_touched(slot)
        for position in range(0, num_tokens, step):
            self.prefill(slot, [WIPING_TOKEN] * min(step, num_tokens - position), position)
        self._filled.empty(slot)

    def reopen(self) -> None:
        self.close()
        try:
            self._open()
        except Exception as error:
            raise DeviceLost(f"the device doesn't come back: {error}") from error

    def close(self) -> None:
        session, self.session = self.session, None
        self._filled.empty_all()
        if session is not None:
            with suppress(Exception):  # a lost device can't be given back properly
                session.deactivate()

    def _open(self) -> None:
        self.session = self._open_session()
        skip_retained_state(self.session)

    def _run(
        self,
        token_ids: Sequence[Sequence[int]],
        written: Sequence[SlotRange],
        batch_size: int,
        seq_len: int,
        context_lengths: Sequence[int],
    ) -> Logits:
        """One run of these rows, padded to a compiled shape, over the least of these contexts that has all their
        positions. Returns the logits `(B, V)` of each row's last token."""
        session = self._opened()
        inputs = padded_inputs(token_ids, written, batch_size, seq_len)
        if context_lengths:
            end = max(row.end for row in written)
            length = next(length for length in context_lengths if length >= end)
            inputs["comp_ctx_lengths"] = np.zeros(length, dtype=np.int64)
        try:
            session.set_buffers(logits_buffer(batch_size, self.vocab_size))
            logits = session.run(inputs)["logits"]
        except Exception as error:
            self.close()
            raise DeviceLost(f"the device is lost: {error or type(error).__name__}") from error
        self._filled.touch(written)
        self._filled.fill(written)
        return np.array(logits[: len(written), 0], dtype=np.float32)

    def _opened(self) -> Session:
        if self.session is None:
            raise DeviceLost("the device is lost or closed; reopen it")
        return self.session


def padded_inputs(
    token_ids: Sequence[Sequence[int]], written: Sequence[SlotRange], batch_size: int, seq_len: int
) -> Buffers:
    """`input_ids` and `position_ids` `(batch_size, seq_len)`, `batch_index` `(batch_size, 1)`, all int64.

    Padding and idle rows are at NOWHERE; idle rows get slots of their own, so that no slot stands in a batch twice.
    """
    input_ids = np.zeros((batch_size, seq_len), dtype=np.int64)
    position_ids = np.full((batch_size, seq_len), NOWHERE, dtype=np.int64)
    for number, (row, tokens) in enumerate(zip(written, token_ids, strict=True)):
        input_ids[number, : len(tokens)] = tokens
        position_ids[number, : len(tokens)] = np.arange(row.start, row.end)
    busy = [row.slot for row in written]
    idle = [slot for slot in range(batch_size) if slot not in busy]
    batch_index = np.array((busy + idle)[:batch_size], dtype=np.int64)[:, None]
    return {"input_ids": input_ids, "position_ids": position_ids, "batch_index": batch_index}
