"""Tensor-parallel ranks as threads of one process."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch


class ThreadRanks:
    """Ranks in threads, which wait for each other at every question."""

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self._barrier = threading.Barrier(num_ranks, timeout=10)
        self._said: list[Sequence[bool]] = []

    def all(self, flags: Sequence[bool]) -> list[bool]:
        if self._barrier.wait() == 0:
            self._said = []
        self._barrier.wait()
        self._said.append(list(flags))
        self._barrier.wait()
        return [all(said) for said in zip(*self._said, strict=True)]

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        if self._barrier.wait() == 0:
            self._added: list[torch.Tensor] = []
        self._barrier.wait()
        self._added.append(x)
        self._barrier.wait()
        return torch.stack(self._added).sum(dim=0)
