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

Other lines of a server's log are no JSON objects: `grep '^{'` leaves the requests. Standard library only.
"""

from __future__ import annotations

import json
import logging
import sys
from collections import deque
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

logger = logging.getLogger("kvarena.requests")

CLIENT_GONE = 499
_MAX_PATH_CHARS = 80
_recent: deque[tuple[str, str]] = deque(maxlen=1024)  # request ids and their lines


def log_request(contender: str, request_id: str, status: int, fields: Mapping[str, object]) -> None:
    """One line. `fields` come after the first four keys, milliseconds with one decimal."""
    time = datetime.now(UTC).isoformat(timespec="milliseconds")
    first = {"time": time, "contender": contender, "request_id": request_id, "status": status}
    line = json.dumps(first | {key: _rounded(key, value) for key, value in fields.items()})
    _recent.append((request_id, line))
    logger.info(line)


def lines_of_request(request_id: str) -> list[str]:
    """Its lines among the last ones of this process, oldest first."""
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
    """Single values of a report, also those that stand together in an object; lists are too long for a line."""
    found: dict[str, object] = {}
    for key, value in details.items():
        if isinstance(value, Mapping):
            found |= figures(value)
        elif value is None or isinstance(value, str | int | float):
            found[key] = _rounded(key, value)
    return found


def path_of(scope: Mapping[str, Any]) -> str:
    """The request's path, cut where it is long."""
    return str(scope["path"])[:_MAX_PATH_CHARS]


def _rounded(key: str, value: object) -> object:
    return round(value, 1) if key.endswith("_ms") and isinstance(value, float) else value
