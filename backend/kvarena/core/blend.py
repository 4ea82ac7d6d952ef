"""The blend: a prompt's KV from the KV of its chunks, by the model's own unchanged forward pass.

Fill the cache with the moved chunk KV of all layers, then give the model the selected tokens only, at their true
positions: in every layer their fresh keys and values replace the old ones and attend, causally, to everything before
them. That is CacheBlend (Yao et al., arXiv 2405.16444) layer by layer, with the engine's own kernels. In order: what
a blend reports, what it has cost lately (which ratio fits into a time), what a policy sees of it, the blend itself.
"""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

import torch

from kvarena.core.placement import ChunkSource, KVWriter, groups_of
from kvarena.core.plan import ReusePlan, Span
from kvarena.core.policy import SelectionPolicy, reused_positions
from kvarena.core.prefilled_model import LayerKV, PrefilledModel, Ranks, TokenFilter
from kvarena.core.stopwatch import Stopwatch
from kvarena.core.store import BackgroundPuts, ChunkStore, one_ahead


@dataclass
class BlendReport(Stopwatch):
    """Tokens by origin, store look-ups by outcome, milliseconds by stage.

    `fetch_ms` is the waiting for the store, `select_ms` ends when the tokens to recompute are known. `store_errors` and
    `store_evictions` are those since the last report, for chunks are put into the store beside the blend; its size is
    None where it isn't known here. `blend_failures` is 1 where the blend itself failed, and the whole range was
    computed. `ratio` is the one that the policy was given, None where it came to none.
    """

    ratio: float | None = None
    num_reused_tokens: int = 0
    num_recomputed_tokens: int = 0
    num_computed_tokens: int = 0
    store_hits: int = 0
    store_misses: int = 0
    store_errors: int = 0
    store_evictions: int = 0
    store_entries: int | None = None
    store_bytes: int | None = None
    blend_failures: int = 0
    fetch_ms: float = 0.0
    prefill_chunks_ms: float = 0.0
    move_ms: float = 0.0
    write_ms: float = 0.0
    select_ms: float = 0.0
    recompute_ms: float = 0.0
    blend_ms: float = 0.0
    spans: list[tuple[int, int]] = field(default_factory=list)


RECENT_BLENDS = 32
"""So many blends are remembered for each way of choosing tokens."""
NEAREST_BLENDS = 5
"""Of these, so many count: those whose length is nearest."""
RESERVE_RATIO = 0.1
"""Of the time that is left, for what takes longer than it did before."""
MIN_RATIO = 0.01
"""Recomputed where there is no time at all: so what a token costs stays known, and may come down again."""


@dataclass(frozen=True)
class Cost:
    """Of one blend over `num_tokens`: milliseconds for choosing, per token, and for each token that was recomputed."""

    num_tokens: int
    select_ms: float
    recompute_ms: float


@dataclass
class BlendCosts:
    """The costs of each policy with its options, whatever its ratio was."""

    _seen: dict[SelectionPolicy, deque[Cost]] = field(default_factory=dict)

    def note(
        self, policy: SelectionPolicy, num_tokens: int, num_recomputed: int, select_ms: float, recompute_ms: float
    ) -> None:
        """`num_recomputed` of `num_tokens` went through all layers, those among them that no chunk covers."""
        if num_recomputed:
            cost = Cost(num_tokens, select_ms / num_tokens, recompute_ms / num_recomputed)
            self._seen.setdefault(policy.with_ratio(0.0), deque(maxlen=RECENT_BLENDS)).append(cost)

    def ratio_within(self, policy: SelectionPolicy, num_reused: int, num_computed: int, left_ms: float) -> float:
        """The largest share of `num_reused` tokens that can be recomputed in time, beside `num_computed` others.

        The policy's own ratio as long as nothing is known of this way of choosing.
        """
        assert policy.ratio is not None, "a time for a policy without a ratio"
        seen = self._seen.get(policy.with_ratio(0.0))
        if not seen or not num_reused:
            return policy.ratio
        num_tokens = num_reused + num_computed
        nearest = sorted(seen, key=lambda cost: abs(math.log(cost.num_tokens / num_tokens)))[:NEAREST_BLENDS]

        def usual(part: Callable[[Cost], float]) -> float:
            return statistics.median(map(part, nearest))

        for_recomputing = (1 - RESERVE_RATIO) * left_ms - num_tokens * usual(lambda cost: cost.select_ms)
        affordable = for_recomputing / usual(lambda cost: cost.recompute_ms) - num_computed
        return min(1.0, max(MIN_RATIO, affordable / num_reused))


MAX_QUESTION_TOKENS = 64
_TOKENS_WITHOUT_QUESTION = 16


