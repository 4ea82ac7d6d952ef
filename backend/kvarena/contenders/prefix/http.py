"""The prefix contender's own paths: one plain generation with its timings, and the cache's figures."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, ConfigDict, Field, StrictBool

from kvarena.contenders.prefix.cache import PrefixCacheStats
from kvarena.contenders.prefix.engine import PrefixEngine, PrefixOptions
from kvarena.engines.base import GenerationRequest, Sampling
from kvarena.server.protocol import INT64, RequestModel
from kvarena.server.requests import JsonRoute
from kvarena.server.responses import ClientWatch, GenerationGroup
from kvarena.server.runner import Ended
from kvarena.server.state import ERRORS, ServerDep, engine_of
from kvarena.server.text import StopRule

router = APIRouter(route_class=JsonRoute)


EngineDep = Annotated[PrefixEngine, Depends(engine_of(PrefixEngine))]


class GenerateRequest(RequestModel):
    """`prompt` is plain text; chats go to `/v1/chat/completions`. Fields of other servers are ignored."""

    model_config = ConfigDict(extra="ignore")

    prompt: str
    max_new_tokens: int = Field(128, ge=1, lt=2**31)
    use_cache: StrictBool = True
    use_prefix_cache: StrictBool = True
    temperature: float = Field(0.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = Field(None, ge=-INT64, lt=INT64)
    ignore_eos: StrictBool = False
    cache_salt: str = Field("", max_length=1024)


class GenerateAnswer(BaseModel):
    text: str
    finish_reason: Literal["stop", "length"]
    num_prompt_tokens: int
    num_answer_tokens: int
    latency_ms: float
    tokens_per_sec: float
    cache_enabled: bool
    prefix_cache_hit: bool
    prefix_cache_reason: str | None
    timings: dict[str, int | float]


@dataclass(frozen=True)
class CacheStats(PrefixCacheStats):
    """`cache_size`: whole prefixes, with their logits; `num_bytes` is what they and all between them take.

    `evictions_lru`, `evictions_ttl` and `cached_tokens_reused` are `evictions`, `expirations` and `tokens_saved` under
    names that clients may expect.
    """

    store_errors: int
    evictions_lru: int
    evictions_ttl: int
    cached_tokens_reused: int


@router.post("/generate", responses=ERRORS)
async def generate(body: GenerateRequest, request: Request, server: ServerDep) -> GenerateAnswer:
    name = request.state.request_id
    answer = GenerationGroup(server, name, [_generation_request(body, name)], StopRule(), 1)
    texts: list[str] = []
    with ClientWatch(request, answer):
        async for _, event in answer.events():
            if not isinstance(event, Ended):
                texts.append(event.text)
                continue
            outcome = event.outcome
            break
    assert outcome.finish_reason is not None, "events() raises for what didn't finish"
    details = outcome.report.details
    total_ms = details["timings"]["total_ms"]
    return GenerateAnswer(
        text="".join(texts),
        finish_reason=outcome.finish_reason,
        num_prompt_tokens=outcome.report.num_prompt_tokens,
        num_answer_tokens=outcome.num_tokens,
        latency_ms=total_ms,
        tokens_per_sec=round(1000 * outcome.num_tokens / total_ms, 3),
        cache_enabled=details["cache_enabled"],
        prefix_cache_hit=details["prefix_cache_hit"],
        prefix_cache_reason=details["prefix_cache_reason"],
        timings=details["timings"],
    )


def _generation_request(body: GenerateRequest, request_id: str) -> GenerationRequest:
    return GenerationRequest(
        request_id=request_id,
        prompt=body.prompt,
        sampling=Sampling(
            max_tokens=body.max_new_tokens,
            temperature=body.temperature,
            top_p=body.top_p,
            seed=body.seed,
            ignore_eos=body.ignore_eos,
        ),
        http_request_id=request_id,
        cache_salt=body.cache_salt,
        options=PrefixOptions(use_cache=body.use_cache, use_prefix_cache=body.use_prefix_cache),
    )


@router.get("/cache/stats")
async def cache_stats(engine: EngineDep) -> CacheStats:
    stats = engine.cache.stats()
    return CacheStats(
        **asdict(replace(stats, hit_rate=round(stats.hit_rate, 4))),
        store_errors=engine.num_store_errors,
        evictions_lru=stats.evictions,
        evictions_ttl=stats.expirations,
        cached_tokens_reused=stats.tokens_saved,
    )


@router.post("/cache/clear")
async def clear_cache(engine: EngineDep) -> dict[str, Any]:
    """Forgets all prefixes, and says how much that was. The counts go on: they are since the start."""
    dropped = engine.cache.clear()
    return {"status": "success", "cleared": True, "cache_size": dropped.cache_size, "num_bytes": dropped.num_bytes}
