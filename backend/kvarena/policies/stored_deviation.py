"""`stored_deviation`: the tokens with the highest scores stored with their chunks; no layer is run to choose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvarena.core.plan import ReusePlan
from kvarena.core.policy import Selection, SelectionContext, SelectionPolicy, best_runs, reused_positions, share_of
from kvarena.policies.kv_deviation import KVDeviation
from kvarena.policies.registry import check_layer_parameter, parameter, policy, ratio_parameter, run_tokens_parameter


@policy("stored_deviation")
@dataclass(frozen=True)
class StoredDeviation(SelectionPolicy):
    """The tokens that moved most and were looked at most in earlier prompts, by scores stored with their chunks.

    The `ratio` of reused tokens with the highest scores: deviation times attention to the power of `attention_weight`
    (`kvarena.core.attention`; docs/quality.md). A token that moves and is never looked at needs no repair. Warming
    stores the scores. A prompt with a chunk that has none yet is blended by `kv_deviation` of the values at
    `check_layer`. `run_tokens`: so many neighbours are chosen together.
    """

    ratio: float = ratio_parameter()
    check_layer: int = check_layer_parameter()
    attention_weight: float = parameter(
        0.5,
        "How much the attention counts that tokens got in earlier prompts; 0: only how far they moved.",
        at_least=0,
        at_most=1,
    )
    run_tokens: int = run_tokens_parameter()

    calibrated_options = ((), ("attention_weight=0",))
    reads_scores = True

    def watched_layers(self, num_layers: int) -> Sequence[int]:
        return self._online.watched_layers(num_layers)

    def select(self, plan: ReusePlan, context: SelectionContext) -> Selection:
        stored = context.stored_scores()
        if stored is None:
            return self._online.select(plan, context)
        deviation, attention = stored.unbind(1)
        scores = deviation * attention**self.attention_weight
        reused = reused_positions(plan)
        context.explain("score that is stored with its chunk", reused, scores)
        chosen = best_runs(scores, share_of(len(reused), self.ratio), self.run_tokens)
        return Selection(reused[chosen.sort().values])

    @property
    def _online(self) -> KVDeviation:
        return KVDeviation(self.ratio, self.check_layer, "values", run_tokens=self.run_tokens)
