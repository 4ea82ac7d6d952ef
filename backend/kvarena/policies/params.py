"""What a request may choose about the blend: a policy and its parameters, with their checks. Imports no torch.

The fields of `BlendParams` are those that the policies declare (`kvarena.policies.registry`). A model's profile,
`kvarena.json` in its folder (docs/models.md), has the settings that suit it: every contender that blends begins with
them, whatever the engine.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvarena.core.policy import SelectionPolicy
from kvarena.policies.registry import (
    DEFAULT_POLICY,
    Parameter,
    Value,
    all_parameters,
    parameters_of,
    registered_policies,
    summary_of,
)

REGISTRY = registered_policies()
POLICIES = tuple(REGISTRY)
POLICY = Parameter("policy", DEFAULT_POLICY, "Which reused tokens are recomputed.", choices=POLICIES)
PARAMETERS: Mapping[str, Parameter] = {own.name: own for own in (POLICY, *all_parameters())}
"""The policy itself, and what all policies together may be told."""
OPTIONS: Mapping[str, tuple[str, ...]] = {
    name: tuple(own.name for own in parameters_of(cls)) for name, cls in REGISTRY.items()
}
"""The parameters of each policy by their names."""

if TYPE_CHECKING:
    _declared: Any = None

    @dataclass(frozen=True)
    class _Fields:
        policy: str = _declared
        ratio: float = _declared
        check_layer: int = _declared

else:
    _Fields = dataclasses.make_dataclass(
        "_Fields", [(own.name, own.type, own.default) for own in PARAMETERS.values()], frozen=True
    )


@dataclass(frozen=True)
class BlendParams(_Fields):
    """A policy and the parameters of all of them, flat; a policy reads its own.

    Raises `ValueError` naming the value and the choices.
    """

    if TYPE_CHECKING:

        def __init__(self, policy: str = ..., ratio: float = ..., check_layer: int = ..., **others: Value) -> None: ...

    def __post_init__(self) -> None:
        for name, own in PARAMETERS.items():
            own.check(getattr(self, name))

    @property
    def recomputes_all(self) -> bool:
        return make_policy(self).recomputes_all

    @property
    def recomputes_none(self) -> bool:
        return make_policy(self).recomputes_none

    @property
    def goes_by_ratio(self) -> bool:
        """Whether the ratio makes a difference."""
        return make_policy(self).goes_by_ratio

    def check_for(self, num_layers: int) -> None:
        """Raises `ValueError` for a check layer that the model doesn't have, where the policy has one."""
        if "check_layer" in OPTIONS[self.policy] and self.check_layer >= num_layers:
            raise ValueError(f"check_layer must be from 0 to {num_layers - 1}, not {self.check_layer}")


def make_policy(params: BlendParams) -> SelectionPolicy:
    own: dict[str, Any] = {name: getattr(params, name) for name in OPTIONS[params.policy]}
    return REGISTRY[params.policy](**own)


def describe_parameters() -> dict[str, dict[str, Any]]:
    """For the API: each parameter's type, bounds or choices, default and help, and the policies that have it; for the
    policy itself also a line on each of its choices.
    """
    lines = {name: summary_of(cls) for name, cls in REGISTRY.items()}
    return {
        name: {
            **own.describe(),
            **({"explanations": lines} if own is POLICY else {}),
            "policies": [policy for policy in POLICIES if own is POLICY or name in OPTIONS[policy]],
        }
        for name, own in PARAMETERS.items()
    }


MAX_TTFT_MS = 86_400_000
"""A day."""


def check_max_ttft_ms(max_ttft_ms: object, params: BlendParams) -> float:
    """A time to first token that chooses the ratio. Raises `ValueError` for a bad one, or a policy without a ratio."""
    if isinstance(max_ttft_ms, bool) or not isinstance(max_ttft_ms, int | float) or not 0 < max_ttft_ms <= MAX_TTFT_MS:
        raise ValueError(f"max_ttft_ms must be a number above 0 and at most {MAX_TTFT_MS}, not {max_ttft_ms!r:.50}")
    if not params.goes_by_ratio:
        raise ValueError(f"max_ttft_ms chooses the ratio, which {params.policy} doesn't go by here")
    return float(max_ttft_ms)


MODEL_PROFILE_NAME = "kvarena.json"
BLEND_FIELDS = ("separator", "sink_tokens", "seams", *PARAMETERS)
PROFILE_FIELDS = ("data", *BLEND_FIELDS)
"""`data` is the folder of documents that goes with a model, relative to the model's own."""


def read_model_profile(model: str) -> dict[str, Any]:
    """The settings in `MODEL_PROFILE_NAME` of a local model folder; empty where there is none.

    Raises `ValueError` for a file that is not a JSON object of `PROFILE_FIELDS`.
    """
    path = Path(model) / MODEL_PROFILE_NAME
    if not path.is_file():
        return {}
    try:
        profile = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(profile, dict) or (unknown := set(profile) - set(PROFILE_FIELDS)):
        names = ", ".join(PROFILE_FIELDS)
        raise ValueError(f"{path} must be a JSON object with keys among {names}, not {unknown or profile!r}")
    return profile


def read_blend_profile(model: str) -> dict[str, Any]:
    """The part of `read_model_profile` that the blend takes: how chunks are made, and fields of `BlendParams`."""
    return {key: value for key, value in read_model_profile(model).items() if key in BLEND_FIELDS}


def profiled_params(model: str, **given: Any) -> BlendParams:
    """What is given, else what the model's profile says, else the defaults. Raises `ValueError` as `BlendParams`."""
    profile = {key: value for key, value in read_model_profile(model).items() if key in PARAMETERS}
    return BlendParams(**(profile | given))
