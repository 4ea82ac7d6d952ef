"""Request reports: their shape, and the last of them by request id."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any

TOKEN_COUNTS = ("num_reused_tokens", "num_recomputed_tokens", "num_computed_tokens")


class ReportLog:
    """The last reports by request id. Thread-safe."""

    def __init__(self, max_reports: int = 1024) -> None:
        self._max_reports = max_reports
        self._reports: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, report: dict[str, Any]) -> None:
        with self._lock:
            self._reports.pop(report["request_id"], None)
            self._reports[report["request_id"]] = report
            while len(self._reports) > self._max_reports:
                self._reports.popitem(last=False)

    def forget(self, request_id: str) -> None:
        """What is kept under the id of an answer, as `get` finds it."""
        with self._lock:
            for key in [key for key in self._reports if _is_of(request_id, key)]:
                del self._reports[key]

    def get(self, request_id: str) -> dict[str, Any] | None:
        """By the id of the answer. An engine's own ids may have a suffix behind it, and so has each prompt of many."""
        with self._lock:
            newest_first = reversed(self._reports.items())
            found = next((report for key, report in newest_first if _is_of(request_id, key)), None)
        return found and {**found, "request_id": request_id}


def _is_of(request_id: str, key: str) -> bool:
    return key == request_id or key.startswith(request_id + "-")
