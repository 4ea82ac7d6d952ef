"""`chunk_head`: the first tokens of each chunk (LegoLink, from EPIC, arXiv 2410.15332)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvarena.core.plan import ReusePlan, Span
from kvarena.core.policy import Selection, SelectionContext, share_of


@dataclass(frozen=True)
class ChunkHead:
    """The first `head_tokens` of each reused chunk, or with 0 the first `ratio` of its tokens.

    LegoLink (EPIC, arXiv 2410.15332): a chunk that was computed alone has an attention sink in its own first tokens;
    computed anew behind others, they lose it. A chunk that begins the prompt is exact and isn't touched. Nothing has to
    be run to choose.
    """

    ratio: float
    head_tokens: int = 0

    def watched_layers(self, num_layers: int) -> Sequence[int]:
        return ()

    def select(self, plan: ReusePlan, evidence: SelectionContext) -> Selection:
        heads = [torch.arange(span.start, span.start + self._num_tokens(span)) for span in plan]
        return Selection(torch.cat(heads) if heads else torch.empty(0, dtype=torch.int64))

    def _num_tokens(self, span: Span) -> int:
        return min(self.head_tokens or share_of(len(span), self.ratio), len(span))
