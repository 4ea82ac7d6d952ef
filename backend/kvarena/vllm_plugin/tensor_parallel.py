"""vLLM's tensor-parallel group as the blend's ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.distributed import ReduceOp, all_reduce
from vllm.distributed.parallel_state import get_tp_group

from kvarena.reuse.ranks import OneRank, Ranks


class TensorParallelRanks:
    """Over the group's CPU side: what is agreed on is small, and decisions are made there."""

    def __init__(self) -> None:
        self._group = get_tp_group().cpu_group

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        total = x.float().cpu().clone()
        all_reduce(total, group=self._group)
        return total

    def all(self, flags: Sequence[bool]) -> list[bool]:
        found = torch.tensor(flags, dtype=torch.int32)
        if flags:
            all_reduce(found, op=ReduceOp.MIN, group=self._group)
        return [bool(flag) for flag in found]


def make_ranks() -> Ranks:
    return TensorParallelRanks() if get_tp_group().world_size > 1 else OneRank()


def rank_name() -> str:
    """Tells the KV of one rank's heads from another's; empty where there is one rank."""
    group = get_tp_group()
    return f"-rank{group.rank_in_group}of{group.world_size}" if group.world_size > 1 else ""
