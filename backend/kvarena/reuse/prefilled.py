"""The seam to an engine: one prompt's KV cache there, and the model's own forward over chosen tokens of it.

An adapter per engine implements `PrefilledModel`; the blend is written once against it. Positions are the prompt's
token positions, ascending, int64; keys are rotated for their position.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from kvarena.reuse.plan import TokenIds
from kvarena.reuse.ranks import Ranks
from kvarena.reuse.rope import Rotation


class LayerKV(NamedTuple):
    """Keys and values of one layer, `(T, H_kv, D)` each."""

    keys: torch.Tensor
    values: torch.Tensor


@dataclass(frozen=True)
class Narrowing:
    """From `layer`, one of the model's, on only chosen tokens go on; the others keep what the cache held there.

    `choose` takes the positions `(T,)` of the tokens under way and their fresh KV at that layer, and returns the
    ascending indices of those that go on.
    """

    layer: int
    choose: Callable[[torch.Tensor, LayerKV], torch.Tensor]


class PrefilledModel(Protocol):
    """A prompt's cache in an engine. Valid during one step of the engine; calls follow each other.

    Heads are those of this worker; `ranks` has the others'. `rotations` has an entry for each layer, None for a layer
    without rotary embedding.
    """

    rotations: Sequence[Rotation | None]
    head_size: int
    device: torch.device
    ranks: Ranks

    def prefill_alone(self, texts: Sequence[TokenIds]) -> list[torch.Tensor | None]:
        """The KV `(2, L, T, H_kv * D)` of each text as a sequence of its own, at positions 0 to T-1.

        May use the cache from the first reused position on as scratch, so it comes before `write`. None for a text
        that has no room there.
        """
        ...

    def write(self, layer: int, positions: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Put keys and values `(T, H_kv, D)` into the cache at these positions."""
        ...

    def forward(self, positions: torch.Tensor, narrowings: Sequence[Narrowing] = ()) -> torch.Tensor:
        """Run the model over the tokens at these positions: their fresh KV replaces what the cache held.

        `narrowings` are in the order of their layers. Returns the positions that went through all layers. Tokens attend
        to everything before them.
        """
        ...

    def queries(self, positions: torch.Tensor, layer: int) -> torch.Tensor:
        """The queries `(T, H, D)` of the tokens at these positions at this layer, rotated.

        They are run as by `forward`, but only up to this layer, and so is their KV in the cache then.
        """
        ...
