"""What a request may choose about the blend: plain values with their checks. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

POLICIES = ("kv_deviation", "chunk_head", "query_attention", "random", "none", "all")
DEVIATIONS = ("keys", "values")
WITH_CHECK_LAYER = ("kv_deviation", "query_attention")
"""The policies that look at layers; the others choose before the first."""
OPTIONS = {
    "kv_deviation": ("deviation", "num_filters", "run_tokens"),
    "chunk_head": ("head_tokens",),
    "query_attention": ("run_tokens",),
}
"""What some policies have beside ratio and check layer."""


@dataclass(frozen=True)
class BlendParams:
    """Selection policy, share of reused tokens that it recomputes, and the layer (from 0) it looks at.

    `deviation` and `num_filters` are those of `kv_deviation`, `head_tokens` that of `chunk_head`: so many tokens of
    each chunk in place of a share; 0 means the share. `run_tokens` is of both that score tokens: neighbours that are
    chosen together. `kvarena.policies.registry` says more of each.
    Raises `ValueError` naming the value and the choices.
    """

    policy: str = "kv_deviation"
    ratio: float = 0.15
    check_layer: int = 1
    deviation: str = "keys"
    num_filters: int = 1
    head_tokens: int = 0
    run_tokens: int = 1

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ValueError(f"policy must be one of {', '.join(POLICIES)}, not {self.policy!r}")
        if isinstance(self.ratio, bool) or not isinstance(self.ratio, int | float) or not 0 <= self.ratio <= 1:
            raise ValueError(f"ratio must be a number from 0 to 1, not {self.ratio!r}")
        if self.deviation not in DEVIATIONS:
            raise ValueError(f"deviation must be one of {', '.join(DEVIATIONS)}, not {self.deviation!r}")
        _check_count("check_layer", self.check_layer, 0, "a layer number from 0")
        _check_count("num_filters", self.num_filters, 1, "a number of layers from 1")
        _check_count("head_tokens", self.head_tokens, 0, "a number of tokens from 0")
        _check_count("run_tokens", self.run_tokens, 1, "a number of tokens from 1")

    @property
    def recomputes_all(self) -> bool:
        return self.policy == "all" or (self.goes_by_ratio and self.ratio == 1)

    @property
    def recomputes_none(self) -> bool:
        return self.policy == "none" or (self.goes_by_ratio and self.ratio == 0)

    @property
    def goes_by_ratio(self) -> bool:
        """Whether the ratio makes a difference."""
        return self.policy not in ("none", "all") and not (self.policy == "chunk_head" and self.head_tokens)

    def check_for(self, num_layers: int) -> None:
        """Raises `ValueError` for a check layer that the model doesn't have, where the policy has one."""
        if self.policy in WITH_CHECK_LAYER and self.check_layer >= num_layers:
            raise ValueError(f"check_layer must be from 0 to {num_layers - 1}, not {self.check_layer}")


def check_max_ttft_ms(max_ttft_ms: object, params: BlendParams) -> float:
    """A time to first token that chooses the ratio. Raises `ValueError` for what isn't one, or chooses nothing."""
    if isinstance(max_ttft_ms, bool) or not isinstance(max_ttft_ms, int | float) or not 0 < max_ttft_ms < math.inf:
        raise ValueError(f"max_ttft_ms must be a number above 0, not {max_ttft_ms!r}")
    if not params.goes_by_ratio:
        raise ValueError(f"max_ttft_ms chooses the ratio, which {params.policy} doesn't go by here")
    return float(max_ttft_ms)


def _check_count(name: str, value: object, least: int, what: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be {what}, not {value!r}")
