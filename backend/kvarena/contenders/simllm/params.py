"""The parameters of inter-task KV reuse, with their checks. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Literal, get_args

from kvarena.policies.params import BlendParams

Mode = Literal["aligned", "top_layer", "sandwich"]
MODES: tuple[str, ...] = get_args(Mode)
WARNINGS = {
    mode: f"mode {mode} skips layers on a hit; a model that wasn't trained for it loses its answers (docs/simllm.md)"
    for mode in MODES
    if mode != "aligned"
}
"""Of the modes that are known to lose quality."""
AUTO: Literal["auto"] = "auto"
SimilarityThreshold = float | Literal["auto"]


MAX_CACHE_BYTES = 2**30


@dataclass(frozen=True)
class AlignedParams:
    """Mode "aligned": shorter runs than `min_run_tokens` aren't reused; `blend` chooses what of the rest is recomputed.

    An earlier prompt that covers less than `min_reused_ratio` of a new one is no match: it would save little, and what
    was reused so isn't kept, where a miss leaves an exact task for those to come. Raises `ValueError` naming the value.
    """

    min_run_tokens: int = 8
    min_reused_ratio: float = 0.5
    blend: BlendParams = field(default_factory=BlendParams)

    def __post_init__(self) -> None:
        if self.min_run_tokens < 1:
            raise ValueError(f"min_run_tokens must be at least 1, not {self.min_run_tokens}")
        if not 0 <= self.min_reused_ratio <= 1:
            raise ValueError(f"min_reused_ratio must be from 0 to 1, not {self.min_reused_ratio}")


@dataclass(frozen=True)
class AutoThresholdParams:
    """A similarity threshold that keeps agreement with full prefill at or above `target_agreement`.

    `confidence` is that of the agreement's lower bound. `sample_ratio` of the requests that find a task are compared
    with full prefill; tasks below `lowest_threshold` aren't. The `num_nearest` comparisons next above a threshold reach
    the target too. `initial_threshold` holds until there are comparisons, of which the last `max_samples` count.
    Raises `ValueError` naming the value.
    """

    target_agreement: float = 0.95
    confidence: float = 0.95
    sample_ratio: float = 0.1
    initial_threshold: float = 1.0
    lowest_threshold: float = 0.5
    num_nearest: int = 10
    max_samples: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("target_agreement", "sample_ratio"):
            value = getattr(self, name)
            if not 0 < value < 1:
                raise ValueError(f"{name} must be above 0 and below 1, not {value}")
        if not 0.5 <= self.confidence < 1:
            raise ValueError(f"confidence must be at least 0.5 and below 1, not {self.confidence}")
        checked_threshold(self.initial_threshold, "initial_threshold")
        checked_threshold(self.lowest_threshold, "lowest_threshold")
        if self.num_nearest < 1:
            raise ValueError(f"num_nearest must be at least 1, not {self.num_nearest}")
        if self.max_samples < self.num_samples_needed:
            raise ValueError(
                f"max_samples must be at least {self.num_samples_needed}, for fewer can't show an agreement of "
                f"{self.target_agreement} at a confidence of {self.confidence}; not {self.max_samples}"
            )

    @property
    def z(self) -> float:
        """The quantile of the normal distribution that belongs to the confidence."""
        return NormalDist().inv_cdf(self.confidence)

    @property
    def num_samples_needed(self) -> int:
        """So many that all agree have a lower bound, `n / (n + z^2)`, that reaches the target."""
        return max(1, math.ceil(self.z**2 * self.target_agreement / (1 - self.target_agreement)))


@dataclass(frozen=True)
class SimLLMParams:
    """How tasks are kept, found and reused (Luo et al., "Sim-LLM", NeurIPS 2025).

    `mode` "top_layer": a similar task lends the KV of its last layer, which alone is run. "sandwich": as that, and the
    first and the last `num_end_layers` are run over the new prompt, as in the paper's sandwich configuration.
    "aligned", which keeps answers, lends the KV of all layers where the prompts' tokens are the same.
    `similarity_threshold` "auto" follows `auto`. Raises `ValueError` naming the value and the choices.
    """

    mode: str = "aligned"
    max_cache_size: int = 100
    similarity_threshold: SimilarityThreshold = 0.8
    num_hyperplanes: int = 16
    aligned: AlignedParams = field(default_factory=AlignedParams)
    auto: AutoThresholdParams = field(default_factory=AutoThresholdParams)
    num_end_layers: int = 2
    max_cache_bytes: int = MAX_CACHE_BYTES

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, not {self.mode!r}")
        if self.num_end_layers < 1:
            raise ValueError(f"num_end_layers must be at least 1, not {self.num_end_layers}")

    def end_layers_of(self, mode: str) -> tuple[int, int]:
        """How many of the first and of the last layers a hit runs over the new prompt, but in mode "aligned"."""
        return (self.num_end_layers, self.num_end_layers) if mode == "sandwich" else (0, 1)


def checked_threshold(threshold: float, name: str = "similarity_threshold") -> float:
    """A cosine similarity. Raises `ValueError` for anything else."""
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not -1 <= threshold <= 1:
        choices = '"auto" or a number' if name == "similarity_threshold" else "a number"
        raise ValueError(f"{name} must be {choices} from -1 to 1, not {threshold!r}")
    return float(threshold)
