"""The part of QEfficient's `QAICInferenceSession` that a runtime uses (QEfficient/generation/cloud_infer.py).

A session holds a compiled graph on a device, and between runs the graph's retained state: every `past_*` input, whose
next value is the output of the same name with `_RetainedState` behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Buffers = dict[str, NDArray[Any]]


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
