"""A moved key equals the key computed at the new position, against the rotary embeddings of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from kvarena.reuse.rope import Rotation, fitting_rotations

SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
}


def table(scaling: dict[str, Any], positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    config = LlamaConfig(head_dim=32, max_position_embeddings=4096, rope_parameters={"rope_theta": 1e4, **scaling})
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(positions)[None])
    return cos[0], sin[0]


def rotate(keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    _, rotated = apply_rotary_pos_emb(keys[None, None], keys[None, None], cos[None], sin[None])
    return rotated[0, 0]


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("distance", [1, 100, 3000, -37])
def test_moved_equals_computed_there(name: str, distance: int) -> None:
    cos, sin = table(SCALINGS[name], 4000)
    rotation = Rotation.from_cos_sin(cos[:, :16], sin[:, :16])
    torch.manual_seed(0)
    keys = torch.randn(64, 32)
    start = 40
    here = rotate(keys, cos[start : start + 64], sin[start : start + 64])
    there = rotate(keys, cos[start + distance : start + distance + 64], sin[start + distance : start + distance + 64])
    torch.testing.assert_close(rotation.move(here, distance), there, atol=2e-3, rtol=1e-3)


def test_moves_add_up_and_zero_is_free() -> None:
    cos, sin = table(SCALINGS["default"], 64)
    rotation = Rotation.from_cos_sin(cos[:, :16], sin[:, :16])
    keys = torch.randn(5, 3, 32)
    assert rotation.move(keys, 0) is keys
    torch.testing.assert_close(
        rotation.move(rotation.move(keys, 300), -120), rotation.move(keys, 180), atol=1e-4, rtol=0
    )


def test_interleaved_pairs_and_unrotated_dimensions() -> None:
    cos, sin = table(SCALINGS["default"], 64)
    cos, sin = cos[:, :16], sin[:, :16]
    rotation = Rotation.from_cos_sin(cos, sin, is_neox=False)
    keys = torch.randn(7, 48)
    moved = rotation.move(keys, 9)
    pairs = torch.view_as_complex(keys[:, :32].reshape(7, 16, 2))
    expected = torch.view_as_real(pairs * torch.complex(cos[9], sin[9])).flatten(1)
    torch.testing.assert_close(moved[:, :32], expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(moved[:, 32:], keys[:, 32:])


def test_half_precision_keys_are_rotated_in_single() -> None:
    cos, sin = table(SCALINGS["default"], 64)
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
    own = [fast, None, slow, neighbours]
    here = torch.randn(4, 2, 32)
    there = torch.stack([keys if turn is None else turn.move(keys, 700) for turn, keys in zip(own, here, strict=True)])
    assert fitting_rotations([slow, fast, neighbours], here, there.bfloat16(), 700) == own
    with pytest.raises(ValueError, match="keys of layer 0 don't turn"):
        fitting_rotations([slow, neighbours], here, there, 700)
    with pytest.raises(ValueError, match="don't turn with their positions"):
        fitting_rotations([slow, fast], here, here, 700)


def test_keys_that_were_never_seen_fit_no_rotation() -> None:
    unseen = torch.full((1, 2, 32), float("nan"))
    with pytest.raises(ValueError, match="keys of layer 0 don't turn"):
        fitting_rotations([Rotation(torch.ones(16))], unseen, unseen, 700)
