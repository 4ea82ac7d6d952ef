"""The contract of an engine's adapter: one prompt's KV cache there, and the model's own forward over chosen tokens.

An adapter per engine implements `PrefilledModel`; the blend is written once against it. Positions are the prompt's
token positions, ascending, int64; keys are rotated for their position. `Ranks` are the workers that a model's heads
are spread over (tensor parallelism). Each moves and recomputes the KV of its own heads, and all do so for the same
tokens: every call is made by all of them, in the same order.
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
    """Ends a forward on purpose: what it was run for is known. Whoever began the forward catches it."""


@dataclass(frozen=True)
class LayerAttention:
    """`scale` multiplies the products of queries and keys. A token attends to the `window` tokens that end with it, or
    without one to all up to itself.
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


Place = Callable[["torch.Tensor", Sequence["torch.Tensor"], Mapping["Rotation", "Rerotation"]], None]
"""Called with positions `(T,)`, their KV in parts `(2, L, t, H_kv * D)`, straight from where each lies, and the
rerotation of each rotation's keys; none where they stay as they are."""


Result = TypeVar("Result")
InPieces = Generator[None, None, Result]
"""Work that may be left between its pieces and gone on with later."""


class PrefilledModel(Protocol):
    """A prompt's cache in an engine. Valid during one step of the engine; calls follow each other.

    Heads are those of this worker; `ranks` has the others'. `rotations` and `attention` have an entry for each layer;
    that of a layer without rotary embedding is None.
    """

    rotations: Sequence[Rotation | None]
    attention: Sequence[LayerAttention]
    head_size: int
    device: torch.device
    ranks: Ranks

    def wait(self) -> None:
        """Returns when what was launched on the device has ended: copies from memory that isn't the model's, forwards
        whose time is taken.
        """
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
    def place(self) -> Place | None:
        """`write` in one pass with all that comes before it; None in an engine without a kernel for that."""
        ...

    def forward(self, positions: torch.Tensor, filters: Sequence[TokenFilter] = ()) -> torch.Tensor:
        """Run the model over the tokens at these positions: their fresh KV replaces what the cache held.

        `filters` are in the order of their layers. Returns the positions that went through all layers. Tokens attend
        to everything before them that is in their layer's window.
        """
        ...

    def observe(self, positions: torch.Tensor, on_layer: OnLayer) -> None:
        """As `forward`, and hands over what passes in each layer. `on_layer` may raise `EndForward`: the tokens under
        way then go no further, and have their KV in the layers before this one.
        """
        ...

    def queries(self, positions: torch.Tensor, layer: int) -> torch.Tensor:
        """The queries `(T, H, D)` of the tokens at these positions at this layer, rotated.

        They are run as by `forward`, but only up to this layer, and so is their KV in the cache then.
        """
        ...
