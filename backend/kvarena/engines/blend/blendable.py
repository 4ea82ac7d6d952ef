"""Which Hugging Face models can be blended, and how their keys turn.

As in vLLM, every layer has to attend to the whole text, and keys have to carry their position as a rotation with
constant frequencies. What a model says of itself is tried on a token: its keys far on in a text must be its keys at
the beginning, moved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from kvarena.engines import attention
from kvarena.engines.hf_model import HFModel, UnsupportedModel
from kvarena.reuse.rope import Rotation

_TABLE_POSITIONS = 4096
_FAR_POSITION = 1000
_TOLERANCE = 0.05
_LENGTH_DEPENDENT = ("dynamic", "longrope")


class BlendableModel:
    """A model, its decoder layers, first to last, and their rotations.

    Raises `UnsupportedModel` with the reason for one whose KV can't be blended.
    """

    def __init__(self, model: HFModel) -> None:
        self.model = model
        try:
            _refuse_attention(model)
            self.layers = _decoder_layers(model.module, model.kv_shape.num_layers)
            self.rotations: Sequence[Rotation | None] = model.run(_rotations, model)
        except ValueError as error:
            raise UnsupportedModel(f"{type(model.module).__name__} can't be blended: {error}") from error


def _refuse_attention(model: HFModel) -> None:
    config = model.module.config.get_text_config()
    implementation = config._attn_implementation
    if implementation not in ("sdpa", attention.NAME):
        raise ValueError(f"its attention is {implementation!r}; the blend's masks are for sdpa and {attention.NAME}")
    kinds = set(getattr(config, "layer_types", None) or ["full_attention", "sliding_attention"])
    if unknown := kinds - {"full_attention", "sliding_attention"}:
        raise ValueError(f"it has layers of {', '.join(sorted(unknown))}")
    window = getattr(config, "sliding_window", None)
    if window and "sliding_attention" in kinds and window < model.max_model_len:
        raise ValueError(
            f"its sliding window of {window} tokens is shorter than the context of {model.max_model_len} tokens"
        )


def _decoder_layers(module: torch.nn.Module, num_layers: int) -> list[torch.nn.Module]:
    lists = (found for found in module.modules() if isinstance(found, torch.nn.ModuleList))
    layers = next((found for found in lists if len(found) == num_layers), None)
    if layers is None:
        raise ValueError(f"it has no list of {num_layers} layers, one for each layer of its KV")
    return list(layers)


def _rotations(model: HFModel) -> list[Rotation | None]:
    """Each layer's rotation; None for a layer whose keys don't turn."""
    halves = _rotation(_rotary_module(model.module), model)
    candidates = (halves, replace(halves, is_neox=False), None)
    distance = min(_FAR_POSITION, model.max_model_len - 1)
    keys = zip(_keys_at(model, 0), _keys_at(model, distance), strict=True)
    return [_fitting(candidates, layer, here, there, distance) for layer, (here, there) in enumerate(keys)]


def _rotary_module(module: torch.nn.Module) -> Any:
    rotaries = [m for m in module.modules() if any("inv_freq" in name for name, _ in m.named_buffers(recurse=False))]
    if not rotaries:
        raise ValueError("without rotary embeddings its keys can't be moved")
    kinds = {str(getattr(rotary, "rope_type", "default")) for rotary in rotaries}
    if len(rotaries) > 1 or not hasattr(rotaries[0], "inv_freq"):
        raise ValueError(f"it has several rotary embeddings: {', '.join(sorted(kinds))}")
    if kinds & set(_LENGTH_DEPENDENT):
        raise ValueError(f"its rotary frequencies depend on the length of the text ({kinds.pop()})")
    return rotaries[0]


def _rotation(rotary: Any, model: HFModel) -> Rotation:
    """From the module's own table, in fp32, in which every frequency stands twice: by halves or side by side.

    Which dimensions make a pair doesn't follow from that; it shows in the keys.
    """
    positions = torch.arange(max(2, min(_TABLE_POSITIONS, model.max_model_len)), device=model.kv_shape.device)
    table = rotary(torch.zeros(1, device=positions.device), positions[None])
    cos, sin = (part[0].float().cpu() for part in table)  # (positions, D_rot)
    half = cos.shape[1] // 2
    each_once = slice(half) if torch.equal(cos[:, :half], cos[:, half:]) else slice(0, None, 2)
    return Rotation.from_cos_sin(cos[:, each_once], sin[:, each_once])


def _keys_at(model: HFModel, position: int) -> torch.Tensor:
    """The keys `(L, H_kv, 1, D)` of a token by itself: it attends to nothing else, so only its position shows."""
    kv = model.new_kv(1)
    position_ids = torch.tensor([[position]], device=model.kv_shape.device)
    model.forward([model.vocab_size // 2], position_ids=position_ids, past_key_values=kv, use_cache=True)
    return kv.filled(0, 1)[:, 0].float()


def _fitting(
    candidates: Sequence[Rotation | None], layer: int, here: torch.Tensor, there: torch.Tensor, distance: int
) -> Rotation | None:
    for rotation in candidates:
        moved = rotation.move(here, distance) if rotation else here
        if (moved - there).norm() <= _TOLERANCE * there.norm():
            return rotation
    raise ValueError(f"the keys of layer {layer} don't turn as its rotary embedding says")
