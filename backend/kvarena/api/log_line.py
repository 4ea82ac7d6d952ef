"""The one line that every request leaves in the log: what its prompt was made of, how it ended, how long it took."""

from __future__ import annotations

import json
from collections.abc import Mapping

from kvarena.api.running import Outcome


def log_line(request_id: str, outcome: Outcome, arrived_at: float) -> str:
    """`kvarena request=... exact prompt=12 reused=8 recomputed=0 computed=4 generated=3 finish=stop ttft_ms=...`, then
    the engine's own figures.
    """
    report = outcome.report
    fields: dict[str, object] = {
        "prompt": report.num_prompt_tokens,
        "reused": report.num_reused_tokens,
        "recomputed": report.num_recomputed_tokens,
        "computed": report.num_computed_tokens,
        "generated": outcome.num_tokens,
        "finish": finish_of(outcome),
    }
    if outcome.first_token_at is not None:
        fields["ttft_ms"] = (outcome.first_token_at - arrived_at) * 1e3
    fields["total_ms"] = (outcome.ended_at - arrived_at) * 1e3
    fields |= {key: value for key, value in _figures(report.details).items() if key not in fields}
    kind = "approximate" if report.approximate else "exact"
    return f"kvarena request={request_id} {kind} " + " ".join(f"{key}={_shown(key, v)}" for key, v in fields.items())


def _figures(details: Mapping[str, object]) -> dict[str, object]:
    """Single values, also those that stand together in an object; lists are too long for a line."""
    found: dict[str, object] = {}
    for key, value in details.items():
        if isinstance(value, Mapping):
            found |= _figures(value)
        elif isinstance(value, str | int | float):
            found[key] = value
    return found


def finish_of(outcome: Outcome) -> str:
    """`stop`, `length`, `abort` (its client went away), `refused` or `error`."""
    if outcome.error is not None:
        return "refused" if outcome.refused else "error"
    return outcome.finish_reason or "abort"


def _shown(key: str, value: object) -> str:
    """Milliseconds to a tenth; other numbers with the digits that tell them apart."""
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, float):
        return f"{value:.1f}" if key.endswith("_ms") else f"{value:.6g}"
    text = str(value)
    return text if text.isprintable() and text and not set(text) & set(' "=') else json.dumps(text)
