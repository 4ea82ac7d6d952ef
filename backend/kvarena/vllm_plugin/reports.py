"""The blend's request reports in the API server's process: filed by `stats.py`, read by whoever answers or logs."""

from __future__ import annotations

import asyncio
from typing import Any

from kvarena.api.report_log import ReportLog

REPORT_WAIT_S = 1.0
_POLL_S = 0.02

report_log = ReportLog()


async def wait_for_report(request_id: str) -> dict[str, Any] | None:
    """The report of an answer that was just given. It follows within a step of the engine; None: it doesn't."""
    deadline = asyncio.get_running_loop().time() + REPORT_WAIT_S
    while (report := report_log.get(request_id)) is None and asyncio.get_running_loop().time() < deadline:
        await asyncio.sleep(_POLL_S)
    return report
