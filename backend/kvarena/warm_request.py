"""The request that fills the chunk cache with one chunk, and what its answer says: for `kvarena warm` and for the page.

A completion of one token whose prompt is the chunk between two separators. No HTTP.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from kvarena.documents import join_chunks

WARM_PATH = "/v1/completions"

Outcome = Literal["warmed", "already_there", "too_short", "failed"]


@dataclass(frozen=True)
class ChunkOutcome:
    """What became of one chunk; `reason` says why it failed."""

    name: str
    outcome: Outcome
    reason: str = ""


def warm_request(model: str, text: str, separator: str) -> dict[str, Any]:
    """The body of `POST WARM_PATH`."""
    return {
        "model": model,
        "prompt": join_chunks([text], separator),
        "max_tokens": 1,
        "temperature": 0,
        "kv_transfer_params": {"kvarena": {"store": True}},
    }


def warm_outcome(name: str, answer: Mapping[str, Any]) -> ChunkOutcome:
    """By the request report in the answer's body."""
    report = (answer.get("kv_transfer_params") or {}).get("kvarena")
    if not isinstance(report, dict):
        return ChunkOutcome(name, "failed", "the answer carries no request report")
    if report.get("blend_failures"):
        return ChunkOutcome(name, "failed", "its blend failed; the blend's log says why")
    if report.get("store_errors"):
        return ChunkOutcome(name, "failed", f"{report['store_errors']} store errors")
    if report.get("store_misses"):
        return ChunkOutcome(name, "warmed")
    return ChunkOutcome(name, "already_there" if report.get("store_hits") else "too_short")
