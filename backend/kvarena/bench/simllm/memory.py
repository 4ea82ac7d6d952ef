"""How far a process's main memory rises while something runs."""

from __future__ import annotations

import os
from pathlib import Path

import psutil

CLEAR_PEAK = "5"
"""What makes Linux forget the peak so far (proc(5), `/proc/[pid]/clear_refs`)."""


class PeakMemory:
    """Peak of the resident memory, from Linux's own count; None where the system has none that can be set back."""

    def __init__(self) -> None:
        self._own = Path("/proc") / str(os.getpid())

    def start(self) -> None:
        try:
            (self._own / "clear_refs").write_text(CLEAR_PEAK)
            self._before: int | None = psutil.Process().memory_info().rss
        except OSError:
            self._before = None

    def rise_bytes(self) -> int | None:
        """From `start` to the highest point since."""
        if self._before is None:
            return None
        lines = (self._own / "status").read_text().splitlines()
        peak_kib = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
        return max(0, peak_kib * 1024 - self._before)
