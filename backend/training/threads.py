"""As many threads as cores are free: a thread that has to share its core makes all the others wait for it."""

from __future__ import annotations

import time

import psutil
import torch

_EVERY_S = 6.0


class FreeCores:
    """Call `adapt` between steps; it looks at what other processes used since it looked last."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._num_cores = len(self._process.cpu_affinity())
        self._then, self._busy, self._own = self._now()

    def adapt(self) -> None:
        now, busy, own = self._now()
        if now - self._then < _EVERY_S:
            return
        others = ((busy - self._busy) - (own - self._own)) / (now - self._then)
        self._then, self._busy, self._own = now, busy, own
        threads = max(1, min(self._num_cores, round(self._num_cores - others)))
        if threads != torch.get_num_threads():
            torch.set_num_threads(threads)

    def _now(self) -> tuple[float, float, float]:
        times = psutil.cpu_times()
        return time.monotonic(), times.user + times.nice + times.system, sum(self._process.cpu_times()[:2])
