"""The two ends of every policy: recompute all, recompute nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvarena.reuse.plan import ReusePlan
from kvarena.reuse.selection.policy import Evidence, Selection, reused_positions


@dataclass(frozen=True)
class RecomputeAll:
    """Every token: full prefill through the blend's own path."""

    def watched_layers(self, num_layers: int) -> Sequence[int]:
        return ()

    def select(self, plan: ReusePlan, evidence: Evidence) -> Selection:
        return Selection(reused_positions(plan))


@dataclass(frozen=True)
class RecomputeNone:
    """No token: chunks are used as they were computed, blind to each other."""

    def watched_layers(self, num_layers: int) -> Sequence[int]:
        return ()

    def select(self, plan: ReusePlan, evidence: Evidence) -> Selection:
        return Selection(torch.empty(0, dtype=torch.int64))
