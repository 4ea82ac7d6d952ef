"""The connector in the scheduler: what of a new prompt can be reused, in which blocks, and what came of it.

| tokens of a prompt | who fills their KV |
|---|---|
| `[0, L)` | vLLM's prefix cache |
| `[L, E)` | a blend job, before the step's forward |
| `[E, n)`, at least one token | vLLM's own prefill |

Blended KV is approximate and stays in vLLM's prefix cache under a salt of its own, one for each setting, so a
follow-up finds it and no exact request ever does.
"""

from __future__ import annotations

import hashlib
import logging
import statistics
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from vllm import envs
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.request import Request, RequestStatus

from kvarena.core.matching import Planner, Segmenter
from kvarena.core.plan import ReusePlan, TokenIds, as_token_ids
from kvarena.engines.vllm.config import BlendConfig, RequestParams, read_request_params
from kvarena.engines.vllm.messages import BlendJob, BlendJobs, BlendReports, BlendStats, RequestReport
from kvarena.policies.params import BlendParams
from kvarena.stores.sqlite import KnownChunks

RECENT_STEPS = 8


class TTFTBudget:
    """Knows how long a step takes beside its blends: its forward, over the question and other requests' tokens, and
    vLLM's own work. The median of the last steps with blends counts; before the first it is taken for nothing.
    """

    def __init__(self) -> None:
        self._beside_ms: deque[float] = deque(maxlen=RECENT_STEPS)

    def budget_ms(self, request: Request, max_ttft_ms: float) -> float:
        """From now to the end of its blend. Negative where it is too late."""
        waited_ms: float = 1e3 * (time.time() - request.arrival_time)
        beside_ms = statistics.median(self._beside_ms) if self._beside_ms else 0.0
        return max_ttft_ms - waited_ms - beside_ms

    def note(self, step_ms: float, blends_ms: float) -> None:
        self._beside_ms.append(max(0.0, step_ms - blends_ms))


logger = logging.getLogger(__name__)


@dataclass(eq=False)
class _TrackedRequest:
    """A request from its arrival to its end. `answer` is what its response carries, filled in as it becomes known."""

    request: Request
    params: RequestParams
    token_ids: TokenIds
    plan: ReusePlan
    report: RequestReport
    num_local_tokens: int = 0
    allocated_s: float = 0.0
    answer: dict[str, Any] = field(default_factory=dict)


