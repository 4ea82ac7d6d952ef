"""A generation's line in the log: what its prompt was made of, how it ended, how long it took."""

from __future__ import annotations

from kvarena.api.engine import EngineUnavailable, GenerationRequest
from kvarena.api.report_log import TOKEN_COUNTS
from kvarena.api.request_log import CLIENT_GONE, figures, log_request
from kvarena.api.running import Outcome

_STATUSES = {"stop": 200, "length": 200, "abort": CLIENT_GONE, "refused": 400, "error": 500}


def log_outcome(contender: str, request: GenerationRequest, outcome: Outcome, arrived_at: float) -> None:
    """A request of several choices has a line for each."""
    report = outcome.report
    fields: dict[str, object] = {
        "id": request.request_id,
        "finish": finish_of(outcome),
        "approximate": report.approximate,
        "num_prompt_tokens": report.num_prompt_tokens,
        **{name: getattr(report, name) for name in TOKEN_COUNTS},
        "num_generated_tokens": outcome.num_tokens,
    }
    if outcome.first_token_at is not None:
        fields["ttft_ms"] = (outcome.first_token_at - arrived_at) * 1e3
    fields["total_ms"] = (outcome.ended_at - arrived_at) * 1e3
    fields["details"] = figures(report.details)
    log_request(contender, request.http_request_id, status_of(outcome), fields)


def finish_of(outcome: Outcome) -> str:
    """`stop`, `length`, `abort` (its client went away), `refused` or `error`."""
    if outcome.error is not None:
        return "refused" if outcome.refused else "error"
    return outcome.finish_reason or "abort"


def status_of(outcome: Outcome) -> int:
    """What the client was told, or would have been told if its stream hadn't begun."""
    return 503 if isinstance(outcome.error, EngineUnavailable) else _STATUSES[finish_of(outcome)]
