"""What the generations of the PyTorch contenders share: how they begin, are closed, end and are timed.

The request itself, from its text to its last token, is each contender's own `_steps`.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace

from kvarena.core.report import Stopwatch
from kvarena.engines.base import FinishReason, GeneratedToken, GenerationRequest, Report
from kvarena.engines.hf.model import Cancelled, HFModel


@dataclass
class Timings(Stopwatch):
    """Milliseconds. `first_token_ms` is all that passed until the first token, whatever it was spent on. An engine's
    own stages are further fields.
    """

    tokenize_ms: float = 0.0
    prefill_ms: float = 0.0
    first_token_ms: float = 0.0
    decode_ms: float = 0.0
    total_ms: float = 0.0

    def rounded(self) -> dict[str, float]:
        """By name, as a report has them."""
        return {name: round(value, 3) for name, value in asdict(self).items()}


FIRST_CAPACITY_TOKENS = 256
"""A sequence's memory has room for so many tokens of the answer, or somewhat fewer, before it grows."""


class EngineGeneration(ABC):
    """One request. Implements `kvarena.engines.base.Generation`."""

    def __init__(self, model: HFModel, request: GenerationRequest, timings: Timings) -> None:
        self.report = Report()
        self.finish_reason: FinishReason | None = None
        self.prompt_token_ids: Sequence[int] = ()
        self.timings = timings
        self._model = model
        self._request = request
        self._closed = threading.Event()

    def __iter__(self) -> Iterator[GeneratedToken]:
        try:
            with self.timings.timed("total_ms"):
                yield from self._steps()
        except Cancelled:
            pass
        finally:
            self.report.details |= {"timings": self._timing_figures()}

    def close(self) -> None:
        self._closed.set()

    @abstractmethod
    def _steps(self) -> Iterator[GeneratedToken]:
        """Tokens until `finish_reason` is set or the generation was closed. Fills in the report."""

    def _timing_figures(self) -> dict[str, float]:
        return self.timings.rounded()

    def _drawn(self, token: GeneratedToken) -> GeneratedToken:
        """The token, marked where it ends the answer; `finish_reason` is set then."""
        if token.token_id not in self._model.eos_token_ids or self._request.sampling.ignore_eos:
            return token
        self.finish_reason = "stop"
        return replace(token, is_end=True)
