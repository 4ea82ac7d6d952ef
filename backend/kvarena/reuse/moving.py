"""A chunk's KV at its place in a prompt: keys turned by the distance, heads apart."""

from __future__ import annotations

import torch

from kvarena.reuse.plan import Span
from kvarena.reuse.prefilled import PrefilledModel


def moved_kv(model: PrefilledModel, span: Span, piece: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys, moved, and values `(L, T, H_kv, D)` of a span's KV `(2, L, T, H_kv * D)` as stored."""
    keys, values = heads_of(model, piece)
    return _moved(model, span, keys), values


def heads_of(model: PrefilledModel, flat: torch.Tensor) -> torch.Tensor:
    """`(..., H_kv * D)` as `(..., H_kv, D)`, on the model's device."""
    return flat.to(model.device, non_blocking=True).view(*flat.shape[:-1], -1, model.head_size)


def _moved(model: PrefilledModel, span: Span, keys: torch.Tensor) -> torch.Tensor:
    """Layers with the same rotation go together."""
    rotations = dict.fromkeys(model.rotations)
    if len(rotations) == 1 and (rotation := next(iter(rotations))):
        return rotation.move(keys, span.start - span.offset)
    moved = keys.clone()
    for rotation in rotations:
        layers = [layer for layer, own in enumerate(model.rotations) if own is rotation]
        if rotation:
            moved[layers] = rotation.move(keys[layers], span.start - span.offset)
    return moved
