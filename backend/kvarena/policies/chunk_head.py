"""`chunk_head`: the first tokens of each chunk (LegoLink, from EPIC, arXiv 2410.15332)."""

from __future__ import annotations

from dataclasses import dataclass

from kvarena.core.plan import ReusePlan, Span
from kvarena.core.policy import Selection, SelectionContext, SelectionPolicy, share_of
from kvarena.policies.registry import parameter, policy, ratio_parameter


@policy("chunk_head")
@dataclass(frozen=True)
class ChunkHead(SelectionPolicy):
    """The first tokens of each chunk (LegoLink, from EPIC).

    The first `head_tokens` of each reused chunk, or with 0 the first `ratio` of its tokens. LegoLink (EPIC, arXiv
    2410.15332): a chunk that was computed alone has an attention sink in its own first tokens; computed anew after
    others, they lose it. A chunk that begins the prompt is exact and isn't touched. Nothing has to be run to choose.
    """

    ratio: float = ratio_parameter()
    head_tokens: int = parameter(
        0,
        "Number of tokens to recompute in each chunk, in place of the ratio; 0 means the ratio.",
        unit="tokens",
        at_least=0,
        at_most=65536,
    )

    @property
    def goes_by_ratio(self) -> bool:
        return not self.head_tokens

    def select(self, plan: ReusePlan, context: SelectionContext) -> Selection:
        import torch

        heads = [torch.arange(span.start, span.start + self._num_tokens(span)) for span in plan]
        return Selection(torch.cat(heads) if heads else torch.empty(0, dtype=torch.int64))

    def _num_tokens(self, span: Span) -> int:
        return min(self.head_tokens or share_of(len(span), self.ratio), len(span))
