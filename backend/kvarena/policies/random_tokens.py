"""`random`: the control that every other policy must beat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvarena.core.plan import ReusePlan
from kvarena.core.policy import Selection, SelectionContext, reused_positions, share_of


@dataclass(frozen=True)
class RandomTokens:
    """The `ratio` of reused tokens, drawn uniformly. The same plan always gives the same tokens."""

    ratio: float
    seed: int = 0

    def watched_layers(self, num_layers: int) -> Sequence[int]:
        return ()

    def select(self, plan: ReusePlan, evidence: SelectionContext) -> Selection:
        reused = reused_positions(plan)
        generator = torch.Generator().manual_seed(self.seed)
        drawn = torch.randperm(len(reused), generator=generator)[: share_of(len(reused), self.ratio)]
        return Selection(reused[drawn.sort().values])
