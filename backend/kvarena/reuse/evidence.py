"""What a policy sees of one blend: the reused KV as the cache holds it, and the question's queries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from kvarena.reuse.moving import heads_of
from kvarena.reuse.plan import ReusePlan
from kvarena.reuse.prefilled import LayerKV, PrefilledModel
from kvarena.reuse.selection import reused_positions

MAX_QUESTION_TOKENS = 64
_TOKENS_WITHOUT_QUESTION = 16


@dataclass
class BlendEvidence:
    """Implements `kvarena.reuse.selection.Evidence` for the range `[start, end)` of a prompt, whose reused KV is in the
    cache; `pieces` are its spans' KV `(2, L, T, H_kv * D)` as stored.
    """

    model: PrefilledModel
    plan: ReusePlan
    pieces: Sequence[torch.Tensor]
    start: int
    end: int

    def __post_init__(self) -> None:
        self.num_layers = len(self.model.rotations)

    def reused(self, layer: int) -> LayerKV:
        keys = [heads_of(self.model, piece[0, layer]) for piece in self.pieces]
        values = [heads_of(self.model, piece[1, layer]) for piece in self.pieces]
        if rotation := self.model.rotations[layer]:
            keys = [rotation.move(k, span.start - span.offset) for span, k in zip(self.plan, keys, strict=True)]
        return LayerKV(torch.cat(keys), torch.cat(values))

    def question_queries(self, layer: int) -> torch.Tensor:
        gaps = [torch.arange(low, high) for low, high in self.plan.gaps(self.start, self.end)]
        question = self.question
        positions = torch.cat([*gaps, question[question < self.plan.end]]).sort().values
        rows = torch.isin(positions, question).nonzero().flatten().to(self.model.device)
        return self.model.queries(positions, layer)[rows]

    @cached_property
    def question(self) -> torch.Tensor:
        """The last tokens behind the last span; where there are none, the last of the span."""
        behind = torch.arange(max(self.plan.end, self.end - MAX_QUESTION_TOKENS), self.end)
        return behind if len(behind) else reused_positions(self.plan)[-_TOKENS_WITHOUT_QUESTION:]
