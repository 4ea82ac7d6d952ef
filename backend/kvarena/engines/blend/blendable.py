"""Which Hugging Face models can be blended, and how their keys turn.

As in vLLM, every layer has to attend to the whole text, and keys have to carry their position as a rotation with
constant frequencies. What a model says of itself is tried on a token: its keys far on in a text must be its keys at
the beginning, moved.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvarena.engines import attention
from kvarena.engines.hf_model import HFModel, UnsupportedModel
from kvarena.reuse.rope import Rotation, fitting_rotations, inverse_frequencies, refuse_length_dependent

_FAR_POSITION = 1000


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

    @property
    def has_several_rotations(self) -> bool:
        """Whether layers turn keys differently, so that the model hands them different angles."""
        return len(set(self.rotations) - {None}) > 1


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
    """Each layer's rotation; None for a layer whose keys don't turn.

    Which of them a layer uses, and whether dimensions pair by halves or side by side, shows in its keys.
    """
    refuse_length_dependent(_rope_types(model.module))
    frequencies = inverse_frequencies(model.module)
    if not frequencies:
        raise ValueError("without rotary embeddings its keys can't be moved")
    candidates = [Rotation(inv_freq, is_neox) for inv_freq in frequencies for is_neox in (True, False)]
    distance = min(_FAR_POSITION, model.max_model_len - 1)
    return fitting_rotations(candidates, _keys_at(model, 0), _keys_at(model, distance), distance)


def _rope_types(module: torch.nn.Module) -> set[str]:
    """Of all rotary embeddings; one that serves several kinds of layers has a type for each."""
    found = [getattr(m, "rope_type", "default") for m in module.modules()]
    return {str(kind) for own in found for kind in (own.values() if isinstance(own, dict) else [own])}


def _keys_at(model: HFModel, position: int) -> torch.Tensor:
    """The keys `(L, H_kv, D)` of a token by itself: it attends to nothing else, so only its position shows."""
    kv = model.new_kv(1)
    position_ids = torch.tensor([[position]], device=model.kv_shape.device)
    model.forward([model.vocab_size // 2], position_ids=position_ids, past_key_values=kv, use_cache=True)
    return kv.filled(0, 1)[:, 0, :, 0].float()
