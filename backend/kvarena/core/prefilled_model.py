"""The contract of an engine's adapter: one prompt's KV cache, and the model's own forward over chosen tokens.

Each engine implements `PrefilledModel`; the blend is written once against it. Positions are the prompt's token
positions, ascending, int64; keys are rotated for their position. `Ranks` are the workers that a model's heads are
spread over (tensor parallelism). Each moves and recomputes the KV of its own heads, and all do so for the same tokens:
every call is made by all of them, in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

from kvarena.core.plan import Chunk

if TYPE_CHECKING:  # what names a `TokenFilter` runs where there is no torch, too
    import torch

    from kvarena.core.rope import Rerotation, Rotation


class Ranks(Protocol):
    @property
    def num_ranks(self) -> int: ...

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks, the same on each, on the CPU in fp32."""
        ...

    def all(self, flags: Sequence[bool]) -> list[bool]:
        """For each flag whether it is set on every rank."""
        ...


class OneRank:
    """A model in one worker."""

    num_ranks = 1

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        return x.float().cpu()

    def all(self, flags: Sequence[bool]) -> list[bool]:
        return list(flags)


class EndForward(Exception):
    """Ends a forward early: what it was run for is known. Whoever began the forward catches it."""


@dataclass(frozen=True)
class LayerAttention:
    """`scale` multiplies the products of queries and keys. A token attends to the last `window` tokens up to itself,
    itself included; without a window to all of them.
    """

    scale: float
    window: int | None = None


class LayerKV(NamedTuple):
    """Keys and values of one layer, `(T, H_kv, D)` each."""

    keys: torch.Tensor
    values: torch.Tensor


@dataclass(frozen=True)
class TokenFilter:
    """From `layer`, one of the model's, on only chosen tokens go on; the others keep what the cache held there.

    `choose` takes the positions `(T,)` of the tokens under way and their fresh KV at that layer, and returns the
    ascending indices of those that go on.
    """

    layer: int
    choose: Callable[[torch.Tensor, LayerKV], torch.Tensor]


OnLayer = Callable[[int, "torch.Tensor", "torch.Tensor", LayerKV], None]
"""Called with a layer, the positions of the tokens under way, their queries `(T, H, D)` and their keys and values, both
rotated; valid only during the call."""


RotateAndWrite = Callable[["torch.Tensor", Sequence["torch.Tensor"], Mapping["Rotation", "Rerotation"]], None]
"""Called with positions `(T,)`, their KV in parts `(2, L, t, H_kv * D)`, and for each rotation how its keys are to be
rotated once more; empty where they stay as they are."""


Result = TypeVar("Result")
InPieces = Generator[None, None, Result]
"""Work in pieces, between which something else may be done."""


class PrefilledModel(Protocol):
    """A prompt's cache in an engine. Valid during one step of the engine; one call at a time.

    Heads are those of this worker. `rotations` and `attention` have an entry for each layer; the rotation of a layer
    without rotary embedding is None.
    """

    rotations: Sequence[Rotation | None]
    attention: Sequence[LayerAttention]
    head_size: int
    device: torch.device
    ranks: Ranks

    def wait(self) -> None:
        """Return when what was launched on the device has ended, such as copies and forwards."""
        ...

    def prefill_chunks(self, chunks: Sequence[Chunk], piece_tokens: int) -> InPieces[list[torch.Tensor | None]]:
        """The KV `(2, L, T, H_kv * D)` of each chunk, which follows its sink in a sequence of its own; about
        `piece_tokens` at a time.

        May use the cache from the first reused position on as scratch, so it comes before `write`. None for a chunk
        that has no room there.
        """
        ...

    def write(self, positions: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Put keys and values `(L, T, H_kv, D)` into the cache at these positions."""
        ...

    @property
    def rotate_and_write(self) -> RotateAndWrite | None:
        """Rotates and writes in one pass; None in an engine without a kernel for that."""
        ...

    def forward(self, positions: torch.Tensor, filters: Sequence[TokenFilter] = ()) -> torch.Tensor:
        """Run the model over the tokens at these positions: their fresh KV replaces what the cache held.

        `filters` are in the order of their layers. Returns the positions that went through all layers. A token attends
        to all before it that is in the layer's window.
        """
        ...

    def observe(self, positions: torch.Tensor, on_layer: OnLayer) -> None:
        """As `forward`, with a look at each layer. `on_layer` may raise `EndForward`: the tokens under way then go no
        further, and only the layers before this one have their fresh KV.
        """
        ...
