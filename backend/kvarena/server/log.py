"""The log's one line for each request: a JSON object with the same keys in every contender, and no word of a prompt.

| key | |
|---|---|
| `time`, `contender` | when it ended (UTC), and which server says so |
| `request_id` | the request's `X-Request-Id`, or a new id where it has no valid one |
| `id` | the answer's id, which reports are found by |
| `status`, `finish` | HTTP's status; `stop`, `length`, `abort` (the client went away: 499), `refused` or `error` |
| `num_*_tokens` | as in request reports, and `num_generated_tokens` |
| `misses` | of `blend`: how many chunks weren't reused, by reason |
| `ttft_ms`, `total_ms` | from arrival to the first token, and to the end |
| `details` | the report's further figures, which are the contender's own |

Other lines of a server's log are no JSON objects: `grep '^{'` leaves the requests.
"""

from __future__ import annotations

import json
import logging
import sys
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from kvarena.engines.base import TOKEN_COUNTS, EngineUnavailable, FinishReason, GenerationRequest, Report

logger = logging.getLogger("kvarena.requests")

CLIENT_GONE = 499
_STATUSES = {"stop": 200, "length": 200, "abort": CLIENT_GONE, "refused": 400, "error": 500}
_MAX_PATH_CHARS = 80
_recent: deque[tuple[str, str]] = deque(maxlen=1024)  # request ids and their lines


def log_request(contender: str, request_id: str, status: int, fields: Mapping[str, object]) -> None:
    """One line. `fields` come after the first four keys, milliseconds with one decimal."""
    time = datetime.now(UTC).isoformat(timespec="milliseconds")
    first = {"time": time, "contender": contender, "request_id": request_id, "status": status}
    line = json.dumps(first | {key: _rounded(key, value) for key, value in fields.items()})
    _recent.append((request_id, line))
    logger.info(line)


@dataclass(frozen=True)
class Outcome:
    """How a generation went. `finish_reason` None without an error: it was closed before its end. Times in seconds of
    `time.perf_counter`; `first_token_at` None: there was none.
    """

    report: Report
    finish_reason: FinishReason | None
    num_tokens: int
    started_at: float
    ended_at: float
    first_token_at: float | None = None
    last_token_at: float | None = None
    error: BaseException | None = None

    @property
    def refused(self) -> bool:
        """Whether the engine won't serve this request, as its contract says it: before the first token."""
        return isinstance(self.error, ValueError) and self.first_token_at is None

    @property
    def finish(self) -> str:
        """`stop`, `length`, `abort` (its client went away), `refused` or `error`."""
        if self.error is not None:
            return "refused" if self.refused else "error"
        return self.finish_reason or "abort"

    @property
    def status(self) -> int:
        """What the client was told, or would have been told if its stream hadn't begun."""
        return 503 if isinstance(self.error, EngineUnavailable) else _STATUSES[self.finish]


def log_outcome(contender: str, request: GenerationRequest, outcome: Outcome, arrived_at: float) -> None:
    """A request of several choices has a line for each."""
    report = outcome.report
    fields: dict[str, object] = {
        "id": request.request_id,
        "finish": outcome.finish,
        "approximate": report.approximate,
        "num_prompt_tokens": report.num_prompt_tokens,
        **{name: getattr(report, name) for name in TOKEN_COUNTS},
        "num_generated_tokens": outcome.num_tokens,
    }
    if outcome.first_token_at is not None:
        fields["ttft_ms"] = (outcome.first_token_at - arrived_at) * 1e3
    fields["total_ms"] = (outcome.ended_at - arrived_at) * 1e3
    fields["details"] = figures(report.details)
    log_request(contender, request.http_request_id, outcome.status, fields)


def log_refusal(contender: str, scope: Mapping[str, Any], status: int, **why: str) -> None:
    """A request that came to no generation; its path is cut where it is long."""
    finish = "error" if status >= 500 else "refused"
    where = {"method": scope["method"], "path": str(scope["path"])[:_MAX_PATH_CHARS]}
    log_request(contender, scope["state"]["request_id"], status, {"finish": finish, **where, **why})


def lines_of_request(request_id: str) -> list[str]:
    """Its lines among the last of this process, oldest first."""
    return [line for of, line in list(_recent) if of == request_id]


def write_to_standard_output() -> None:
    """Lines go there as they are, however the process writes the rest of its log."""
    if logger.handlers:
        return
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


def figures(details: Mapping[str, object]) -> dict[str, object]:
    """A report's single values, nested ones too; lists are too long for a line."""
    found: dict[str, object] = {}
    for key, value in details.items():
        if isinstance(value, Mapping):
            found |= figures(value)
        elif value is None or isinstance(value, str | int | float):
            found[key] = _rounded(key, value)
    return found


def _rounded(key: str, value: object) -> object:
    return round(value, 1) if key.endswith("_ms") and isinstance(value, float) else value
