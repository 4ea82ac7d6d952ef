"""From bursts to rows: one for each setup of a cell."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvarena.bench.quality.setups import Setup
from kvarena.bench.results import Row, ratio_spread, spread
from kvarena.bench.ttft.client import Burst, Timed
from kvarena.bench.ttft.workload import Cell

DIGITS = 4
UNKNOWN = "unknown"
BLEND_MS = "blend_ms"
NOT_STAGES = (BLEND_MS, "max_ttft_ms")


@dataclass(frozen=True)
class Measured:
    """`is_told`: what the contender's store holds is known, from its kind or because it was started for this."""

    setup: Setup
    is_told: bool
    bursts: Sequence[Burst]

    @property
    def outcomes(self) -> list[Timed | str]:
        return [outcome for burst in self.bursts for outcome in burst.outcomes]

    @property
    def answered(self) -> list[Timed]:
        return [one for burst in self.bursts for one in burst.answered]


def cell_rows(cell: Cell, measured: Sequence[Measured], reference: str, num_known_chunks: int = 0) -> list[Row]:
    """`reference` names the contender that the others are compared with, prompt by prompt.

    `num_known_chunks` of each prompt ought to be in a blend's store.
    """
    plain = next((one for one in measured if one.setup.contender == reference), None)
    rows = [_row(cell, one, plain) for one in measured]
    return [{**row, "num_known_chunks": num_known_chunks} for row in rows]


def _row(cell: Cell, one: Measured, plain: Measured | None) -> Row:
    answered = one.answered
    failures = [outcome for outcome in one.outcomes if isinstance(outcome, str)]
    rates = [rate for burst in one.bursts if (rate := burst.requests_per_s)]
    return {
        **one.setup.to_json(),
        "context_tokens": cell.context_tokens,
        "store": cell.state if one.is_told else UNKNOWN,
        "prompts": cell.state,
        "concurrency": cell.concurrency,
        "num_requests": len(one.outcomes),
        "num_failed": len(failures),
        "failure": failures[0] if failures else None,
        "ttft_ms": _spread(one.ttft_ms for one in answered),
        "tpot_ms": _spread(tpot for one in answered if (tpot := one.tpot_ms) is not None),
        "e2e_ms": _spread(one.e2e_ms for one in answered),
        "speedup_vs_plain": _ratios(_sooner(one, plain)) if plain else None,
        "requests_per_s": ratio_spread(rates) if rates else None,
        "throughput_vs_plain": _ratios(_more(one, plain)) if plain else None,
        **_token_shares(answered),
        "stages_ms": _stages(answered),
        "idle_rss_bytes": one.bursts[0].before_bytes if one.bursts else None,
        "peak_rss_bytes": max((burst.peak_bytes for burst in one.bursts if burst.peak_bytes), default=None),
    }


def _sooner(one: Measured, plain: Measured) -> Iterator[float]:
    """How many times sooner the first token came, on each prompt that both answered."""
    for mine, other in zip(one.outcomes, plain.outcomes, strict=True):
        if isinstance(mine, Timed) and isinstance(other, Timed):
            yield other.ttft_ms / mine.ttft_ms


def _more(one: Measured, plain: Measured) -> Iterator[float]:
    """How many times more requests were answered in a second, burst by burst."""
    for mine, other in zip(one.bursts, plain.bursts, strict=True):
        if mine.requests_per_s and other.requests_per_s:
            yield mine.requests_per_s / other.requests_per_s


def _ratios(values: Iterable[float]) -> dict[str, float] | None:
    found = list(values)
    return ratio_spread(found) if found else None


def _spread(values: Iterable[float]) -> dict[str, float] | None:
    found = list(values)
    return spread(found) if found else None


def _token_shares(answered: Sequence[Timed]) -> dict[str, Any]:
    """Of all prompts' tokens; the three shares add up to 1. None where the server tells nothing."""
    known = [one.reuse for one in answered if one.reuse]
    num_tokens = sum(reuse.num_prompt_tokens for reuse in known)
    reused = sum(reuse.num_reused_tokens for reuse in known)
    recomputed = sum(reuse.num_recomputed_tokens for reuse in known)
    counts = {"reused": reused, "recomputed": recomputed, "computed": num_tokens - reused - recomputed}
    reports = [one.report for one in answered if one.report]
    return {
        "num_prompt_tokens": round(num_tokens / len(known)) if known else None,
        **{f"{name}_ratio": round(count / num_tokens, DIGITS) if known else None for name, count in counts.items()},
        "num_store_hits": sum(report["store_hits"] for report in reports) if reports else None,
        "num_store_misses": sum(report["store_misses"] for report in reports) if reports else None,
    }


def _stages(answered: Sequence[Timed]) -> dict[str, float] | None:
    """Medians of a request's parts: those of the blend by its own report, what was before the first token beside
    them (waiting included), and behind it."""
    split = [_split(one) for one in answered]
    names = dict.fromkeys(name for stages in split for name in stages)
    return {name: round(float(np.median([s.get(name, 0.0) for s in split])), 3) for name in names} or None


def _split(one: Timed) -> dict[str, float]:
    report = one.report or {}
    blend = {name: float(ms) for name, ms in report.items() if name.endswith("_ms") and name not in NOT_STAGES}
    stages = {name.removesuffix("_ms"): ms for name, ms in blend.items()}
    outside = max(0.0, one.ttft_ms - float(report.get(BLEND_MS, 0.0)))
    return stages | {"prefill": outside, "decode": one.e2e_ms - one.ttft_ms}
