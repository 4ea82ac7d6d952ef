"""Which reused tokens to recompute.

A policy is a small dataclass whose fields are its paper's parameters; `select` returns positions of reused tokens.
What no chunk covers is always computed and isn't a policy's business.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from kvarena.reuse.params import BlendParams
from kvarena.reuse.plan import ReusePlan
from kvarena.reuse.prefilled import PrefilledModel

MovedKeys = Callable[[int], torch.Tensor]


class SelectionPolicy(Protocol):
    """`select` may run part of the model; `moved_keys(layer)` are the reused keys `(T_reused, H_kv, D)` as they
    were written to the cache, in the order of the plan's spans. Returns ascending positions."""

    def select(self, plan: ReusePlan, start: int, model: PrefilledModel, moved_keys: MovedKeys) -> torch.Tensor: ...


@dataclass(frozen=True)
class RecomputeAll:
    """Every token: full prefill through the blend's own path."""

    def select(self, plan: ReusePlan, start: int, model: PrefilledModel, moved_keys: MovedKeys) -> torch.Tensor:
        return reused_positions(plan)


@dataclass(frozen=True)
class RecomputeNone:
    """No token: chunks are used as they were computed, blind to each other."""

    def select(self, plan: ReusePlan, start: int, model: PrefilledModel, moved_keys: MovedKeys) -> torch.Tensor:
        return torch.empty(0, dtype=torch.int64)


@dataclass(frozen=True)
class KVDeviation:
    """The `ratio` of reused tokens whose fresh keys at `check_layer` differ most (squared distance) from the reused.

    CacheBlend (arXiv 2405.16444, section 4.3) selects at layer 1. What a token fetches from another chunk in the
    attention of layer n first shows in the keys of layer n + 1, so which layer is best depends on the model.
    """

    ratio: float
    check_layer: int = 1

    def select(self, plan: ReusePlan, start: int, model: PrefilledModel, moved_keys: MovedKeys) -> torch.Tensor:
        positions = reused_positions(plan)
        fresh = model.keys_at(self.check_layer, start, plan.end)
        fresh = fresh[(positions - start).to(fresh.device)]
        deviation = (fresh.float() - moved_keys(self.check_layer).float()).square_().sum(dim=(1, 2))
        count = min(len(positions), math.ceil(self.ratio * len(positions)))
        return positions[deviation.topk(count).indices.sort().values.cpu()]


def make_policy(params: BlendParams) -> SelectionPolicy:
    """Ratio 0 and 1 need no selection, whatever the policy."""
    if params.recomputes_all:
        return RecomputeAll()
    if params.recomputes_none:
        return RecomputeNone()
    return KVDeviation(params.ratio, params.check_layer)


def reused_positions(plan: ReusePlan) -> torch.Tensor:
    ranges = [torch.arange(span.start, span.end) for span in plan]
    return torch.cat(ranges) if ranges else torch.empty(0, dtype=torch.int64)
