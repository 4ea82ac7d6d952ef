"""The workers that a model's heads are spread over (tensor parallelism): what they have to agree on.

Each of them moves and recomputes the KV of its own heads, and all have to do so for the same tokens. Every call is made
by all of them, in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch


class Ranks(Protocol):
    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks, the same on each, on the CPU in fp32."""
        ...

    def all(self, flags: Sequence[bool]) -> list[bool]:
        """For each flag whether it is set on every rank."""
        ...


class OneRank:
    """A model in one worker."""

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        return x.float().cpu()

    def all(self, flags: Sequence[bool]) -> list[bool]:
        return list(flags)
