"""How similar a task has to be to lend its KV: a number, or one that follows from measured agreement.

`AutoThreshold` compares some requests with full prefill: on a sample of those that found a task, hits and near misses
alike, the first token over the reused KV is set beside the first token of full prefill, which answers such a request.
The threshold is the lowest similarity for which, at a confidence, reuse at or above it agrees often enough: the lower
bound of E. B. Wilson's score interval ("Probable inference, the law of succession, and statistical inference", JASA
22, 1927), one-sided; and the samples nearest above it have to agree as often. Since near misses are compared without
their reuse being used, it can go down as well as up.
"""

from __future__ import annotations

import math
import random
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from kvarena.contenders.simllm.params import AUTO, AutoThresholdParams, SimilarityThreshold, checked_threshold

Counts = int | npt.NDArray[np.int64]

_DECIMALS = 6


@dataclass(frozen=True)
class AgreementSample:
    """Whether reuse of a task of this similarity gave the first token of full prefill."""

    similarity: float
    agrees: bool


class Threshold(Protocol):
    @property
    def value(self) -> float:
        """Tasks at least this similar are reused; infinite when none is."""
        ...

    @property
    def lowest(self) -> float:
        """Tasks at least this similar are looked for."""
        ...

    def draws_check(self) -> bool:
        """Whether to compare the next request with full prefill, should it find a task."""
        ...

    def record(self, sample: AgreementSample) -> None: ...

    def reset(self) -> None: ...

    def get_statistics(self) -> dict[str, Any] | None: ...


@dataclass(frozen=True)
class FixedThreshold:
    value: float

    @property
    def lowest(self) -> float:
        return self.value

    def draws_check(self) -> bool:
        return False

    def record(self, sample: AgreementSample) -> None:
        """What was drawn before the threshold was fixed changes nothing."""

    def reset(self) -> None: ...

    def get_statistics(self) -> None:
        return None


class AutoThreshold:
    """Thread-safe; the same samples in the same order, with the same seed, give the same threshold.

    Until there are as many samples as an agreement without exception needs, every request is compared.
    """

    def __init__(self, params: AutoThresholdParams) -> None:
        self.params = params
        self._lock = threading.Lock()
        self.reset()

    @property
    def value(self) -> float:
        return self._value

    @property
    def lowest(self) -> float:
        return self.params.lowest_threshold

    def draws_check(self) -> bool:
        with self._lock:
            if len(self._samples) < self.params.num_samples_needed:
                return True
            return self._random.random() < self.params.sample_ratio

    def record(self, sample: AgreementSample) -> None:
        with self._lock:
            self._samples.append(replace(sample, similarity=round(sample.similarity, _DECIMALS)))
            self._value = chosen_threshold(self._samples, self.params)

    def reset(self) -> None:
        with self._lock:
            self._samples: deque[AgreementSample] = deque(maxlen=self.params.max_samples)
            self._random = random.Random(self.params.seed)
            self._value = self.params.initial_threshold

    def get_statistics(self) -> dict[str, Any]:
        """What was chosen and why: `agreement` is measured at or above the threshold, `agreement_bound` is its lower
        bound; both are None without samples there. When nothing is reused the threshold is None, and they are those of
        all samples.
        """
        with self._lock:
            lowest = finite_or_none(self._value)
            above = [sample.agrees for sample in self._samples if lowest is None or sample.similarity >= lowest]
            bound = float(wilson_lower_bound(sum(above), len(above), self.params.z)) if above else None
            return {
                "threshold": lowest,
                "target_agreement": self.params.target_agreement,
                "confidence": self.params.confidence,
                "num_samples": len(self._samples),
                "num_samples_above": len(above),
                "agreement": sum(above) / len(above) if above else None,
                "agreement_bound": bound,
            }


def threshold_of(setting: SimilarityThreshold, auto: AutoThresholdParams) -> Threshold:
    """Raises `ValueError` for what is neither a cosine similarity nor "auto"."""
    return AutoThreshold(auto) if setting == AUTO else FixedThreshold(checked_threshold(setting))


def chosen_threshold(samples: Sequence[AgreementSample], params: AutoThresholdParams) -> float:
    """The lowest similarity of a sample that agrees, at or above which the bound of agreement reaches the target, as
    does the agreement of the `num_nearest` samples next above it: many that agree don't hide a few that don't.

    Without one it is the initial threshold; infinite where even the most similar samples fall short of the target.
    """
    if not samples:
        return params.initial_threshold
    ordered = sorted(samples, key=lambda sample: sample.similarity, reverse=True)
    similarities = np.array([sample.similarity for sample in ordered])
    agrees = np.array([sample.agrees for sample in ordered])
    num_above = np.arange(1, len(ordered) + 1)
    num_agreeing = agrees.cumsum()
    num_nearest = np.minimum(num_above, params.num_nearest)
    agreeing_further_up = np.append(np.zeros(params.num_nearest, int), num_agreeing)[: len(ordered)]
    bounds = wilson_lower_bound(num_agreeing, num_above, params.z)
    agreement_nearby = (num_agreeing - agreeing_further_up) / num_nearest
    ends_a_tie = np.append(similarities[1:] < similarities[:-1], True)
    reaching = similarities[ends_a_tie & (np.minimum(bounds, agreement_nearby) >= params.target_agreement)]
    if len(reaching):
        return float(similarities[agrees & (similarities >= reaching[-1])][-1])
    falls_short = agrees[: params.num_nearest].mean() < params.target_agreement
    return math.inf if falls_short else params.initial_threshold


def wilson_lower_bound(num_agreeing: Counts, num_samples: Counts, z: float) -> npt.NDArray[np.float64]:
    """The lower end of Wilson's score interval for shares of `num_samples` from 1; `z` is the normal quantile."""
    share = np.asarray(num_agreeing) / num_samples
    spread = z * np.sqrt(share * (1 - share) / num_samples + z**2 / (4 * np.square(num_samples)))
    bound: npt.NDArray[np.float64] = (share + z**2 / (2 * num_samples) - spread) / (1 + z**2 / num_samples)
    return bound


def finite_or_none(threshold: float) -> float | None:
    return threshold if math.isfinite(threshold) else None
