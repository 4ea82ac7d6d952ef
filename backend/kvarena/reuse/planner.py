"""From a prompt's token ids to its reuse plan.

Two sources: known chunks, found wherever they stand (`matcher`), and segments, ranges that the client marked as
wholes (by a separator or as message parts). A segment that is not known yet is planned too: its KV is computed
once, alone, and stored, and is then known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvarena.reuse.matcher import ChunkIndex
from kvarena.reuse.plan import Chunk, ReusePlan, Span, TokenIds

Segment = tuple[int, int]


@dataclass(frozen=True)
class Planner:
    """Plans over one index.

    `min_chunk_tokens`: shorter segments are not worth a chunk. `min_match_tokens`: shorter partial matches are not
    worth a span. `min_coverage`: a segment covered by known chunks to at least this share isn't made a chunk itself.
    `min_reused_ratio`, `max_joined_tokens`: see `blend_end`.
    """

    index: ChunkIndex
    min_chunk_tokens: int = 16
    min_match_tokens: int = 32
    min_coverage: float = 0.5
    min_reused_ratio: float = 0.5
    max_joined_tokens: int = 128

    def plan(self, token_ids: TokenIds, segments: Sequence[Segment] = (), salt: str = "") -> ReusePlan:
        """The plan of a prompt. `segments` must be in order and without overlap. Changes nothing but recency."""
        matches = ReusePlan(tuple(self.index.match(token_ids, salt, min_tokens=self.min_match_tokens)))
        spans: list[Span] = []
        position = 0
        for start, end in segments:
            spans += matches.clipped(position, start)
            spans += self._plan_segment(token_ids, start, end, salt, matches)
            position = end
        spans += matches.clipped(position, len(token_ids))
        return ReusePlan(tuple(span for span in spans if self._worth_it(span)))

    def blend_end(self, plan: ReusePlan, start: int, last: int) -> int:
        """Up to where a prompt is blended from `start` on; `last` is its last token, which has to give the logits.

        The last span's end that leaves mostly reused tokens before it; what follows is cheaper as plain prefill. A
        short rest, the question, joins the blend: its tokens come along in a forward that is made anyway. `start`
        stands for nothing.
        """
        spans = plan.clipped(start, last).spans
        reused = sum(map(len, spans))
        for span in reversed(spans):
            if reused >= max(self.min_reused_ratio * (span.end - start), self.min_chunk_tokens):
                return last if last - span.end <= self.max_joined_tokens else span.end
            reused -= len(span)
        return start

    def _plan_segment(self, token_ids: TokenIds, start: int, end: int, salt: str, matches: ReusePlan) -> Sequence[Span]:
        chunk = Chunk(token_ids[start:end].copy(), salt)
        if len(chunk) < self.min_chunk_tokens:
            return ()
        found = matches.clipped(start, end)
        if not self.index.touch(chunk) and found.num_reused_tokens >= self.min_coverage * len(chunk):
            return found.spans
        return (Span(start, end, chunk),)

    def _worth_it(self, span: Span) -> bool:
        return len(span) >= self.min_chunk_tokens
