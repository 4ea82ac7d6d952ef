"""How far the main memory of processes rises while something runs, from Linux's own count of each one's peak."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

import psutil

CLEAR_PEAK = "5"
"""What makes Linux forget the peak so far (proc(5), `/proc/[pid]/clear_refs`)."""


class PeakMemory:
    """Peak of the resident memory of a process (by default this one), or of it and all it has started.

    Of several processes it is the sum of their peaks: at least the peak of their sum. Figures are None where the
    system has no count that can be set back. Nothing runs meanwhile, so that measuring doesn't disturb.
    """

    def __init__(self, pid: int | None = None, with_children: bool = False) -> None:
        self._pid, self._with_children = pid or os.getpid(), with_children
        self._pids: Sequence[int] = ()
        self.before_bytes: int | None = None
        """Resident when `start` was called."""

    def start(self) -> None:
        self._pids, self.before_bytes = (), None
        with contextlib.suppress(OSError, psutil.Error):
            root = psutil.Process(self._pid)
            found = [root, *(root.children(recursive=True) if self._with_children else ())]
            for process in found:
                (Path("/proc") / str(process.pid) / "clear_refs").write_text(CLEAR_PEAK)
            before = sum(process.memory_info().rss for process in found)
            self._pids, self.before_bytes = [process.pid for process in found], before

    def peak_bytes(self) -> int | None:
        """The highest point since `start`."""
        peaks = [peak for pid in self._pids if (peak := _peak_bytes(pid))]
        return sum(peaks) if peaks else None

    def rise_bytes(self) -> int | None:
        """From `start` to the highest point since."""
        peak = self.peak_bytes()
        return None if peak is None or self.before_bytes is None else max(0, peak - self.before_bytes)


def _peak_bytes(pid: int) -> int:
    """0 for a process that is gone."""
    try:
        lines = (Path("/proc") / str(pid) / "status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)
