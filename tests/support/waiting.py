"""Waiting for what happens in another thread or process, however slow the machine is."""

from __future__ import annotations

import time
from collections.abc import Callable

PATIENCE_S = 60.0


def wait_until(is_so: Callable[[], object], what: str = "it didn't come true", timeout_s: float = PATIENCE_S) -> None:
    """Raises `AssertionError` with `what` when it isn't so in time."""
    deadline_s = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline_s, what
        time.sleep(0.02)
