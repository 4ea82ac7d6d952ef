"""Which reused tokens to recompute.

A policy is a small dataclass whose fields are its paper's parameters. It names the reused tokens to start with, and may
narrow them down at a layer, when their fresh keys there are known: what was run until then is not run twice. What no
chunk covers is always computed and isn't a policy's business.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from kvarena.reuse.params import BlendParams
from kvarena.reuse.plan import ReusePlan
from kvarena.reuse.prefilled import Narrowing

ReusedKeys = Callable[[int], torch.Tensor]


@dataclass(frozen=True)
class Selection:
    """Positions of reused tokens, ascending, and how they are narrowed down on the way."""

    positions: torch.Tensor
    narrowing: Narrowing | None = None


class SelectionPolicy(Protocol):
    """`reused_keys(layer)` are the keys `(T_reused, H_kv, D)` in the cache, in the order of the plan's spans."""

    def select(self, plan: ReusePlan, reused_keys: ReusedKeys) -> Selection: ...


@dataclass(frozen=True)
class RecomputeAll:
    """Every token: full prefill through the blend's own path."""

    def select(self, plan: ReusePlan, reused_keys: ReusedKeys) -> Selection:
        return Selection(reused_positions(plan))


@dataclass(frozen=True)
class RecomputeNone:
    """No token: chunks are used as they were computed, blind to each other."""

    def select(self, plan: ReusePlan, reused_keys: ReusedKeys) -> Selection:
        return Selection(torch.empty(0, dtype=torch.int64))


@dataclass(frozen=True)
class KVDeviation:
    """The `ratio` of reused tokens whose fresh keys at `check_layer` differ most (squared distance) from the reused.

    CacheBlend (arXiv 2405.16444, section 4.3) selects at layer 1. What a token fetches from another chunk in the
    attention of layer n first shows in the keys of layer n + 1, so which layer is best depends on the model.
    """

    ratio: float
    check_layer: int = 1

    def select(self, plan: ReusePlan, reused_keys: ReusedKeys) -> Selection:
        reused = reused_positions(plan)
        count = math.ceil(self.ratio * len(reused))

        def most_deviating(positions: torch.Tensor, fresh_keys: torch.Tensor) -> torch.Tensor:
            is_reused = torch.isin(positions, reused)
            indices = is_reused.nonzero().flatten().to(fresh_keys.device)
            difference = fresh_keys[indices].float() - reused_keys(self.check_layer).float()
            chosen = indices[difference.square_().sum(dim=(1, 2)).topk(count).indices].cpu()
            return torch.cat([chosen, (~is_reused).nonzero().flatten()]).sort().values

        return Selection(reused, Narrowing(self.check_layer, most_deviating) if count else None)


@dataclass(frozen=True)
class RandomTokens:
    """The `ratio` of reused tokens, drawn uniformly: what a choice by deviation has to beat.

    The same plan always gives the same tokens. No layer is run over all of them first.
    """

    ratio: float
    seed: int = 0

    def select(self, plan: ReusePlan, reused_keys: ReusedKeys) -> Selection:
        reused = reused_positions(plan)
        generator = torch.Generator().manual_seed(self.seed)
        drawn = torch.randperm(len(reused), generator=generator)[: math.ceil(self.ratio * len(reused))]
        return Selection(reused[drawn.sort().values])


def make_policy(params: BlendParams) -> SelectionPolicy:
    """Ratio 0 and 1 need no selection, whatever the policy."""
    if params.recomputes_all:
        return RecomputeAll()
    if params.recomputes_none:
        return RecomputeNone()
    if params.policy == "random":
        return RandomTokens(params.ratio)
    return KVDeviation(params.ratio, params.check_layer)


def reused_positions(plan: ReusePlan) -> torch.Tensor:
    ranges = [torch.arange(span.start, span.end) for span in plan]
    return torch.cat(ranges) if ranges else torch.empty(0, dtype=torch.int64)
