"""`kv_deviation` (CacheBlend, arXiv 2405.16444): the tokens whose fresh KV at a check layer differs most."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvarena.core.plan import ReusePlan
from kvarena.core.policy import Selection, SelectionContext, SelectionPolicy, best_runs, reused_positions, share_of
from kvarena.core.prefilled_model import LayerKV, TokenFilter
from kvarena.policies.registry import check_layer_parameter, parameter, policy, ratio_parameter, run_tokens_parameter

if TYPE_CHECKING:
    import torch


@policy("kv_deviation")
@dataclass(frozen=True)
class KVDeviation(SelectionPolicy):
    """The tokens whose fresh keys or values at a layer deviate most from the reused ones (CacheBlend).

    The `ratio` of reused tokens with the largest squared distance between fresh and reused KV at `check_layer`.
    CacheBlend (arXiv 2405.16444, section 4.3) selects at layer 1. What a token fetches from another chunk in the
    attention of layer n first shows in the keys of layer n + 1, so which layer is best depends on the model.

    `deviation`: "keys", as LMCache compares, or "values", as the paper's authors do. `num_filters`: so many layers in a
    row, from the check layer on, filter from twice the ratio evenly down to the ratio; 1 selects at once. The paper's
    gradual filtering, too, begins with more than the ratio, and leaves open how much more. `run_tokens`: so many
    neighbours are chosen together.
    """

    ratio: float = ratio_parameter()
    check_layer: int = check_layer_parameter()
    deviation: str = parameter("keys", "Whether keys or values are compared.", choices=("keys", "values"))
    num_filters: int = parameter(
        1,
        "In how many layers in a row tokens are dropped, from twice the ratio down to it; 1 selects at once.",
        unit="layers",
        at_least=1,
        at_most=1024,
    )
    run_tokens: int = run_tokens_parameter()

    calibrated_options = ((), ("deviation=values",))

    def watched_layers(self, num_layers: int) -> Sequence[int]:
        first = min(self.check_layer, num_layers - 1)
        return range(first, min(first + self.num_filters, num_layers))

    def select(self, plan: ReusePlan, context: SelectionContext) -> Selection:
        reused = reused_positions(plan)
        layers = self.watched_layers(context.num_layers)
        filters = [
            TokenFilter(layer, self._chooser(reused, context, layer, share_of(len(reused), ratio)))
            for layer, ratio in zip(layers, self._ratios(len(layers)), strict=True)
        ]
        return Selection(reused, tuple(filters) if len(reused) else ())

    def _ratios(self, num_filters: int) -> list[float]:
        steps = [1 + (num_filters - 1 - i) / max(1, num_filters - 1) for i in range(num_filters)]
        return [min(1.0, step * self.ratio) for step in ([1.0] if num_filters == 1 else steps)]

    def _chooser(
        self, reused: torch.Tensor, context: SelectionContext, layer: int, count: int
    ) -> Callable[[torch.Tensor, LayerKV], torch.Tensor]:
        import torch

        def most_deviating(positions: torch.Tensor, fresh: LayerKV) -> torch.Tensor:
            is_reused = torch.isin(positions, reused)
            candidates = is_reused.nonzero().flatten()
            rows = torch.searchsorted(reused, positions[candidates]).to(fresh.keys.device)
            reused_kv = context.reused_keys if self.deviation == "keys" else context.reused_values
            before = reused_kv(layer)[rows]
            now = getattr(fresh, self.deviation)[candidates.to(rows.device)]
            distance = (now.float() - before.float()).square_().sum(dim=(1, 2))
            scores = context.summed(distance)
            context.explain(f"squared distance of its {self.deviation}, layer {layer}", positions[candidates], scores)
            chosen = candidates[best_runs(scores, count, self.run_tokens)]
            return torch.cat([chosen, (~is_reused).nonzero().flatten()]).sort().values

        return most_deviating
