"""What is compared: a contender with one choice of policy, ratio and check layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvarena.reuse.params import WITH_CHECK_LAYER, BlendParams

OPTIONS = ("deviation", "num_filters", "head_tokens")
_WITHOUT_RATIO = ("none", "all")


@dataclass(frozen=True)
class Setup:
    """What isn't chosen is None: contenders that don't blend have nothing to choose, `none` and `all` no ratio."""

    contender: str
    policy: str | None = None
    ratio: float | None = None
    check_layer: int | None = None
    deviation: str | None = None
    num_filters: int | None = None
    head_tokens: int | None = None

    @property
    def label(self) -> str:
        """Such as `blend kv_deviation 15 % @2 num_filters=2`, where 2 is the check layer."""
        parts = [self.contender, self.policy, None if self.ratio is None else f"{100 * self.ratio:g} %"]
        parts.append(None if self.check_layer is None else f"@{self.check_layer}")
        parts += [f"{name}={value}" for name, value in self.options.items()]
        return " ".join(part for part in parts if part)

    @property
    def options(self) -> dict[str, Any]:
        """The parameters that only some policies have, where they were chosen."""
        return {name: value for name in OPTIONS if (value := getattr(self, name)) is not None}

    @property
    def choices(self) -> dict[str, Any]:
        """What was chosen, by its name in `kv_transfer_params.kvarena`."""
        chosen = {"policy": self.policy, "ratio": self.ratio, "check_layer": self.check_layer}
        return {name: value for name, value in chosen.items() if value is not None} | self.options

    @property
    def recomputes_all(self) -> bool:
        return self.policy is not None and BlendParams(**self.choices).recomputes_all

    @property
    def work(self) -> Setup:
        """What is really done: with nothing or all to recompute, policies and check layers don't differ."""
        if self.policy is None:
            return self
        params = BlendParams(**self.choices)
        if params.recomputes_all or params.recomputes_none:
            return Setup(self.contender, "all" if params.recomputes_all else "none")
        return self

    def to_json(self) -> dict[str, Any]:
        named = {name: getattr(self, name) for name in ("contender", "policy", "ratio", "check_layer")}
        return named | self.options


def blend_setups(
    contender: str, policies: Sequence[str], ratios: Sequence[float], check_layers: Sequence[int]
) -> list[Setup]:
    """Every policy at every ratio, and the check layers for those that have one; no layers: the server's own.

    Raises `ValueError` naming a value that can't be chosen, and the choices.
    """
    setups = []
    for policy in policies:
        layers: Sequence[int | None] = check_layers if policy in WITH_CHECK_LAYER and check_layers else [None]
        for ratio in [None] if policy in _WITHOUT_RATIO else ratios:
            setups += [Setup(contender, policy, ratio, layer) for layer in layers]
    for setup in setups:
        BlendParams(**setup.choices)
    return list(dict.fromkeys(setups))


def find_reference(setups: Sequence[Setup]) -> Setup | None:
    """The one that stands for full prefill: a contender that doesn't approximate, or else a blend of all tokens."""
    exact = [setup for setup in setups if setup.policy is None]
    return next(iter([*exact, *(setup for setup in setups if setup.recomputes_all)]), None)
