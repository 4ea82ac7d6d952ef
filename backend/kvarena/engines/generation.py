"""What the generations of the PyTorch engines share: how they begin, are closed, end and are timed.

The request itself, from its text to its last token, is each engine's own `_steps`.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

from kvarena.api.engine import FinishReason, GeneratedToken, GenerationRequest, Report
from kvarena.engines.hf_model import Cancelled, HFModel
from kvarena.engines.timings import Timings


class EngineGeneration(ABC):
    """One request. Implements `kvarena.api.engine.Generation`."""

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
            with self.timings.measure("total_ms"):
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

    def _ends_with(self, token: GeneratedToken) -> bool:
        if token.token_id in self._model.eos_token_ids and not self._request.sampling.ignore_eos:
            self.finish_reason = "stop"
        return self.finish_reason == "stop"
