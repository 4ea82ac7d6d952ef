"""The contract of a selection policy, and what policies share.

A policy is a small dataclass whose fields are its paper's parameters. It names the reused tokens to start with, and
may filter them at some layers, when their fresh KV there is known: what was run until then is not run twice. Tokens
that no chunk covers are always computed and aren't a policy's business. The policies are in `kvarena.policies`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from kvarena.core.plan import ReusePlan
from kvarena.core.prefilled_model import TokenFilter


@dataclass(frozen=True)
class Selection:
    """Positions of reused tokens, ascending, and how they are narrowed down on the way, layer after layer."""

    positions: torch.Tensor
    narrowings: tuple[TokenFilter, ...] = ()


class SelectionContext(Protocol):
    """What a policy may look at, on the model's device."""

    num_layers: int

    def reused_keys(self, layer: int) -> torch.Tensor:
        """The keys `(T, H_kv, D)` in the cache, moved, in the order of the plan's spans, at a watched layer."""
        ...

    def reused_values(self, layer: int) -> torch.Tensor:
        """The values, alike."""
        ...

    def summed(self, scores: torch.Tensor) -> torch.Tensor:
        """What all heads say of each token, on the CPU: this worker's scores and those of the others added up."""
        ...

    def question_queries(self, layer: int) -> torch.Tensor:
        """The question's queries `(T_q, H, D)` at this layer, rotated for their positions.

        The question stands behind the last span. It sees the reused KV as it is, and what no chunk covers computed over
        that. Costs a forward over those tokens up to this layer.
        """
        ...


class SelectionPolicy(Protocol):
    def watched_layers(self, num_layers: int) -> Sequence[int]:
        """The layers of so many whose reused KV it looks at."""
        ...

    def select(self, plan: ReusePlan, evidence: SelectionContext) -> Selection: ...


def reused_positions(plan: ReusePlan) -> torch.Tensor:
    ranges = [torch.arange(span.start, span.end) for span in plan]
    return torch.cat(ranges) if ranges else torch.empty(0, dtype=torch.int64)


def best_runs(scores: torch.Tensor, count: int, run_tokens: int) -> torch.Tensor:
    """The indices of `count` tokens: the runs of `run_tokens` neighbours, from the first on, with the largest sums.

    Every run reads the KV before it once, so few long ones cost attention less than many short ones. The last run taken
    is cut where it would be too much.
    """
    if run_tokens == 1:
        return scores.topk(count).indices
    padding = -len(scores) % run_tokens
    sums = torch.nn.functional.pad(scores, (0, padding)).view(-1, run_tokens).sum(dim=1)
    runs = sums.argsort(descending=True, stable=True)[: math.ceil((count + padding) / run_tokens)]
    tokens = (runs[:, None] * run_tokens + torch.arange(run_tokens)).flatten()
    return tokens[tokens < len(scores)][:count]


def share_of(num_tokens: int, ratio: float) -> int:
    """So many tokens are that share, rounded up."""
    return math.ceil(ratio * num_tokens)
