"""What a request's time to first token leaves for its blend, as the scheduler can tell."""

from __future__ import annotations

import statistics
import time
from collections import deque

from vllm.v1.request import Request

RECENT = 8


class TimeLeft:
    """Knows how long a step takes beside its blends: its forward, over the question and other requests' tokens, and
    vLLM's own work. The median of the last steps with blends counts; before the first it is taken for nothing.
    """

    def __init__(self) -> None:
        self._beside_ms: deque[float] = deque(maxlen=RECENT)

    def budget_ms(self, request: Request, max_ttft_ms: float) -> float:
        """From now to the end of its blend. Negative where it is too late."""
        waited_ms: float = 1e3 * (time.time() - request.arrival_time)
        beside_ms = statistics.median(self._beside_ms) if self._beside_ms else 0.0
        return max_ttft_ms - waited_ms - beside_ms

    def note(self, step_ms: float, blends_ms: float) -> None:
        self._beside_ms.append(max(0.0, step_ms - blends_ms))
