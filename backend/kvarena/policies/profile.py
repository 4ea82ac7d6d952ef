"""The profile of a model: `kvarena.json` in its folder, with the settings of the blend that suit it.

docs/models.md describes it. Every contender that blends begins with it, whatever the engine. Imports no torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kvarena.policies.params import PARAMETERS, BlendParams

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
