"""The connector in the scheduler: what of a new prompt can be reused, which blocks it goes into, and its report.

| tokens of a prompt | who fills their KV |
|---|---|
| `[0, L)` | vLLM's prefix cache |
| `[L, E)` | a blend job, before the step's forward; a long one in pieces, over several steps |
| `[E, n)`, at least one token | vLLM's own prefill |

Blended KV is approximate and stays in vLLM's prefix cache under a salt of its own, one for each setting, so a
follow-up finds it and no exact request ever does.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import math
import statistics
import time
import uuid
from collections import OrderedDict, deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from vllm import envs
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.metrics.stats import PrefillStats
from vllm.v1.request import Request, RequestStatus

from kvarena.core.blend import BlendTask
from kvarena.core.matching import Planner, Segment, Segmenter, prompt_beginning
from kvarena.core.plan import Chunk, ChunkKey, ReusePlan, Span, TokenIds, as_token_ids
from kvarena.core.policy import share_of
from kvarena.core.report import BlendReport
from kvarena.engines.base import MissReason
from kvarena.engines.vllm.config import BlendConfig, RequestParams, read_request_params
from kvarena.engines.vllm.messages import BlendJob, BlendJobs, BlendReports, BlendStats, Miss, RequestReport
from kvarena.policies.params import BlendParams, make_policy
from kvarena.stores.sqlite import KnownChunks

logger = logging.getLogger(__name__)

RECENT_STEPS = 8


class TTFTBudget:
    """Estimates the part of a request's time to first token that isn't the blend: forwards over the question and other
    requests' tokens, and vLLM's own work. It is the median of the last blends, and 0 before the first. There is one for
    blends of a single step, and one for those in pieces, which have other requests' steps in between.
    """

    def __init__(self) -> None:
        self._beside_ms: deque[float] = deque(maxlen=RECENT_STEPS)

    def budget_ms(self, request: Request, max_ttft_ms: float) -> float:
        """The time from now to the end of its blend; negative where it is too late."""
        waited_ms: float = 1e3 * (time.time() - request.arrival_time)
        beside_ms = statistics.median(self._beside_ms) if self._beside_ms else 0.0
        return max_ttft_ms - waited_ms - beside_ms

    def note(self, passed_ms: float, blends_ms: float) -> None:
        self._beside_ms.append(max(0.0, passed_ms - blends_ms))


@dataclass
class BlendBudget:
    """What one step may blend: short blends of about `step_tokens` together, at least one of them, and one piece of a
    long one. Both kinds go first come, first served, and neither waits for the other.
    """

    step_tokens: int
    num_spent_tokens: int = 0
    is_spent: bool = False
    long_one: _TrackedRequest | None = None

    def allows(self, num_tokens: int) -> bool:
        """Whether a blend of so many tokens may begin in this step. If a short one may not, no later short one may."""
        if self.is_long(num_tokens):
            return self.long_one is None
        self.is_spent |= self.num_spent_tokens > 0 and self.num_spent_tokens + num_tokens > self.step_tokens
        return not self.is_spent

    def is_long(self, num_tokens: int) -> bool:
        return num_tokens > self.step_tokens

    def spend(self, tracked: _TrackedRequest) -> None:
        if self.is_long(tracked.num_tokens_to_run):
            self.long_one = tracked
        else:
            self.num_spent_tokens += tracked.num_tokens_to_run

    def end_blend(self, tracked: _TrackedRequest) -> None:
        if self.long_one is tracked:
            self.long_one = None

    def end_step(self) -> None:
        self.num_spent_tokens, self.is_spent = 0, False


class Admission:
    """Whether a chunk that no request brought before is kept.

    While the store loses chunks it is full, and one that comes only once would push out one that comes often. Then only
    those that come a second time are kept (as TinyLFU does, Einziger et al., arXiv 1512.00727); an LRU store by itself
    would be flushed by new text. A store that lost even what was just used was emptied or restarted, and has room: what
    it had until then doesn't count.
    """

    RECENT_CHUNKS = 256
    FULL_RATIO = 0.05
    JUST_USED_CHUNKS = 64
    REMEMBERED_CHUNKS = 65_536

    def __init__(self) -> None:
        self._lost: deque[bool] = deque(maxlen=self.RECENT_CHUNKS)
        self._held: OrderedDict[ChunkKey, None] = OrderedDict()
        self._seen: OrderedDict[ChunkKey, None] = OrderedDict()

    def note(self, known: Collection[Chunk], lost: Collection[Chunk]) -> None:
        """The store had lost some of a prompt's known chunks. It has them again now."""
        just_used = set(itertools.islice(reversed(self._held), self.JUST_USED_CHUNKS))
        if any(chunk.key in just_used for chunk in lost):
            self._held.clear()
            self._lost.clear()
        self._lost.extend(chunk in lost and chunk.key in self._held for chunk in known)
        for chunk in known:
            self._remember(self._held, chunk)

    def admits(self, chunk: Chunk) -> bool:
        is_full = sum(self._lost) >= self.FULL_RATIO * self.RECENT_CHUNKS
        if is_full and chunk.key not in self._seen:
            self._remember(self._seen, chunk)
            return False
        if is_full:
            del self._seen[chunk.key]
        self._remember(self._held, chunk)
        return True

    def _remember(self, chunks: OrderedDict[ChunkKey, None], chunk: Chunk) -> None:
        chunks[chunk.key] = None
        chunks.move_to_end(chunk.key)
        if len(chunks) > self.REMEMBERED_CHUNKS:
            chunks.popitem(last=False)


