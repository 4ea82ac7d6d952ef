"""What a request may choose about the blend: plain values with their checks, free of tensors."""

from __future__ import annotations

from dataclasses import dataclass

POLICIES = ("kv_deviation", "random", "none", "all")


@dataclass(frozen=True)
class BlendParams:
    """Selection policy, share of reused tokens that it recomputes, and the layer (from 0) it looks at.

    Raises `ValueError` naming the value and the choices.
    """

    policy: str = "kv_deviation"
    ratio: float = 0.15
    check_layer: int = 1

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ValueError(f"policy must be one of {', '.join(POLICIES)}, not {self.policy!r}")
        if isinstance(self.ratio, bool) or not isinstance(self.ratio, int | float) or not 0 <= self.ratio <= 1:
            raise ValueError(f"ratio must be a number from 0 to 1, not {self.ratio!r}")
        if isinstance(self.check_layer, bool) or not isinstance(self.check_layer, int) or self.check_layer < 0:
            raise ValueError(f"check_layer must be a layer number from 0, not {self.check_layer!r}")

    @property
    def recomputes_all(self) -> bool:
        return self.policy == "all" or (self.policy != "none" and self.ratio == 1)

    @property
    def recomputes_none(self) -> bool:
        return self.policy == "none" or (self.policy != "all" and self.ratio == 0)
