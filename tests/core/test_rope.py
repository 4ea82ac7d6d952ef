"""A moved key equals the key computed at the new position, against the rotary embeddings of transformers."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from kvarena.core.rope import Rotation, fitting_rotations
from support.families import SCALINGS

TYPES: dict[str, dict[str, Any]] = {"default": {"rope_type": "default"}, **SCALINGS}


def rotary_embedding(scaling: dict[str, Any]) -> LlamaRotaryEmbedding:
    config = LlamaConfig(head_dim=32, max_position_embeddings=4096, rope_parameters={"rope_theta": 1e4, **scaling})
    return LlamaRotaryEmbedding(config)


def table(scaling: dict[str, Any], positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = rotary_embedding(scaling)(torch.zeros(1), torch.arange(positions)[None])
    return cos[0], sin[0]


def rotate(keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    _, rotated = apply_rotary_pos_emb(keys[None, None], keys[None, None], cos[None], sin[None])
    keys_rotated: torch.Tensor = rotated[0, 0]
    return keys_rotated


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("distance", [1, 100, 3000, -37, 30_000])
def test_moved_equals_computed_there(name: str, distance: int) -> None:
    """To within an fp32 rotation's own rounding: by the difference of angles alone it is 0.0005 off at 4,000."""
    cos, sin = table(TYPES[name], 40 + 64 + max(distance, 0))
    rotation = Rotation.from_cos_sin(cos[:, :16], sin[:, :16])
    torch.manual_seed(0)
    keys, here = torch.randn(64, 32), torch.arange(40, 104)
    there = here + distance
    moved = rotate(keys, cos[here], sin[here])[:, None]
    rotation.between(here, there).apply_(moved)
    torch.testing.assert_close(moved[:, 0], rotate(keys, cos[there], sin[there]), atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("name", TYPES)
def test_frequencies_are_the_models_own_to_the_last_bit(name: str) -> None:
    rotary = rotary_embedding(TYPES[name])
    cos, sin = table(TYPES[name], 4000)
    assert torch.equal(Rotation.from_cos_sin(cos[:, :16], sin[:, :16]).inv_freq, rotary.inv_freq)


def test_moves_there_and_back_add_up() -> None:
    cos, sin = table(TYPES["default"], 64)
    rotation = Rotation.from_cos_sin(cos[:, :16], sin[:, :16])
    keys, places = torch.randn(5, 3, 32), [torch.full((5,), at) for at in (40, 340, 220, 40)]
    moved = keys.clone()
    for here, there in pairwise(places):
        rotation.between(here, there).apply_(moved)
    torch.testing.assert_close(moved, keys, atol=2e-6, rtol=2e-6)


def test_interleaved_pairs_and_unrotated_dimensions() -> None:
    cos, sin = table(TYPES["default"], 64)
    cos, sin = cos[:, :16], sin[:, :16]
    rotation = Rotation.from_cos_sin(cos, sin, is_neox=False)
    keys = torch.randn(7, 48)
    moved = rotation.move(keys, 9)
    pairs = torch.view_as_complex(keys[:, :32].reshape(7, 16, 2))
    expected = torch.view_as_real(pairs * torch.complex(cos[9], sin[9])).flatten(1)
    torch.testing.assert_close(moved[:, :32], expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(moved[:, 32:], keys[:, 32:])


def test_half_precision_keys_are_rotated_in_single() -> None:
    cos, sin = table(TYPES["default"], 64)
    rotation = Rotation.from_cos_sin(cos[:, :16], sin[:, :16])
    keys = torch.randn(11, 32).bfloat16()
    moved = rotation.move(keys, 1234)
    assert moved.dtype == torch.bfloat16
    assert torch.equal(moved, rotation.move(keys.float(), 1234).bfloat16())


def test_frequencies_that_depend_on_the_position_are_refused() -> None:
    positions = torch.arange(256.0)[:, None]
    angles = torch.where(positions < 128, positions, 2 * positions) * torch.tensor([0.5, 0.1])
    with pytest.raises(ValueError, match="not constant"):
        Rotation.from_cos_sin(angles.cos(), angles.sin())


def test_the_rotation_of_each_layer_shows_in_one_tokens_keys() -> None:
    torch.manual_seed(0)
    slow, fast = (Rotation(base ** (-torch.arange(16) / 16)) for base in (1e6, 1e4))
    neighbours = Rotation(fast.inv_freq, is_neox=False)
    rotations = [fast, None, slow, neighbours]
    here = torch.randn(4, 2, 32)
    there = torch.stack(
        [keys if own is None else own.move(keys, 700) for own, keys in zip(rotations, here, strict=True)]
    )
    assert fitting_rotations([slow, fast, neighbours], here, there.bfloat16(), 700) == rotations
    with pytest.raises(ValueError, match="keys of layer 0 don't rotate"):
        fitting_rotations([slow, neighbours], here, there, 700)
    with pytest.raises(ValueError, match="don't rotate with their positions"):
        fitting_rotations([slow, fast], here, here, 700)


def test_keys_that_were_never_seen_fit_no_rotation() -> None:
    unseen = torch.full((1, 2, 32), float("nan"))
    with pytest.raises(ValueError, match="keys of layer 0 don't rotate"):
        fitting_rotations([Rotation(torch.ones(16))], unseen, unseen, 700)
