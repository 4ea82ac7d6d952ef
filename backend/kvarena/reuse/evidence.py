"""What a policy sees of one blend: the reused KV as the cache holds it, and the question's queries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from kvarena.reuse.plan import ReusePlan
from kvarena.reuse.prefilled import LayerKV, PrefilledModel
from kvarena.reuse.selection import reused_positions

MAX_QUESTION_TOKENS = 64
_TOKENS_WITHOUT_QUESTION = 16


@dataclass
class BlendEvidence:
    """Implements `kvarena.reuse.selection.Evidence` for the range `[start, end)` of a prompt.

    `watched` holds the KV of the layers that the policy looks at, group after group, for the spans of `plan` and
    perhaps some before them.
    """

    model: PrefilledModel
    plan: ReusePlan
    watched: Mapping[int, Sequence[LayerKV]]
    start: int
    end: int

    def __post_init__(self) -> None:
        self.num_layers = len(self.model.rotations)

    def reused_keys(self, layer: int) -> torch.Tensor:
        return torch.cat([group.keys for group in self.watched[layer]])[-self.plan.num_reused_tokens :]

    def reused_values(self, layer: int) -> torch.Tensor:
        return torch.cat([group.values for group in self.watched[layer]])[-self.plan.num_reused_tokens :]

    def summed(self, scores: torch.Tensor) -> torch.Tensor:
        return self.model.ranks.sum(scores)

    def question_queries(self, layer: int) -> torch.Tensor:
        gaps = [torch.arange(low, high) for low, high in self.plan.gaps(self.start, self.end)]
        question = self._question()
        positions = torch.cat([*gaps, question[question < self.plan.end]]).sort().values
        rows = torch.isin(positions, question).nonzero().flatten().to(self.model.device)
        return self.model.queries(positions, layer)[rows]

    def _question(self) -> torch.Tensor:
        """The last tokens behind the last span; where there are none, the last of the span."""
        behind = torch.arange(max(self.plan.end, self.end - MAX_QUESTION_TOKENS), self.end)
        return behind if len(behind) else reused_positions(self.plan)[-_TOKENS_WITHOUT_QUESTION:]
