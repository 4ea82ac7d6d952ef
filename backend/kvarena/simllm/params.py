"""The parameters of inter-task KV reuse, with their checks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from kvarena.reuse.params import BlendParams

Mode = Literal["top_layer", "aligned"]
MODES: tuple[str, ...] = get_args(Mode)


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
class SimLLMParams:
    """How tasks are kept, found and reused (Luo et al., "Sim-LLM", NeurIPS 2025).

    `mode` "top_layer" is the paper's: a similar task lends the KV of its last layer. "aligned" goes further: it lends
    the KV of all layers where the prompts' tokens are the same. Raises `ValueError` naming the value and the choices.
    """

    mode: str = "top_layer"
    max_cache_size: int = 100
    similarity_threshold: float = 0.8
    num_hyperplanes: int = 16
    aligned: AlignedParams = field(default_factory=AlignedParams)

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, not {self.mode!r}")


def checked_threshold(threshold: float) -> float:
    """A cosine similarity. Raises `ValueError` for anything else."""
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not -1 <= threshold <= 1:
        raise ValueError(f"similarity_threshold must be a number from -1 to 1, not {threshold!r}")
    return float(threshold)
