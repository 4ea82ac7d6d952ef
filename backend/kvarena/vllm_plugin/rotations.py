"""How a served model's keys turn with their position.

Its rotary embeddings say so, vLLM's own and those of models that come from Transformers. Which layer uses which, and
whether in pairs of neighbours or of halves, shows in the keys of one token at two places.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbeddingBase

from kvarena.reuse.rope import Rotation, fitting_rotations, inverse_frequencies

if TYPE_CHECKING:
    from kvarena.vllm_plugin.paged_model import VllmModel

_FAR_POSITION = 1000


def rotations_of(engine: VllmModel) -> list[Rotation | None]:
    """Each layer's rotation of keys; None for a layer without one, in a model that has them elsewhere.

    Runs the model, and writes into the first block of its cache, which vLLM gives to no sequence. Raises `ValueError`
    when no layer has one (positions are then in the embeddings and can't be moved), when the frequencies are not
    constant, or when keys turn in some other way.
    """
    tables = (module for module in engine.model.modules() if isinstance(module, RotaryEmbeddingBase))
    candidates = [_from_table(rotary) for rotary in tables]
    frequencies = inverse_frequencies(engine.model)
    candidates += [Rotation(inv_freq, is_neox) for inv_freq in frequencies for is_neox in (True, False)]
    if not candidates:
        raise ValueError("it has no rotary embedding with constant frequencies, so its keys can't be moved")
    distance = min(_FAR_POSITION, engine.vllm_config.model_config.max_model_len - 1)
    return fitting_rotations(candidates, engine.lone_keys(0), engine.lone_keys(distance), distance)


def _from_table(rotary: RotaryEmbeddingBase) -> Rotation:
    """The frequencies from the table that the module computes, in fp32: the one it uses is rounded to its dtype."""
    cos, sin = rotary._compute_cos_sin_cache().float().cpu().chunk(2, dim=-1)
    return Rotation.from_cos_sin(cos, sin, is_neox=rotary.is_neox_style)
