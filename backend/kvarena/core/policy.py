"""The contract of a selection policy, and what policies share.

A policy names the reused tokens to start with, and may filter them at some layers, where their fresh KV is then known:
what was run until then is not run twice. Tokens that no chunk covers are always computed, and no policy's business.
The policies are in `kvarena.policies`.

Importing this loads no torch: the stack and the command line know the policies where there is none.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

from kvarena.core.plan import ReusePlan, Span
from kvarena.core.prefilled_model import TokenFilter

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Selection:
    """Positions of reused tokens, ascending, and the filters on the way, in the order of their layers."""

    positions: torch.Tensor
    filters: tuple[TokenFilter, ...] = ()


class SelectionContext(Protocol):
    """What a policy may look at, on the model's device."""

    num_layers: int

    def reused_keys(self, layer: int) -> torch.Tensor:
        """The moved keys `(T, H_kv, D)` in the cache at a watched layer, in the order of the plan's spans."""
        ...

    def reused_values(self, layer: int) -> torch.Tensor:
        """The values, alike."""
        ...

    def stored_scores(self) -> torch.Tensor | None:
        """The stored deviation and attention `(T, 2)` of the plan's tokens (`kvarena.core.attention`); None where some
        chunk has none.
        """
        ...

    def attention_scale(self, layer: int) -> float:
        """The factor of this layer's products of queries and keys."""
        ...

    def summed(self, scores: torch.Tensor) -> torch.Tensor:
        """The sum of all workers' scores, for each has some of the heads; on the CPU."""
        ...

    def explain(
        self,
        what: str,
        positions: torch.Tensor,
        scores: torch.Tensor,
        seen_from: Callable[[], torch.Tensor] | None = None,
    ) -> None:
        """Tell the scores by which the policy chooses among the tokens at these positions, and `what` they are. They go
        into the report of a request that asks for them. Only then `seen_from` is called: the position in the prompt
        that each token's score comes from most.
        """
        ...

    def question_positions(self) -> torch.Tensor:
        """Where the tokens of `question_queries` stand."""
        ...

    def question_queries(self, layer: int) -> torch.Tensor:
        """The question's queries `(T_q, H, D)` at this layer, rotated for their positions.

        The question comes after the last span. It sees the reused KV as it is, and fresh KV of what no chunk covers.
        Costs a forward over those tokens up to this layer.
        """
        ...


@dataclass(frozen=True)
class SelectionPolicy(ABC):
    """Which of a plan's reused tokens are recomputed.

    A subclass is a frozen dataclass. Its fields are the paper's parameters, and a field `ratio`, where it has one, is
    the share of reused tokens. Policies with equal fields select alike.
    """

    calibrated_options: ClassVar[Sequence[Sequence[str]]] = ((),)
    """The options that `kvarena calibrate` tries it with, such as `(("deviation=values",),)`; empty: not at all."""

    @property
    def ratio(self) -> float | None:
        """None for a policy without one."""
        return None

    @property
    def goes_by_ratio(self) -> bool:
        """Whether the ratio makes a difference."""
        return self.ratio is not None

    @property
    def reads_scores(self) -> bool:
        """Whether it chooses by the scores that are stored with chunks."""
        return False

    @property
    def recomputes_all(self) -> bool:
        return self.goes_by_ratio and self.ratio == 1

    @property
    def recomputes_none(self) -> bool:
        return self.goes_by_ratio and self.ratio == 0

    def with_ratio(self, ratio: float) -> Self:
        """Itself if it has none."""
        changed: dict[str, Any] = {} if self.ratio is None else {"ratio": ratio}
        return replace(self, **changed)

    def settled(self) -> SelectionPolicy:
        """What to ask for a selection: at a ratio of 0 or 1 there is nothing to look at, whatever the policy."""
        if self.recomputes_all:
            return RecomputeAll()
        return RecomputeNone() if self.recomputes_none else self

    def watched_layers(self, num_layers: int) -> Sequence[int]:
        """Those of the model's layers whose reused KV it looks at; by default none."""
        return ()

    @abstractmethod
    def select(self, plan: ReusePlan, context: SelectionContext) -> Selection: ...


@dataclass(frozen=True)
class RecomputeAll(SelectionPolicy):
    """Every token, as if nothing was reused: full prefill through the blend's own path."""

    calibrated_options = ()
    recomputes_all = True

    def select(self, plan: ReusePlan, context: SelectionContext) -> Selection:
        return Selection(reused_positions(plan))


@dataclass(frozen=True)
class RecomputeNone(SelectionPolicy):
    """No token: each chunk's KV is used as it was computed, blind to what is before it."""

    calibrated_options = ()
    recomputes_none = True

    def select(self, plan: ReusePlan, context: SelectionContext) -> Selection:
        return Selection(reused_positions(ReusePlan()))


def reused_positions(plan: Iterable[Span]) -> torch.Tensor:
    """Of a plan's spans, or some of them: ascending, int64."""
    import torch

    ranges = [torch.arange(span.start, span.end) for span in plan]
    return torch.cat(ranges) if ranges else torch.empty(0, dtype=torch.int64)


def best_runs(scores: torch.Tensor, count: int, run_tokens: int) -> torch.Tensor:
    """The indices of `count` tokens: of the runs of `run_tokens` neighbours, those with the largest sums.

    Each run reads the KV before it once, so few long ones cost attention less than many short ones. The last run is cut
    to fit `count`.
    """
    import torch

    if run_tokens == 1:
        return scores.topk(count).indices
    padding = -len(scores) % run_tokens
    sums = torch.nn.functional.pad(scores, (0, padding)).view(-1, run_tokens).sum(dim=1)
    runs = sums.argsort(descending=True, stable=True)[: math.ceil((count + padding) / run_tokens)]
    tokens = (runs[:, None] * run_tokens + torch.arange(run_tokens)).flatten()
    return tokens[tokens < len(scores)][:count]


def share_of(num_tokens: int, ratio: float) -> int:
    """That share of the tokens, rounded up."""
    return math.ceil(ratio * num_tokens)