@dataclass
class BlendContext:
    """Implements `kvarena.core.policy.SelectionContext` for the range `[start, end)` of a prompt.

    `watched` holds the KV of the layers that the policy looks at, group after group, for the spans of `plan` and
    perhaps some before them.
    """

    model: PrefilledModel
    plan: ReusePlan
    watched: Mapping[int, Sequence[LayerKV]]
    start: int
    end: int

    def __post_init__(self) -> None:
        self.num_layers = len(self.model.rotations)

    def reused_keys(self, layer: int) -> torch.Tensor:
        return torch.cat([group.keys for group in self.watched[layer]])[-self.plan.num_reused_tokens :]

    def reused_values(self, layer: int) -> torch.Tensor:
        return torch.cat([group.values for group in self.watched[layer]])[-self.plan.num_reused_tokens :]

    def summed(self, scores: torch.Tensor) -> torch.Tensor:
        return self.model.ranks.sum(scores)

    def question_queries(self, layer: int) -> torch.Tensor:
        gaps = [torch.arange(low, high) for low, high in self.plan.gaps(self.start, self.end)]
        question = self._question()
        positions = torch.cat([*gaps, question[question < self.plan.end]]).sort().values
        rows = torch.isin(positions, question).nonzero().flatten().to(self.model.device)
        return self.model.queries(positions, layer)[rows]

    def _question(self) -> torch.Tensor:
        """The last tokens after the last span; where there are none, the last of the span."""
        after = torch.arange(max(self.plan.end, self.end - MAX_QUESTION_TOKENS), self.end)
        return after if len(after) else reused_positions(self.plan)[-_TOKENS_WITHOUT_QUESTION:]


logger = logging.getLogger(__name__)
RATIO_DIGITS = 4
ANY_RATIO = 0.5
"""Neither none nor all, for which a policy isn't asked."""


