"""Moving keys: rotary embeddings add up, so a key rotated for position p moves to q by one more rotation by q - p.

Works for every scaling with fixed frequencies (default, linear, llama3, YaRN). Magnitude factors (YaRN's `mscale`)
never enter, since the stored key has its own already. Frequencies that depend on the length of the text have no
constant angle: they are refused. A model rounds the angle of each position to fp32, which at
position 10,000 is off by up to 0.0005, so a key is rotated by the difference of the two rounded angles and lies
where the model itself would have put it. RoPE: Su et al., arXiv 2104.09864; YaRN: Peng et al., arXiv 2309.00071.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

_FAR_POSITION = 1000
_TOLERANCE = 0.05
_LENGTH_DEPENDENT = ("dynamic", "longrope")


@dataclass(frozen=True, eq=False)
class Rotation:
    """A model's rotation of keys: one frequency in radians per position for every rotated pair.

    `inv_freq` is fp32 `(D_rot / 2,)`; `is_neox` says whether pair i is (i, i + D_rot/2), as in Llama, or (2i, 2i + 1),
    as in GPT-J. Dimensions from `D_rot` on are not rotated.
    """

    inv_freq: torch.Tensor
    is_neox: bool = True
    _copies: dict[torch.device, torch.Tensor] = field(default_factory=dict, init=False, repr=False)
    """Of the frequencies, on each device where keys were rotated."""

    @classmethod
    def from_cos_sin(cls, cos: torch.Tensor, sin: torch.Tensor, *, is_neox: bool = True) -> Rotation:
        """Read the frequencies off a table of cosines and sines, fp32 `(positions, D_rot / 2)`, at any magnitude.

        Raises `ValueError` when a position's angle is not its number times a constant.
        """
        rows = min(len(cos), 4096)
        inv_freq = torch.atan2(sin[1].double(), cos[1].double()).float()
        expected = torch.arange(rows, dtype=torch.float64)[:, None] * inv_freq
        magnitude = torch.hypot(cos[:rows].double(), sin[:rows].double())
        error = torch.maximum(
            (cos[:rows] - magnitude * expected.cos()).abs().max(),
            (sin[:rows] - magnitude * expected.sin()).abs().max(),
        )
        if not error < 2e-3:
            raise ValueError(
                f"rotary frequencies are not constant over positions (error {error:.1e}): keys can't be moved"
            )
        return cls(_as_in_table(inv_freq, cos[:rows] / magnitude, sin[:rows] / magnitude), is_neox)

    def between(self, here: torch.Tensor, there: torch.Tensor) -> Rerotation:
        """The rotation of keys `(T, H, D)` from positions `here` to positions `there`, both `(T,)`."""
        angles = self._angles(there) - self._angles(here)
        return Rerotation(angles.cos().float(), angles.sin().float(), self.is_neox)

    def move(self, keys: torch.Tensor, distance: int) -> torch.Tensor:
        """Keys `(..., D)` of position 0 as they are at `distance`, in their dtype: a new tensor."""
        angles = self._angles(torch.tensor([distance], device=keys.device))[0, 0]
        moved = keys.clone()
        Rerotation(angles.cos().float(), angles.sin().float(), self.is_neox).apply_(moved)
        return moved

    def _angles(self, positions: torch.Tensor) -> torch.Tensor:
        """Of each position, rounded as the model does: `(T, 1, D_rot / 2)`; in fp64, where differences are exact."""
        if positions.device not in self._copies:
            self._copies[positions.device] = self.inv_freq.to(positions.device)
        return (positions[:, None, None].float() * self._copies[positions.device]).double()


@dataclass(frozen=True, eq=False)
class Rerotation:
    """A rotation by fixed angles: `cos` and `sin` in fp32, `(..., D_rot / 2)`, broadcast over the keys' dimensions."""

    cos: torch.Tensor
    sin: torch.Tensor
    is_neox: bool

    def apply_(self, keys: torch.Tensor, scratch: Scratch | None = None) -> None:
        """Rotates keys `(..., D)` in place, in their dtype; the sums are made in fp32."""
        scratch = scratch or Scratch()
        rotated = keys[..., : 2 * self.cos.shape[-1]]
        x = scratch.empty("x", rotated.shape, torch.float32, keys.device).copy_(rotated)
        turned = torch.mul(x, self._both_cos, out=scratch.empty("turned", x.shape, torch.float32, keys.device))
        for sums, other, sin in zip(
            self._halves(turned), reversed(self._halves(x)), (-self.sin, self.sin), strict=True
        ):
            sums.addcmul_(other, sin)
        rotated.copy_(turned)

    @cached_property
    def _both_cos(self) -> torch.Tensor:
        """For both of each pair, `(..., D_rot)`."""
        return torch.stack((self.cos, self.cos), dim=self._pair_dim).flatten(-2)

    def _halves(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The first of each pair, and the second."""
        halves: tuple[torch.Tensor, ...] = x.unflatten(-1, (2, -1) if self.is_neox else (-1, 2)).unbind(self._pair_dim)
        return halves

    @property
    def _pair_dim(self) -> int:
        return -2 if self.is_neox else -1


class Scratch:
    """Memory for short-lived tensors, by name, so that it isn't asked of the system again and again."""

    def __init__(self) -> None:
        self._held: dict[str, torch.Tensor] = {}

    def empty(self, name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """In the memory of the last one of that name, if it has room."""
        held, size = self._held.get(name), math.prod(shape)
        if held is None or (held.dtype, held.device) != (dtype, device) or len(held) < size:
            held = self._held[name] = torch.empty(size, dtype=dtype, device=device)
        return held[:size].view(*shape)


def _as_in_table(inv_freq: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Of the fp32 numbers near each frequency, the one that the table of positions 0 to P - 1 was made with.

    Its second row gives the frequency to within an ulp or two, and an ulp is 0.0002 at position 4,000.
    """
    steps = torch.arange(-4, 5, dtype=torch.int32)[:, None]
    candidates = (inv_freq.view(torch.int32) + steps).view(torch.float32)  # (9, D_rot / 2)
    angles = torch.arange(len(cos), dtype=torch.float32)[:, None] * candidates[:, None]
    errors = ((angles.cos() - cos) ** 2 + (angles.sin() - sin) ** 2).sum(dim=1)
    return candidates.gather(0, errors.nan_to_num(torch.inf).argmin(dim=0, keepdim=True))[0]


def inverse_frequencies(module: torch.nn.Module) -> list[torch.Tensor]:
    """The different `inv_freq` of Hugging Face's rotary embeddings in a module, fp32 `(D_rot / 2,)`."""
    buffers = (buffer for name, buffer in module.named_buffers() if name.endswith("inv_freq"))
    return list({tuple(buffer.tolist()): buffer.float().cpu() for buffer in buffers}.values())


def rotations_of(
    module: torch.nn.Module,
    keys_at: Callable[[int], torch.Tensor],
    max_model_len: int,
    more_candidates: Sequence[Rotation] = (),
) -> list[Rotation | None]:
    """Each layer's rotation of keys; None for a layer that has none in a model whose other layers do.

    Which rotation a layer uses, and which dimensions pair, shows in its keys. `keys_at(position)` are the keys
    `(L, H_kv, D)` of one token at that position that attends to itself only. `more_candidates`: rotations beside those
    of Hugging Face's rotary embeddings in `module`. Raises `ValueError` for a model without rotary embeddings (its
    positions are in the embeddings), and as `fitting_rotations` does.
    """
    frequencies = inverse_frequencies(module)
    candidates = [*more_candidates]
    candidates += [Rotation(inv_freq, is_neox) for inv_freq in frequencies for is_neox in (True, False)]
    if not candidates:
        raise ValueError("without rotary embeddings of constant frequencies its keys can't be moved")
    distance = min(_FAR_POSITION, max_model_len - 1)
    return fitting_rotations(candidates, keys_at(0), keys_at(distance), distance)


def fitting_rotations(
    candidates: Sequence[Rotation], here: torch.Tensor, there: torch.Tensor, distance: int
) -> list[Rotation | None]:
    """Which rotation is each layer's; None for a layer whose keys don't rotate.

    `here` and `there` are the keys `(L, H_kv, D)` of one token that attends to itself only, `distance` positions apart:
    they differ by their position alone, so what a model says of its rotations is put to the test. Raises `ValueError`
    for a layer that none fits, and where no layer's keys rotate.
    """
    rotations = []
    for layer, (near, far) in enumerate(zip(here.float(), there.float(), strict=True)):
        errors = [((_moved(near, rotation, distance) - far).norm(), rotation) for rotation in (*candidates, None)]
        error, best = min(errors, key=lambda tried: float(tried[0]))
        if not error <= _TOLERANCE * far.norm():
            raise ValueError(f"the keys of layer {layer} don't rotate as its rotary embedding says")
        rotations.append(best)
    if not any(rotations):
        raise ValueError("its keys don't rotate with their positions")
    return rotations


def _moved(keys: torch.Tensor, rotation: Rotation | None, distance: int) -> torch.Tensor:
    return keys if rotation is None else rotation.move(keys, distance)


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
