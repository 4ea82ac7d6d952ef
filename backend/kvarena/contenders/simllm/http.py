"""The Sim-LLM contender's own paths: what is kept of earlier tasks, and forgetting it.

They run in threads of their own: a search may hold the tasks' lock for longer than the event loop can wait.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends
from pydantic import BaseModel

from kvarena.contenders.simllm.engine import SimLLMEngine
from kvarena.server.state import engine_of

router = APIRouter()


EngineDep = Annotated[SimLLMEngine, Depends(engine_of(SimLLMEngine))]


class AutoThresholdStats(BaseModel):
    """What "auto" chose and why, as `similarity.py` explains it; `threshold` None: nothing is reused."""

    threshold: float | None
    target_agreement: float
    confidence: float
    num_samples: int
    num_samples_above: int
    agreement: float | None
    agreement_bound: float | None


class TaskStats(BaseModel):
    """Counts since the start, or since tasks were last cleared; `num_damaged` entries were dropped as unusable.

    `similarity_threshold` None: nothing is similar enough at present. `auto_threshold` None: it doesn't change.
    """

    cache_size: int
    max_cache_size: int
    num_bytes: int
    max_cache_bytes: int
    similarity_threshold: float | None
    num_searches: int
    num_hits: int
    num_misses: int
    candidates_per_search: float
    probes_per_search: float
    hit_ratio: float
    num_evictions: int
    num_damaged: int
    auto_threshold: AutoThresholdStats | None


@router.get("/tasks/stats")
def task_stats(engine: EngineDep) -> TaskStats:
    return TaskStats.model_validate(engine.simllm.manager.get_statistics())


@router.post("/tasks/clear")
def clear_tasks(engine: EngineDep) -> dict[str, Any]:
    """Forgets all tasks and counts; running requests keep what they hold."""
    engine.simllm.reset_cache()
    return {"cleared": True}
