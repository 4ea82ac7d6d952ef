"""What every engine checks of a model before it is blended. A `ValueError` has the reason."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

_LENGTH_DEPENDENT = ("dynamic", "longrope")


def refuse_length_dependent(config: Any, module: torch.nn.Module) -> None:
    """Raise `ValueError` where rotary frequencies depend on the length of the text: they have no constant angles.

    `config` is the Hugging Face configuration of the text model, `module` the model. Either may name the kinds of
    rotary embedding, for all layers or by kind of layer.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    by_layers = [value for value in parameters.values() if isinstance(value, dict)] or [parameters]
    kinds = {str(own.get("rope_type", "default")) for own in by_layers}
    for own in (getattr(part, "rope_type", "default") for part in module.modules()):
        kinds |= set(map(str, own.values())) if isinstance(own, dict) else {str(own)}
    if found := sorted(kinds & set(_LENGTH_DEPENDENT)):
        raise ValueError(f"its rotary frequencies depend on the length of the text ({found[0]})")


def refuse_short_window(window: str, num_tokens: int | None, max_model_len: int) -> None:
    """Raise `ValueError` where layers attend to fewer tokens than a context may have. `window`: what they attend to."""
    if num_tokens and num_tokens < max_model_len:
        raise ValueError(f"its {window} of {num_tokens} tokens is shorter than the context of {max_model_len} tokens")


def decoder_layers(model: torch.nn.Module, attentions: Sequence[torch.nn.Module]) -> list[torch.nn.Module]:
    """For each attention layer, the element of the model's list of layers that it is in.

    Raises `ValueError` for a model that keeps them in no list.
    """
    names = {module: name for name, module in model.named_modules()}
    return [_decoder_layer(model, names[attention].split(".")) for attention in attentions]


def _decoder_layer(model: torch.nn.Module, path: list[str]) -> torch.nn.Module:
    for depth in range(len(path) - 1, 0, -1):
        if isinstance(model.get_submodule(".".join(path[:depth])), torch.nn.ModuleList):
            return model.get_submodule(".".join(path[: depth + 1]))
    raise ValueError("its layers are in no list")