class SchedulerConnector:
    """`refusal`, once set: why nothing is blended, so that every prompt is vLLM's own."""

    def __init__(self, config: BlendConfig, model: str, tokenizer: Any, block_size: int) -> None:
        self.refusal = ""
        self._config = config
        self._block_size = block_size
        self._known = KnownChunks(config.index_path if config.store == "lmcache" else "", model)
        self._planner = Planner(self._known.index, min_chunk_tokens=config.min_chunk_tokens)
        self._segmenter = Segmenter(tokenizer, config.separator)
        self._tracked: dict[str, _TrackedRequest] = {}
        self._jobs: list[BlendJob] = []
        self._time_left = TTFTBudget()
        self._finished: list[_TrackedRequest] = []

    def on_new_request(self, request: Request) -> None:
        """Plan the prompt, and set the request's approximate KV apart before vLLM looks for cached blocks."""
        params = self._read_params(request)
        token_ids = as_token_ids(request.prompt_token_ids or [])
        plan = self._plan(request, params, token_ids) if self._may_blend(request) else ReusePlan()
        approximate = not (plan.is_prefix or params.recomputes_all)
        report = RequestReport(
            _answer_id(request.request_id), params.blend, approximate, request.num_prompt_tokens, params.max_ttft_ms
        )
        self._tracked[request.request_id] = _TrackedRequest(request, params, token_ids, plan, report)
        if approximate:
            _give_own_salt(request, params)

    def num_matched_tokens(self, request: Request, num_local_tokens: int) -> int | None:
        """For how many tokens after the prefix cache's a blend will write the KV. None: ask again in the next step."""
        tracked = self._tracked[request.request_id]
        if self.refusal:
            return 0
        if self._stands_on_unfinished_blocks(tracked, num_local_tokens):
            return None
        tracked.num_local_tokens = num_local_tokens
        end = self._planner.blend_end(tracked.plan, num_local_tokens, request.num_prompt_tokens - 1)
        return max(0, end - num_local_tokens)

    def after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        tracked = self._tracked[request.request_id]
        if request.num_preemptions == 0:
            tracked.report.num_prefix_tokens = tracked.num_local_tokens
        if num_external_tokens == 0:
            return
        start = tracked.num_local_tokens
        end = start + num_external_tokens
        if tracked.params.store_new:
            for span in tracked.plan.clipped(start, end):
                if span.is_whole_chunk:
                    self._known.add(span.chunk)
        tracked.allocated_s = time.perf_counter()
        blend, budget_ms = self._ratio_or_budget(tracked)
        self._jobs.append(
            BlendJob(
                request.request_id,
                tracked.token_ids[:end],
                blocks.get_block_ids(),
                start,
                end,
                tracked.plan.clipped(start, end),
                blend,
                tracked.params.store_new,
                budget_ms,
            )
        )

    def take_jobs(self) -> BlendJobs:
        jobs, self._jobs = self._jobs, []
        return BlendJobs(jobs)

    def on_reports(self, reports: BlendReports) -> None:
        """Reports of a step come after the requests that finished in it: their answers are completed here."""
        finished = {tracked.request.request_id: tracked for tracked in self._finished}
        blended = {self._tracked.get(name) or finished.get(name): blend for name, blend in reports.reports.items()}
        known = {tracked: blend for tracked, blend in blended.items() if tracked}
        for tracked, blend in known.items():
            if tracked.report.blend is None:
                tracked.report.blend = blend
                if tracked.answer:
                    tracked.answer.update(tracked.report.as_dict())
        if known:
            step_ms = 1e3 * (time.perf_counter() - min(tracked.allocated_s for tracked in known))
            self._time_left.note(step_ms, sum(blend.blend_ms for blend in reports.reports.values()))

    def request_finished(self, request: Request) -> dict[str, Any] | None:
        """What the response carries; the dictionary is completed by `on_reports` before it is sent."""
        tracked = self._tracked.pop(request.request_id, None)
        if tracked is None:
            return None
        self._jobs = [job for job in self._jobs if job.request_id != request.request_id]
        tracked.answer.update(tracked.report.as_dict())
        self._finished.append(tracked)
        if request.status == RequestStatus.FINISHED_ABORTED:
            self.take_stats()
        return {"kvarena": tracked.answer}

    def take_stats(self) -> BlendStats | None:
        """Reports of the requests that have finished, each once."""
        finished, self._finished = self._finished, []
        return BlendStats.of([tracked.report.as_dict() for tracked in finished]) if finished else None

    def clear(self) -> None:
        self._known.clear()

    def close(self) -> None:
        self._known.close()

    def _read_params(self, request: Request) -> RequestParams:
        try:
            return read_request_params(request.kv_transfer_params, self._config.params, self._config.max_ttft_ms)
        except ValueError as error:
            logger.error("request %s: %s; default settings are used", request.request_id, error)
            return RequestParams(self._config.params, self._config.max_ttft_ms)

    def _ratio_or_budget(self, tracked: _TrackedRequest) -> tuple[BlendParams, float | None]:
        """What decides on the ratio of a blend: its parameters, or a time. Blocks that were taken away from a request
        are filled again as they were the first time.
        """
        blend, max_ttft_ms, before = tracked.params.blend, tracked.params.max_ttft_ms, tracked.report.blend
        if max_ttft_ms is None:
            return blend, None
        if before and before.ratio is not None:
            return replace(blend, ratio=before.ratio), None
        return blend, self._time_left.budget_ms(tracked.request, max_ttft_ms)

    def _may_blend(self, request: Request) -> bool:
        return not self.refusal and _is_plain_text(request)

    def _plan(self, request: Request, params: RequestParams, token_ids: TokenIds) -> ReusePlan:
        self._known.refresh()
        segments = self._segmenter.segments(token_ids, params.chunks)
        return self._planner.plan(token_ids, segments, _chunk_salt(request))

    def _stands_on_unfinished_blocks(self, tracked: _TrackedRequest, num_local_tokens: int) -> bool:
        """Whether the prefix cache offers blocks that another request only fills in this step's forward.

        vLLM may share such blocks, for its own forward fills them layer by layer; a blend runs before it.
        """
        blocks = tracked.request.block_hashes[: num_local_tokens // self._block_size]
        running = (t.request for t in self._tracked.values() if t.request.status == RequestStatus.RUNNING)
        return any(_is_filling_one_of(other, blocks, self._block_size) for other in running)


def _is_filling_one_of(other: Request, blocks: Sequence[bytes], block_size: int) -> bool:
    ready = other.num_computed_tokens // block_size
    return ready < min(len(blocks), len(other.block_hashes)) and bool(other.block_hashes[ready] == blocks[ready])


def _answer_id(request_id: str) -> str:
    """The id that the client sees: the engine appends a dash and eight random characters."""
    return request_id if envs.VLLM_DISABLE_REQUEST_ID_RANDOMIZATION else request_id.rpartition("-")[0]


def _is_plain_text(request: Request) -> bool:
    """Whether the KV of this prompt follows from its token ids and may be served from a cache."""
    return bool(
        request.prompt_token_ids
        and request.prompt_embeds is None
        and not request.mm_features
        and request.pooling_params is None
        and not request.skip_reading_prefix_cache
    )


def _chunk_salt(request: Request) -> str:
    """Chunks of one salt and one LoRA adapter are neither found nor used by another."""
    parts = [request.cache_salt or "", request.lora_request.lora_name if request.lora_request else ""]
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest() if any(parts) else ""


def _give_own_salt(request: Request, params: RequestParams) -> None:
    within = "" if params.max_ttft_ms is None else f" within {params.max_ttft_ms} ms"
    request.cache_salt = f"{request.cache_salt or ''}\0kvarena {params.blend}{within}"
    request.block_hashes.clear()
    request.update_block_hashes()
