"""`random`: the control that every other policy must beat."""

from __future__ import annotations

from dataclasses import dataclass

from kvarena.core.plan import ReusePlan
from kvarena.core.policy import Selection, SelectionContext, SelectionPolicy, reused_positions, share_of
from kvarena.policies.registry import policy, ratio_parameter


@policy("random")
@dataclass(frozen=True)
class RandomTokens(SelectionPolicy):
    """Tokens drawn by chance: the control that every other policy must beat.

    The `ratio` of reused tokens, drawn uniformly; always the same of the same plan.
    """

    ratio: float = ratio_parameter()
    seed: int = 0

    calibrated_options = ()

    def select(self, plan: ReusePlan, context: SelectionContext) -> Selection:
        import torch

        reused = reused_positions(plan)
        generator = torch.Generator().manual_seed(self.seed)
        drawn = torch.randperm(len(reused), generator=generator)[: share_of(len(reused), self.ratio)]
        return Selection(reused[drawn.sort().values])