@dataclass(eq=False)
class _TrackedRequest:
    """A request from its arrival to its end. `answer` is what its response carries, filled in as it becomes known.

    `wanted` is the part of the plan that is blended, `known` those of its chunks that earlier requests brought;
    `num_unknown_chunks` counts the others, which no store can have. `num_tokens_to_run` is an estimate for its blend.
    `num_computed_tokens` is vLLM's figure at the end, which holds only while the request isn't blending.
    """

    request: Request
    params: RequestParams
    token_ids: TokenIds
    plan: ReusePlan
    report: RequestReport
    segments: Sequence[Segment]
    num_local_tokens: int = 0
    wanted: ReusePlan = field(default_factory=ReusePlan)
    known: frozenset[Chunk] = frozenset()
    prefill_stats: PrefillStats | None = None
    num_tokens_to_run: int = 0
    allocated_s: float = 0.0
    num_unknown_chunks: int = 0
    is_blending: bool = False
    num_computed_tokens: int = 0
    answer: dict[str, Any] = field(default_factory=dict)

    @property
    def num_done_tokens(self) -> int:
        """How many of its prompt's tokens have their KV, or had it before a preemption."""
        blend = self.report.blend or BlendReport()
        blended = blend.num_reused_tokens + blend.num_recomputed_tokens + blend.num_computed_tokens
        return max(self.report.num_prefix_tokens + blended, self.num_computed_tokens)