class Blender:
    """Blends prompts over one store."""

    def __init__(self, store: ChunkStore) -> None:
        self.store = store
        self._puts = BackgroundPuts(store)
        self._fetches = ThreadPoolExecutor(1, thread_name_prefix="kvarena-fetch")
        self._known = replace(store.stats)
        self._costs = BlendCosts()

    def clear(self) -> None:
        self._puts.close()
        self._puts = BackgroundPuts(self.store)
        self.store.clear()

    def close(self) -> None:
        """What was computed for the store gets there first."""
        self._puts.close()
        self.store.close()

    @torch.inference_mode()
    def blend(
        self,
        model: PrefilledModel,
        plan: ReusePlan,
        start: int,
        end: int,
        policy: SelectionPolicy,
        *,
        store_new: bool = True,
        budget_ms: float | None = None,
    ) -> BlendReport:
        """Fill the cache of `[start, end)`; what stands before `start` is there already.

        Whatever the store loses or the model has no room for is computed as part of the prompt. After an unexpected
        failure the whole range is computed, so the answer is right in every case. `store_new`: whether KV that is
        computed here is put into the store. `budget_ms`: the time for all of it. As many tokens are recomputed as fit,
        by what earlier blends took; the policy's own ratio counts as long as nothing is known of them.
        """
        report = BlendReport()
        deadline_s = None if budget_ms is None else time.perf_counter() + budget_ms / 1e3
        with report.timed("blend_ms"):
            try:
                self._blend(model, plan.clipped(start, end), start, end, policy, store_new, deadline_s, report)
            except Exception:
                logger.exception("blend failed; computing all of the prompt's tokens %d to %d", start, end)
                report.blend_failures += 1
                _count(report, ReusePlan(), start, end, num_recomputed=0)
                model.forward(torch.arange(start, end))
        self._note_store(report)
        return report

    def _blend(
        self,
        model: PrefilledModel,
        wanted: ReusePlan,
        start: int,
        end: int,
        policy: SelectionPolicy,
        store_new: bool,
        deadline_s: float | None,
        report: BlendReport,
    ) -> None:
        widest = policy if deadline_s is None else policy.with_ratio(ANY_RATIO)
        watched = widest.settled().watched_layers(len(model.rotations))
        plan, reused_kv = self._fill(model, wanted, watched, store_new, report)
        first = _exact_end(plan, start)
        if deadline_s is not None:
            policy = self._within(deadline_s, policy, plan.clipped(first, end), end - first, model.ranks)
        report.ratio = policy.ratio
        first = start if policy.recomputes_all else first
        inexact = plan.clipped(first, end)
        with report.timed("select_ms"):
            selection = policy.settled().select(inexact, BlendContext(model, inexact, reused_kv, first, end))
        gaps = [torch.arange(low, high) for low, high in plan.gaps(first, end)]
        positions = torch.cat([selection.positions, *gaps]).sort().values
        computed = _forward(model, positions, selection.filters, report) if len(positions) else positions
        _count(report, plan, start, end, num_recomputed=len(computed) - sum(map(len, gaps)))
        self._costs.note(policy, end - first, len(computed), report.select_ms, report.recompute_ms)

    def _within(
        self, deadline_s: float, policy: SelectionPolicy, inexact: ReusePlan, num_tokens: int, ranks: Ranks
    ) -> SelectionPolicy:
        """With the ratio that fits into the rest of the time: the ranks', each by its own clock, on average."""
        left_ms = 1e3 * (deadline_s - time.perf_counter())
        num_reused = inexact.num_reused_tokens
        ratio = self._costs.ratio_within(policy, num_reused, num_tokens - num_reused, left_ms)
        total, num_ranks = ranks.sum(torch.tensor([ratio, 1.0])).tolist()
        return policy.with_ratio(round(total / num_ranks, RATIO_DIGITS))

    def _fill(
        self, model: PrefilledModel, wanted: ReusePlan, watched: Sequence[int], store_new: bool, report: BlendReport
    ) -> tuple[ReusePlan, Mapping[int, Sequence[LayerKV]]]:
        """Put the spans' KV into the cache: what the store has, and chunks that it doesn't have, computed now.

        Returns the plan of what is there now, and the KV of the watched layers.
        """
        chunks = list(dict.fromkeys(span.chunk for span in wanted))
        with ExitStack() as stack:
            with report.timed("fetch_ms"):
                self._puts.wait_for(chunks)
                source = ChunkSource(chunks, stack.enter_context(self.store.retrieval(chunks)))
            self._prefill_missing(model, wanted, source, store_new, report)
            writer = KVWriter(model, watched, report)
            written: list[Span] = []
            fetched = one_ahead(self._fetches, source.take, groups_of(wanted.spans))
            for group in report.timed_each("fetch_ms", fetched):
                if group:
                    writer.write(group)
                written += [span for span, _ in group]
        report.store_hits, report.store_misses = source.num_hits, len(chunks) - source.num_hits
        return ReusePlan(tuple(written)), writer.kept

    def _prefill_missing(
        self, model: PrefilledModel, plan: ReusePlan, source: ChunkSource, store_new: bool, report: BlendReport
    ) -> None:
        """Compute missing chunks that stand whole in the prompt, each alone, and keep them."""
        missing = list(dict.fromkeys(s.chunk for s in plan if s.chunk not in source and s.is_whole_chunk))
        if not missing:
            return
        with report.timed("prefill_chunks_ms"):
            computed = model.prefill_chunks([chunk.token_ids for chunk in missing])
        for chunk, kv in zip(missing, computed, strict=True):
            if kv is None:
                continue
            source.add(chunk, kv)
            if store_new:
                self._puts.put(chunk, kv)

    def _note_store(self, report: BlendReport) -> None:
        """What happened to the store since the last report."""
        known, self._known = self._known, replace(self.store.stats)
        report.store_errors = self._known.errors - known.errors
        report.store_evictions = self._known.evictions - known.evictions
        report.store_entries, report.store_bytes = self._known.num_entries, self._known.num_bytes


def _forward(
    model: PrefilledModel, positions: torch.Tensor, filters: Sequence[TokenFilter], report: BlendReport
) -> torch.Tensor:
    """The model's forward; up to the last filter it is part of the selection."""
    start_s = chosen_s = time.perf_counter()

    def timed(token_filter: TokenFilter) -> TokenFilter:
        def choose(candidates: torch.Tensor, fresh: LayerKV) -> torch.Tensor:
            nonlocal chosen_s
            chosen = token_filter.choose(candidates, fresh)
            chosen_s = time.perf_counter()
            return chosen

        return replace(token_filter, choose=choose)

    computed = model.forward(positions, [timed(token_filter) for token_filter in filters])
    report.select_ms += 1e3 * (chosen_s - start_s)
    report.recompute_ms += 1e3 * (time.perf_counter() - chosen_s)
    return computed


def _exact_end(plan: ReusePlan, start: int) -> int:
    """Where the tokens end that are reused in their own place, after their own context: nothing there deviates."""
    begins_prompt = start == 0 and plan.spans and plan.spans[0].start == plan.spans[0].offset == 0
    return plan.spans[0].end if begins_prompt else start


def _count(report: BlendReport, plan: ReusePlan, start: int, end: int, *, num_recomputed: int) -> None:
    report.num_recomputed_tokens = num_recomputed
    report.num_reused_tokens = plan.num_reused_tokens - num_recomputed
    report.num_computed_tokens = end - start - plan.num_reused_tokens
    report.spans = [(span.start, span.end) for span in plan]
