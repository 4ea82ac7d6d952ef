"""The blend: a prompt's KV from the KV of its chunks, by the model's own unchanged forward pass.

Fill the cache with the moved chunk KV of all layers, then give the model the selected tokens only, at their true
positions: in every layer their fresh keys and values replace the old ones and attend, causally, to everything before
them. That is CacheBlend (Yao et al., arXiv 2405.16444) layer by layer, with the engine's own kernels. In order: what a
policy sees of a blend, the task, the blender, the run of one task.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

import torch

from kvarena.core.attention import MAX_WATCHED_TOKENS, MIN_CONTEXT_TOKENS, ChunkScorer, LeaningObserver
from kvarena.core.devices import begin_thread, is_device_failure
from kvarena.core.placement import ChunkSource, KVWriter, groups_of, packed
from kvarena.core.plan import Chunk, ReusePlan, Span
from kvarena.core.policy import Selection, SelectionPolicy, reused_positions
from kvarena.core.prefilled_model import EndForward, InPieces, LayerKV, PrefilledModel, Result, TokenFilter
from kvarena.core.report import BlendCosts, BlendReport, TokenScores
from kvarena.core.store import BackgroundPuts, ChunkMiss, ScoredStore, StoreMiss, is_finite, one_ahead

logger = logging.getLogger(__name__)

RATIO_DIGITS = 4
ANY_RATIO = 0.5
"""Any but 0 and 1, at which a policy isn't asked."""
PUT_TIMEOUT_S = 2.0
"""For chunks that are on their way to the store; those that don't get there are computed again."""
MAX_QUESTION_TOKENS = 64
_TOKENS_WITHOUT_QUESTION = 16


@dataclass
class BlendContext:
    """Implements `kvarena.core.policy.SelectionContext` for a prompt up to `end`.

    `watched` has the KV of the layers that the policy looks at, group after group, of the spans of `plan` and perhaps
    some before them; `gaps` are the positions that are computed anyway.
    """

    model: PrefilledModel
    plan: ReusePlan
    watched: Mapping[int, Sequence[LayerKV]]
    gaps: Sequence[torch.Tensor]
    end: int
    scores_of_chunks: Mapping[Chunk, torch.Tensor]
    report: BlendReport

    def __post_init__(self) -> None:
        self.num_layers = len(self.model.rotations)

    def reused_keys(self, layer: int) -> torch.Tensor:
        return torch.cat([group.keys for group in self.watched[layer]])[-self.plan.num_reused_tokens :]

    def reused_values(self, layer: int) -> torch.Tensor:
        return torch.cat([group.values for group in self.watched[layer]])[-self.plan.num_reused_tokens :]

    def stored_scores(self) -> torch.Tensor | None:
        found = [self._scores_of(span) for span in self.plan]
        return None if self.unscored_chunks else torch.cat([scores for scores in found if scores is not None])

    @property
    def unscored_chunks(self) -> set[Chunk]:
        return {span.chunk for span in self.plan if self._scores_of(span) is None}

    def _scores_of(self, span: Span) -> torch.Tensor | None:
        """Where a prompt begins, they need none: too little is before those tokens."""
        known = self.scores_of_chunks.get(span.chunk)
        if known is None:
            return torch.zeros(len(span), 2) if span.start < MIN_CONTEXT_TOKENS else None
        return known[span.offset : span.offset + len(span)]

    def summed(self, scores: torch.Tensor) -> torch.Tensor:
        return self.model.ranks.sum(scores)

    def explain(
        self,
        what: str,
        positions: torch.Tensor,
        scores: torch.Tensor,
        seen_from: Callable[[], torch.Tensor] | None = None,
    ) -> None:
        if self.report.wants_scores:
            columns = [positions, scores, *([seen_from()] if seen_from else [])]
            self.report.token_scores = TokenScores.of(what, columns)

    def attention_scale(self, layer: int) -> float:
        return self.model.attention[layer].scale

    def question_queries(self, layer: int) -> torch.Tensor:
        question = self.question_positions()
        positions = torch.cat([*self.gaps, question[question < self.plan.end]]).sort().values
        rows = torch.isin(positions, question).nonzero().flatten().to(self.model.device)
        found: list[torch.Tensor] = []

        def keep(number: int, _positions: torch.Tensor, queries: torch.Tensor, _kv: LayerKV) -> None:
            if number == layer:
                found.append(queries.clone())
                raise EndForward

        self.model.observe(positions, keep)
        return torch.cat(found)[rows]

    def question_positions(self) -> torch.Tensor:
        """The last tokens after the last span, or where there are none, of that span."""
        after = torch.arange(max(self.plan.end, self.end - MAX_QUESTION_TOKENS), self.end)
        return after if len(after) else reused_positions(self.plan)[-_TOKENS_WITHOUT_QUESTION:]


