"""Means with 95 % bootstrap intervals (percentile method) over questions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

NUM_RESAMPLES = 2_000
DIGITS = 4


def mean_interval(values: Sequence[float], seed: int = 0) -> dict[str, float] | None:
    """None without values. Values that are all equal, as when every answer is right, have an interval of no width."""
    from scipy.stats import bootstrap

    if not values:
        return None
    mean = low = high = float(np.mean(values))
    if len(set(values)) > 1:
        resampled = bootstrap(
            (np.asarray(values, dtype=float),),
            np.mean,
            n_resamples=NUM_RESAMPLES,
            method="percentile",
            rng=np.random.default_rng(seed),
        )
        low, high = map(float, resampled.confidence_interval)
    return {"mean": round(mean, DIGITS), "low": round(low, DIGITS), "high": round(high, DIGITS)}