class SchedulerConnector:
    """`refusal`, once set: why nothing is blended, and every prompt is left to vLLM.

    `max_step_tokens`: how many tokens vLLM itself runs in a step.
    """

    def __init__(self, config: BlendConfig, model: str, tokenizer: Any, block_size: int, max_step_tokens: int) -> None:
        self.refusal = ""
        self._config = config
        self._block_size = block_size
        sink = prompt_beginning(tokenizer, config.sink_tokens)
        self._known = KnownChunks(config.index_path if config.store == "lmcache" else "", model, sink)
        self._planner = Planner(self._known.index, min_chunk_tokens=config.min_chunk_tokens, sink=sink)
        self._segmenter = Segmenter(tokenizer, config.separator)
        self._tracked: dict[str, _TrackedRequest] = {}
        self._jobs: list[BlendJob] = []
        self._budget = BlendBudget(config.step_tokens or max_step_tokens)
        self._ttft_budgets = {is_long: TTFTBudget() for is_long in (False, True)}
        self._trusts_store = True
        self._admission = Admission()
        self._epoch = ""
        self._finished: list[_TrackedRequest] = []

    def on_new_request(self, request: Request) -> None:
        """Plan the prompt, and set the request's approximate KV apart before vLLM looks for cached blocks."""
        begun_s = time.perf_counter()
        params = self._read_params(request)
        token_ids = as_token_ids(request.prompt_token_ids or [])
        segments: Sequence[Segment] = ()
        plan = ReusePlan()
        if not self.refusal and _is_plain_text(request):
            segments = self._segmenter.segments(token_ids, params.chunks)
            plan = self._plan(request, params, token_ids, segments)
        approximate = not (plan.is_prefix or params.recomputes_all)
        report = RequestReport(
            _answer_id(request.request_id), params.blend, approximate, request.num_prompt_tokens, params.max_ttft_ms
        )
        report.lookup_ms = 1e3 * (time.perf_counter() - begun_s)
        self._tracked[request.request_id] = _TrackedRequest(request, params, token_ids, plan, report, segments)
        if approximate or params.store_all:
            _give_own_salt(request, params)

    def num_matched_tokens(self, request: Request, num_local_tokens: int) -> tuple[int | None, bool]:
        """For how many tokens after those of the prefix cache a blend will write the KV, and whether the request waits
        for it while others go on. None: ask again in the next step.
        """
        tracked = self._tracked[request.request_id]
        if self.refusal:
            return 0, False
        if self._stands_on_unfinished_blocks(tracked, num_local_tokens):
            return None, False
        tracked.num_local_tokens = num_local_tokens
        # A prompt that grew, as they do in vLLM's streaming-input sessions, begins with what was planned.
        last, recomputes_none = len(tracked.token_ids) - 1, tracked.params.recomputes_none
        end = self._planner.blend_end(tracked.plan, num_local_tokens, last, recomputes_none=recomputes_none)
        if end <= num_local_tokens:
            return 0, False
        num_tokens = tracked.num_tokens_to_run = self._num_tokens_to_run(tracked, num_local_tokens, end)
        if not self._budget.allows(num_tokens):
            return None, False
        return end - num_local_tokens, self._budget.is_long(num_tokens)

    def after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        tracked = self._tracked[request.request_id]
        start = tracked.num_local_tokens
        end = start + num_external_tokens
        if request.num_preemptions == 0:
            tracked.report.num_prefix_tokens = start
        if tracked.prefill_stats is None:
            self._note_first_allocation(tracked, end)
        if num_external_tokens == 0:
            return
        task = self._task(tracked, start, end)
        self._budget.spend(tracked)
        tracked.is_blending = True
        tracked.allocated_s = time.perf_counter()
        piece_tokens = self._budget.step_tokens if self._is_long(tracked) else None
        token_ids, token_scores = tracked.token_ids[:end], tracked.params.token_scores
        self._jobs.append(
            BlendJob(request.request_id, token_ids, blocks.get_block_ids(), task, piece_tokens, token_scores)
        )

    def _note_first_allocation(self, tracked: _TrackedRequest, end: int) -> None:
        tracked.prefill_stats = tracked.request.prefill_stats
        _tell_reused(tracked, 0)
        waited_ms = 1e3 * (time.time() - tracked.request.arrival_time)
        tracked.report.queue_ms = max(0.0, waited_ms - tracked.report.lookup_ms)
        tracked.report.misses += self._not_looked_up(tracked, end)

    def _task(self, tracked: _TrackedRequest, start: int, end: int) -> BlendTask:
        """Of `[start, end)`. Its new chunks are known from now on."""
        params, plan = tracked.params, tracked.plan.clipped(start, end)
        known = frozenset(span.chunk for span in plan if span.chunk in self._known.index)
        tracked.num_unknown_chunks = len({span.chunk for span in plan} - known)
        if tracked.report.blend is None:
            tracked.wanted, tracked.known = plan, known
            tracked.report.in_pieces = self._is_long(tracked)
        blend, budget_ms = self._ratio_or_budget(tracked)
        return BlendTask(
            plan,
            start,
            end,
            # A prompt that is scored is computed whole, also where it turns out that it can't be.
            make_policy(BlendParams("all") if params.store_scores else blend),
            store_new=params.store_new,
            unadmitted=self._admit(params, plan) if params.store_new else frozenset(),
            budget_ms=budget_ms,
            scores=params.store_scores,
            seams=self._seams(tracked),
            makes_seams=params.store_seams,
        )

    def _seams(self, tracked: _TrackedRequest) -> dict[int, Span]:
        if not (self._config.seams or tracked.params.store_seams):
            return {}
        return self._planner.seams(tracked.plan, tracked.token_ids)

    def _admit(self, params: RequestParams, plan: ReusePlan) -> frozenset[Chunk]:
        """Makes a plan's chunks known; returns those that aren't to be kept."""
        new = [s.chunk for s in plan if s.is_whole_chunk and s.chunk not in self._known.index]
        unadmitted = frozenset(chunk for chunk in new if not (params.store_all or self._admission.admits(chunk)))
        self._known.add(*(chunk for chunk in new if chunk not in unadmitted))
        return unadmitted

    def take_jobs(self) -> BlendJobs:
        jobs, self._jobs = self._jobs, []
        self._budget.end_step()
        return BlendJobs(jobs, self._epoch)

    def on_reports(self, reports: BlendReports) -> None:
        """Of the blends that ended in this step. They come after the requests that finished in it: the answers of these
        are completed here.
        """
        finished = {tracked.request.request_id: tracked for tracked in self._finished}
        ended = {
            tracked: blend
            for name, blend in reports.reports.items()
            if (tracked := self._tracked.get(name) or finished.get(name))
        }
        for tracked, blend in ended.items():
            self._end_blend(tracked, blend)
        for is_long, budget in self._ttft_budgets.items():
            # An aborted blend's report is empty, and its time says nothing.
            own = {t: blend.blend_ms for t, blend in ended.items() if blend.blend_ms and self._is_long(t) == is_long}
            if own:
                passed_ms = 1e3 * (time.perf_counter() - min(tracked.allocated_s for tracked in own))
                budget.note(passed_ms, sum(own.values()))

    def request_finished(self, request: Request) -> dict[str, Any] | None:
        """What the response carries; the dictionary is completed by `on_reports` before it is sent."""
        tracked = self._tracked.pop(request.request_id, None)
        if tracked is None:
            return None
        tracked.report.num_prompt_tokens = request.num_prompt_tokens
        if not tracked.is_blending:
            tracked.num_computed_tokens = min(request.num_computed_tokens, request.num_prompt_tokens)
        tracked.answer.update(tracked.report.as_dict())
        self._finished.append(tracked)
        return {"kvarena": tracked.answer}

    def take_stats(self) -> BlendStats | None:
        """Reports of the requests that have finished, each once, and after its blend has ended. Aborted ones count as
        far as they got.
        """
        finished = [tracked for tracked in self._finished if not tracked.is_blending]
        self._finished = [tracked for tracked in self._finished if tracked.is_blending]
        for tracked in finished:
            if tracked.request.status == RequestStatus.FINISHED_ABORTED:
                tracked.report.num_prompt_tokens = tracked.num_done_tokens
        reports = [tracked.report.as_dict() for tracked in finished if tracked.report.num_prompt_tokens]
        return BlendStats.of(reports) if reports else None

    def reset(self) -> None:
        """Forget what is stored: it may be of weights that have changed."""
        self._known.clear()
        self._admission = Admission()
        self._epoch = uuid.uuid4().hex[:12]

    def close(self) -> None:
        self._known.close()

    def _read_params(self, request: Request) -> RequestParams:
        try:
            return read_request_params(request.kv_transfer_params, self._config.params, self._config.max_ttft_ms)
        except ValueError as error:
            logger.error("request %s: %s; default settings are used", request.request_id, error)
            return RequestParams(self._config.params, self._config.max_ttft_ms)

    def _ratio_or_budget(self, tracked: _TrackedRequest) -> tuple[BlendParams, float | None]:
        """What decides on a blend's ratio: its parameters, or a time. After a preemption it is what it was the first
        time.
        """
        blend, max_ttft_ms, before = tracked.params.blend, tracked.params.max_ttft_ms, tracked.report.blend
        if max_ttft_ms is None:
            return blend, None
        if before and before.ratio is not None:
            return replace(blend, ratio=before.ratio), None
        return blend, self._ttft_budgets[self._is_long(tracked)].budget_ms(tracked.request, max_ttft_ms)

    def _end_blend(self, tracked: _TrackedRequest, blend: BlendReport) -> None:
        tracked.is_blending = False
        self._budget.end_blend(tracked)
        if blend.store_hits or blend.store_misses:
            self._trusts_store = blend.store_misses <= tracked.num_unknown_chunks
        if tracked.report.blend is not None:  # it was preempted, and blended once more
            return
        tracked.report.blend = blend
        misses = self._misses(tracked, blend)
        tracked.report.misses += misses
        lost = {miss.start for miss in misses if miss.reason == "evicted"}
        self._admission.note(tracked.known, {span.chunk for span in tracked.wanted if span.start in lost})
        _tell_reused(tracked, blend.num_reused_tokens)
        if tracked.answer:
            tracked.answer.update(tracked.report.as_dict())

    def _is_long(self, tracked: _TrackedRequest) -> bool:
        return self._budget.is_long(tracked.num_tokens_to_run)

    def _num_tokens_to_run(self, tracked: _TrackedRequest, start: int, end: int) -> int:
        """About how many tokens a blend runs through the model: those of no chunk, those of chunks that aren't stored
        yet, and the share that is recomputed, taken for all where a time decides. After a blend that missed known
        chunks, the store may have lost everything.
        """
        if tracked.params.recomputes_all:
            return end - start
        if tracked.params.store_seams:  # each chunk, and the one before it
            return 2 * (end - start)
        plan = tracked.plan.clipped(start, end)
        stored = sum(len(span) for span in plan if self._trusts_store and span.chunk in self._known.index)
        policy = make_policy(tracked.params.blend).settled()
        is_sure = policy.ratio is not None and tracked.params.max_ttft_ms is None
        ratio = 0.0 if policy.recomputes_none else policy.ratio if is_sure else 1.0
        return end - start - stored + share_of(plan.num_reused_tokens, ratio or 0.0)

    def _not_looked_up(self, tracked: _TrackedRequest, end: int) -> list[Miss]:
        """Chunks after the prefix cache's tokens that aren't blended. The prompt's beginning is no chunk."""
        low, shortest = max(1, tracked.num_local_tokens), self._config.min_chunk_tokens
        short = [segment for segment in tracked.segments if segment[0] >= low and segment[1] - segment[0] < shortest]
        beyond = [span for span in tracked.plan if span.start >= end]
        return [
            *(Miss(*segment, "too_short") for segment in short),
            *(Miss(span.start, span.end, "mostly_new") for span in beyond),
        ]

    def _misses(self, tracked: _TrackedRequest, blend: BlendReport) -> list[Miss]:
        """Why the store lacked chunks: it tells whether it failed, and the known chunks tell the rest."""
        if not blend.misses:
            return []
        spans = {span.start: span for span in tracked.wanted}
        missing = [spans[start].chunk for start, _, why in blend.misses if why == "not_stored"]
        named = self._segmenter.texts(tracked.params.chunks)
        of_other_models = self._known.of_other_models([chunk for chunk in missing if chunk not in tracked.known])

        def reason(span: Span) -> MissReason:
            if span.chunk in tracked.known:
                return "evicted"
            if span.chunk.key in of_other_models:
                return "other_model"
            if span.chunk.salt and replace(span.chunk, salt="") in self._known.index:
                return "other_salt"
            start = span.start - span.offset
            is_cut = self._segmenter.is_cut(tracked.token_ids, start, start + len(span.chunk), named)
            return "boundary_inside_token" if is_cut else "never_seen"

        return [
            Miss(start, end, "store_down" if why == "store_down" else reason(spans[start]))
            for start, end, why in blend.misses
        ]

    def _plan(
        self, request: Request, params: RequestParams, token_ids: TokenIds, segments: Sequence[Segment]
    ) -> ReusePlan:
        self._known.refresh()
        planner = replace(self._planner, min_coverage=math.inf) if params.store_all else self._planner
        return planner.plan(token_ids, segments, chunk_salt(request.cache_salt))

    def _stands_on_unfinished_blocks(self, tracked: _TrackedRequest, num_local_tokens: int) -> bool:
        """Whether the prefix cache offers blocks that another request only fills in this step's forward. For vLLM that
        is soon enough, as its forward fills them layer by layer; a blend runs before it.
        """
        blocks = tracked.request.block_hashes[: num_local_tokens // self._block_size]
        running = (t.request for t in self._tracked.values() if t.request.status == RequestStatus.RUNNING)
        return any(_is_filling_one_of(other, blocks, self._block_size) for other in running)


def _is_filling_one_of(other: Request, blocks: Sequence[bytes], block_size: int) -> bool:
    ready = other.num_computed_tokens // block_size
    return ready < min(len(blocks), len(other.block_hashes)) and bool(other.block_hashes[ready] == blocks[ready])


def _tell_reused(tracked: _TrackedRequest, num_reused_tokens: int) -> None:
    """Correct the answer's `cached_tokens`: vLLM counts all that a connector gives as cached, but a blend computes most
    of a new prompt. What it reused is known after the step, before the answer's first token is sent.
    """
    stats = tracked.prefill_stats
    if stats is not None:
        stats.set(stats.num_prompt_tokens, stats.num_local_cached_tokens, num_reused_tokens)
        stats.num_cache_creation_tokens = max(0, stats.num_cache_creation_tokens - num_reused_tokens)


def _answer_id(request_id: str) -> str:
    """The id that the client sees: the engine appends a dash and eight random characters."""
    return request_id if envs.VLLM_DISABLE_REQUEST_ID_RANDOMIZATION else request_id.rpartition("-")[0]


def _is_plain_text(request: Request) -> bool:
    """Whether this prompt's KV depends on its token ids alone, and may come from a cache."""
    return bool(
        request.prompt_token_ids
        and request.prompt_embeds is None
        and not request.mm_features
        and request.pooling_params is None
        and not request.skip_reading_prefix_cache
    )


def chunk_salt(cache_salt: str | None) -> str:
    """A request's salt for its chunks: those of another salt are neither found nor used."""
    return hashlib.blake2b(cache_salt.encode(), digest_size=16).hexdigest() if cache_salt else ""


def _give_own_salt(request: Request, params: RequestParams) -> None:
    within = "" if params.max_ttft_ms is None else f" within {params.max_ttft_ms} ms"
    alone = f" of {request.request_id}" if params.store_all else ""
    request.cache_salt = f"{request.cache_salt or ''}\0kvarena {params.blend}{within}{alone}"
    request.block_hashes.clear()
    request.update_block_hashes()