@dataclass(frozen=True)
class BlendTask:
    """Fill the cache of `[start, end)`; what is before `start` is there already.

    With `store_new`, chunks that are computed here are put into the store, but for `unadmitted` ones. `budget_ms`: the
    time for all of it. As many tokens are recomputed as fit, by what earlier blends took; the policy's own ratio counts
    as long as nothing is known of them. `scores`: in place of a blend, the prompt is computed whole, and its chunks get
    scores of it. A prompt longer than `MAX_WATCHED_TOKENS`, or of which something is there already, is blended all the
    same. `seams`: what stands for spans, by their chunks' starts, where the store has it (`Planner.seams`); with
    `makes_seams` it is computed where the store hasn't.
    """

    plan: ReusePlan
    start: int
    end: int
    policy: SelectionPolicy
    store_new: bool = True
    unadmitted: frozenset[Chunk] = frozenset()
    budget_ms: float | None = None
    scores: bool = False
    seams: Mapping[int, Span] = field(default_factory=dict)
    makes_seams: bool = False

    @property
    def wanted(self) -> ReusePlan:
        return self.plan.clipped(self.start, self.end)

    def seam_of(self, span: Span) -> Span | None:
        """What may stand for a span of `wanted`; scores are of chunks as they are by themselves."""
        seam = None if self.scores else self.seams.get(span.start - span.offset)
        return seam and seam.clipped(span.start, span.end)

    @property
    def is_scored(self) -> bool:
        return self.scores and self.start == 0 and self.end <= MAX_WATCHED_TOKENS

    @property
    def positions(self) -> torch.Tensor:
        return torch.arange(self.start, self.end)


class Blender:
    """Blends prompts over one store. `device` is the models'."""

    def __init__(self, store: ScoredStore, device: torch.device | None = None) -> None:
        self.store = store
        self.device = device
        self.puts = BackgroundPuts(store, device)
        self.fetches = ThreadPoolExecutor(1, "kvarena-fetch", begin_thread, (device,))
        self.costs = BlendCosts()
        self._known = replace(store.stats)

    def missing(self, chunks: Sequence[Chunk], *, scores: bool = False) -> list[ChunkMiss | None]:
        """Why the store lacks each of these, or their `scores` if they are asked for; None where it has them. Waits for
        what is on its way to the store.
        """
        self.puts.wait_for(chunks, PUT_TIMEOUT_S)
        with self.store.retrieval(chunks) as retrieval:
            reason: StoreMiss = "store_down" if retrieval.failed else "not_stored"
            lacking: list[ChunkMiss | None] = [None if is_held else reason for is_held in retrieval.held]
            if scores:
                held = [index for index, is_held in enumerate(retrieval.held) if is_held]
                for index, kv in zip(held, retrieval.take(held), strict=True):
                    has_scores = kv is not None and retrieval.scores(index) is not None
                    lacking[index] = None if has_scores else "not_scored" if kv is not None else reason
            return lacking

    def close(self) -> None:
        """Puts what was computed into the store first."""
        self.puts.close()
        self.fetches.shutdown()
        self.store.close()

    def blend(self, model: PrefilledModel, task: BlendTask) -> BlendReport:
        """What the store loses or the model has no room for is computed as part of the prompt. After an unexpected
        failure the whole range is computed, so the answer is right in every case.

        Only a device failure (`is_device_failure`) on one of several ranks is raised: the others wait for it in a
        forward, and would mix that up with what this rank ran next.
        """
        report = BlendReport()
        with report.timed("blend_ms"):
            for _ in self.in_pieces(model, task, report, task.end - task.start):
                pass
        return report

    @torch.inference_mode()
    def in_pieces(
        self, model: PrefilledModel, task: BlendTask, report: BlendReport, piece_tokens: int
    ) -> InPieces[None]:
        """As `blend`, with the same result, in pieces of about `piece_tokens` that go through the model.

        Between them others may use the model, but not the task's part of the cache. At the end `report` is complete but
        for `blend_ms`, which is the caller's. Who stops before the end closes the generator.
        """
        run = _Run(self, model, task, report, max(1, piece_tokens))
        try:
            yield from run.score() if task.is_scored else run.blend()
        except Exception as error:
            if is_device_failure(error) and model.ranks.num_ranks > 1:
                raise
            logger.exception("blend failed; computing all of the prompt's tokens %d to %d", task.start, task.end)
            report.blend_failures += 1
            report.spans, report.computed_spans = [], []
            yield from run.compute(task.positions)
        self._note_store(report)

    def _note_store(self, report: BlendReport) -> None:
        known, self._known = self._known, replace(self.store.stats)
        report.store_errors = self._known.errors - known.errors
        report.store_evictions = self._known.evictions - known.evictions
        report.store_entries, report.store_bytes = self._known.num_entries, self._known.num_bytes


