"""The lines that requests leave in the log, read as what they are: JSON objects."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

LOGGER = "kvarena.requests"


def request_lines(caplog: pytest.LogCaptureFixture, at_least: int = 0) -> list[dict[str, Any]]:
    """Waits for so many: a line may come a moment after its answer."""
    stops_by = time.monotonic() + 10
    while len(lines := _lines(caplog)) < at_least and time.monotonic() < stops_by:
        time.sleep(0.05)
    return lines


def lines_of(log: str) -> list[dict[str, Any]]:
    """Those of a server's whole log."""
    return [json.loads(line) for line in log.splitlines() if line.startswith("{")]


def _lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [json.loads(record.getMessage()) for record in list(caplog.records) if record.name == LOGGER]