@dataclass(frozen=True)
class _Filled:
    """What is in the cache before anything is recomputed: the spans of `plan`, and nothing at the positions of `gaps`.

    `watched` has the KV of the layers that the policy looks at, and `scores` what the store knows of the chunks.
    """

    plan: ReusePlan
    gaps: Sequence[torch.Tensor]
    watched: Mapping[int, Sequence[LayerKV]]
    scores: Mapping[Chunk, torch.Tensor]

    @property
    def num_reused(self) -> int:
        return self.plan.inexact.num_reused_tokens

    @property
    def num_computed(self) -> int:
        return sum(map(len, self.gaps))


@dataclass
class _Run:
    """The run of one task. Its generators yield after about `piece_tokens` each."""

    blender: Blender
    model: PrefilledModel
    task: BlendTask
    report: BlendReport
    piece_tokens: int

    def __post_init__(self) -> None:
        task = self.task
        self.deadline_s = None if task.budget_ms is None else time.perf_counter() + task.budget_ms / 1e3
        self.leaning_ms = 0.0
        """The part of `select_ms` that only tells the client what tokens lean on."""

    def blend(self) -> InPieces[None]:
        """Fetch and place the chunks' KV, select tokens, run the model over these and over what no chunk covers."""
        task, report = self.task, self.report
        widest = task.policy if self.deadline_s is None else task.policy.with_ratio(ANY_RATIO)
        watched = widest.settled().watched_layers(len(self.model.rotations))

        filled = yield from self._fill(watched)
        policy = task.policy if self.deadline_s is None else self._within(self.deadline_s, filled)
        report.ratio = policy.ratio if policy.goes_by_ratio else None
        selection = self._select(policy, filled)

        positions, filters = torch.cat([selection.positions, *filled.gaps]).sort().values, selection.filters
        is_watchable = bool(watched) and len(task.positions) <= MAX_WATCHED_TOKENS
        if report.wants_scores and is_watchable and len(selection.positions):
            positions, filters = (yield from self._apply_filters(positions, filters)), ()
            yield from self._note_leaning(filled, watched[-1], positions)
        computed = yield from self.compute(positions, filters)

        select_ms, num_tokens = report.select_ms - self.leaning_ms, filled.num_reused + filled.num_computed
        self.blender.costs.note(policy, num_tokens, len(computed), select_ms, report.recompute_ms)

    def score(self) -> InPieces[None]:
        """Compute the whole prompt, and put what that shows of its chunks into the store."""
        filled = yield from self._fill(range(len(self.model.rotations)))
        if not filled.plan.spans:
            yield from self.compute(self.task.positions)
            return
        scorer = ChunkScorer(self.model, filled.plan, filled.watched, self.task.end)
        for number, piece in enumerate(self.task.positions.split(self.piece_tokens)):
            if number:
                yield
            with self.report.timed("recompute_ms", until=self.model.wait):
                self.model.observe(piece, scorer.observe)
        self.report.ratio = 1.0
        self.report.count(self.task.start, self.task.end, computed=self.task.positions)
        with self.report.timed("select_ms"):
            for chunk, scores in scorer.scores().items():
                self._put_scores(chunk, scores)

    def _put_scores(self, chunk: Chunk, scores: torch.Tensor) -> None:
        self.blender.puts.after_puts(chunk, scores.nbytes, self.blender.store.add_scores, chunk, scores)

    def compute(self, positions: torch.Tensor, filters: Sequence[TokenFilter] = ()) -> InPieces[torch.Tensor]:
        """Run these tokens, and count them. Returns the positions of those that went through all layers.

        Where they are more than a piece, they are first run up to the first filter. Those that it chooses are then run
        again from the first layer on; before the filter's layer they find the others' fresh KV in the cache.
        """
        while filters and len(positions) > self.piece_tokens:
            positions = yield from self._apply_filter(positions, filters[0])
            filters = filters[1:]
            yield
        pieces = [positions] if filters else positions.split(self.piece_tokens)
        computed = []
        for number, piece in enumerate(pieces):
            if number:
                yield
            if len(piece):
                computed.append(self._forward(piece, filters))
        run = torch.cat(computed) if computed else positions
        self.report.count(self.task.start, self.task.end, run)
        return run

    def _within(self, deadline_s: float, filled: _Filled) -> SelectionPolicy:
        """The policy with the ratio that fits into the time left: the mean of the ranks', each by its own clock."""
        policy = self.task.policy
        left_ms = 1e3 * (deadline_s - time.perf_counter())
        ratio = self.blender.costs.ratio_within(policy, filled.num_reused, filled.num_computed, left_ms)
        total, num_ranks = self.model.ranks.sum(torch.tensor([ratio, 1.0])).tolist()
        return policy.with_ratio(round(total / num_ranks, RATIO_DIGITS))

    def _select(self, policy: SelectionPolicy, filled: _Filled) -> Selection:
        plan = filled.plan if policy.recomputes_all else filled.plan.inexact
        context = BlendContext(self.model, plan, filled.watched, filled.gaps, self.task.end, filled.scores, self.report)
        with self.report.timed("select_ms"):
            selection = policy.settled().select(plan, context)
        if policy.settled().reads_scores:
            self.report.unscored_chunks = len(context.unscored_chunks)
        return selection

    def _fill(self, watched: Sequence[int]) -> InPieces[_Filled]:
        """Put the spans' KV into the cache: what the store has, and chunks that it doesn't have, computed now."""
        report = self.report
        seams = {span: seam for span in self.task.wanted if (seam := self.task.seam_of(span))}
        looked_up = list(dict.fromkeys(span.chunk for span in (*self.task.wanted, *seams.values())))
        with ExitStack() as stack:
            with report.timed("fetch_ms"):
                self.blender.puts.wait_for(looked_up, PUT_TIMEOUT_S)
                source = ChunkSource(looked_up, stack.enter_context(self.blender.store.retrieval(looked_up)))
            used = {s: seam for s, seam in seams.items() if self.task.makes_seams or seam.chunk in source}
            made = {seam.chunk: span.chunk for span, seam in used.items() if seam.chunk not in source}
            wanted = ReusePlan(tuple(used.get(span, span) for span in self.task.wanted))
            yield from self._prefill_missing(wanted, source, made)
            writer = KVWriter(self.model, watched, report)
            written: list[Span] = []
            fetched = one_ahead(self.blender.fetches, source.take, groups_of(wanted.spans))
            failure: Exception | None = None
            for group in report.timed_each("fetch_ms", fetched):
                if group and failure is None:
                    try:
                        writer.write(group)
                    except Exception as error:
                        failure = error  # the other ranks' fetches wait for this one's
                written += [span for span, _ in group]
            writer.finish()  # the store's memory may be another's once its retrieval ends
        self._agree(failure)
        self._note_filled(wanted, written, source, made)
        report.num_seams = sum(span in used.values() for span in written if span.chunk not in source.added)
        plan = ReusePlan(tuple(written))
        gaps = [torch.arange(low, high) for low, high in plan.gaps(self.task.start, self.task.end)]
        return _Filled(plan, gaps, writer.kept, source.scores)

    def _note_filled(
        self, wanted: ReusePlan, written: Sequence[Span], source: ChunkSource, made: Mapping[Chunk, Chunk]
    ) -> None:
        """Count the store's hits and misses, but for seams that were `made`: nobody expected them in the store."""
        report, chunks = self.report, {span.chunk for span in wanted}
        report.store_hits, report.store_misses = source.num_hits, len(chunks) - len(made) - source.num_hits
        report.spans = [(span.start, span.end) for span in written if span.chunk not in source.added]
        report.computed_spans = [(span.start, span.end) for span in written if span.chunk in source.added]
        firsts = {span.chunk: span for span in reversed(wanted.spans) if span.chunk not in made}
        missed = [(span, reason) for span in firsts.values() if (reason := source.missing(span.chunk))]
        report.misses = sorted((span.start, span.end, reason) for span, reason in missed)

    def _prefill_missing(self, plan: ReusePlan, source: ChunkSource, made: Mapping[Chunk, Chunk]) -> InPieces[None]:
        """Compute missing chunks that stand whole in the prompt, each after its sink, and keep them. One whose KV isn't
        finite on every rank is left to the prompt. `made` has the plain chunk of each seam, whose scores hold for the
        seam, too.
        """
        missing = list(dict.fromkeys(s.chunk for s in plan if s.chunk not in source and s.is_whole_chunk))
        for piece in packed(missing, len, self.piece_tokens):
            pieces = self.model.prefill_chunks(piece, self.piece_tokens)
            computed = yield from self._timed("prefill_chunks_ms", pieces)
            is_usable = self.model.ranks.all([kv is not None and is_finite(kv) for kv in computed])
            for chunk, kv, usable in zip(piece, computed, is_usable, strict=True):
                if kv is None or not usable:
                    continue
                kept = source.add(chunk, kv)
                if self.task.store_new and chunk not in self.task.unadmitted:
                    self.blender.puts.put(chunk, kept)
                    if chunk in made and (scores := source.scores_of(made[chunk])) is not None:
                        self._put_scores(chunk, scores)
            yield

    def _agree(self, failure: Exception | None) -> None:
        """Raises on all ranks where one couldn't write the KV, for lack of memory, say: all compute the prompt."""
        if not self.model.ranks.all([failure is None])[0]:
            raise RuntimeError("the chunks' KV couldn't be written on every rank") from failure

    def _timed(self, stage: str, pieces: InPieces[Result]) -> InPieces[Result]:
        """Time the pieces, without what happens between them."""
        while True:
            with self.report.timed(stage, until=self.model.wait):
                try:
                    next(pieces)
                except StopIteration as end:
                    result: Result = end.value
                    return result
            yield

    def _apply_filters(self, positions: torch.Tensor, filters: Sequence[TokenFilter]) -> InPieces[torch.Tensor]:
        """What all filters leave of these tokens, before any of them goes through all layers."""
        for token_filter in filters:
            positions = yield from self._apply_filter(positions, token_filter)
            yield
        return positions

    def _note_leaning(self, filled: _Filled, layer: int, positions: torch.Tensor) -> InPieces[None]:
        """Run these tokens up to this layer, to see which chunk each attends to."""
        before_ms, (start, end) = self.report.select_ms, (self.task.start, self.task.end)
        observer = LeaningObserver(self.model, filled.plan, filled.watched[layer], layer, start, end)
        for piece in positions.split(self.piece_tokens):
            with self.report.timed("select_ms", until=self.model.wait):
                self.model.observe(piece, observer.observe)
            yield
        with self.report.timed("select_ms"):
            self.report.leans_on = observer.leans_on()
        self.leaning_ms = self.report.select_ms - before_ms

    def _apply_filter(self, positions: torch.Tensor, first: TokenFilter) -> InPieces[torch.Tensor]:
        """The positions that a filter chooses. Pieces have more tokens here, for only some of the layers are run."""
        fresh: list[LayerKV] = []

        def keep(_candidates: torch.Tensor, kv: LayerKV) -> torch.Tensor:
            fresh.append(kv)
            raise EndForward

        piece_tokens = self.piece_tokens * len(self.model.rotations) // (first.layer + 1)
        for number, piece in enumerate(positions.split(piece_tokens)):
            if number:
                yield
            with self.report.timed("select_ms", until=self.model.wait):
                self.model.forward(piece, [replace(first, choose=keep)])
        with self.report.timed("select_ms"):
            return positions[first.choose(positions, LayerKV(*map(torch.cat, zip(*fresh, strict=True))))]

    def _forward(self, positions: torch.Tensor, filters: Sequence[TokenFilter]) -> torch.Tensor:
        """The model's forward, whose time counts as selection up to the last filter."""
        start_s = chosen_s = time.perf_counter()

        def timed(token_filter: TokenFilter) -> TokenFilter:
            def choose(candidates: torch.Tensor, fresh: LayerKV) -> torch.Tensor:
                nonlocal chosen_s
                chosen = token_filter.choose(candidates, fresh)
                chosen_s = time.perf_counter()
                return chosen

            return replace(token_filter, choose=choose)

        computed = self.model.forward(positions, [timed(token_filter) for token_filter in filters])
        self.model.wait()
        self.report.select_ms += 1e3 * (chosen_s - start_s)
        self.report.recompute_ms += 1e3 * (time.perf_counter() - chosen_s)
        return computed
