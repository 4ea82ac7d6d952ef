"""The connector in a worker: blends each new prompt into vLLM's paged cache before the step's own forward.

`model_id` names a model's KV: servers share chunks only if their weights and number format are the same.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import KVCacheConfig

from kvarena.core.blend import Blender
from kvarena.core.devices import is_device_failure
from kvarena.core.matching import sink_of
from kvarena.core.plan import Chunk, as_token_ids
from kvarena.core.prefilled_model import InPieces
from kvarena.core.report import BlendReport
from kvarena.core.store import ChunkMiss, ScoredStore
from kvarena.engines.vllm.config import BlendConfig
from kvarena.engines.vllm.messages import BlendJob, BlendJobs, BlendReports
from kvarena.engines.vllm.model import PagedPrompt, VllmModel, rank_name
from kvarena.engines.vllm.plugin import loaded_model
from kvarena.stores.memory import MemoryStore
from kvarena.stores.tensor_parallel import TensorParallelStore

logger = logging.getLogger(__name__)

_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".gguf"}
_LAYOUT_VERSION = 2


def model_id(vllm_config: Any) -> str:
    """`NAME-DIGEST`, without slashes, the same in every process, after every restart and wherever the folder is."""
    model = vllm_config.model_config
    described = {
        "layout": _LAYOUT_VERSION,
        "config": {key: value for key, value in model.hf_text_config.to_dict().items() if key != "_name_or_path"},
        "dtype": str(model.dtype),
        "quantization": model.quantization,
        "load_format": str(vllm_config.load_config.load_format),
        "seed": model.seed,
        "weights": _weights(model.model, model.revision),
    }
    digest = hashlib.blake2b(json.dumps(described, sort_keys=True, default=str).encode(), digest_size=8)
    return f"{Path(model.model).name}-{digest.hexdigest()}"


def _weights(model: str, revision: str | None) -> Any:
    """What tells one set of weights from another: files with size and time, or the hub's commit."""
    folder = Path(model)
    if folder.is_dir():
        files = sorted(path for path in folder.iterdir() if path.suffix in _WEIGHT_SUFFIXES)
        return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(model, "config.json", revision=revision)
    return [model, Path(cached).parent.name if isinstance(cached, str) else revision]


@dataclass
class _BlendUnderWay:
    """`pieces` have to be closed where they aren't run to the end."""

    request_id: str
    report: BlendReport
    pieces: InPieces[None]

    def run_piece(self) -> bool:
        """Whether it was the last."""
        with self.report.timed("blend_ms"):
            return next(self.pieces, "ended") == "ended"


class WorkerConnector:
    """Made before the KV cache; gets the model once the cache is there (`attach`)."""

    def __init__(self, config: BlendConfig, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> None:
        self._config = config
        self._vllm_config = vllm_config
        self._kv_cache_config = kv_cache_config
        self._engine: VllmModel | None = None
        self._blender: Blender | None = None
        self._reports = BlendReports({})
        self._under_way: _BlendUnderWay | None = None
        self._filled: set[str] = set()
        self._epoch = ""
        self.refusal = ""

    def attach(self) -> None:
        """For a model that can't be blended, raises `ValueError` or sets `refusal`, as the settings say."""
        try:
            self._engine = VllmModel(loaded_model(), self._vllm_config, self._kv_cache_config)
        except ValueError as error:
            self.refusal = f"{self._vllm_config.model_config.model} can't be blended: {error}"
            if self._config.unsupported == "refuse":
                hint = "--blend-unsupported plain serves it without blending"
                raise ValueError(f"{self.refusal}; {hint}") from error
            logger.warning("%s; it is served without blending", self.refusal)
            return
        self._blender = self._make_blender(self._engine)
        attention = "our own attention" if self._engine.chosen_attention else "vLLM's attention"
        logger.info(
            "blending %d layers over the %s store, with %s", len(self._engine.layers), self._config.store, attention
        )

    def blend(self, work: BlendJobs) -> None:
        """The jobs of one step, then a piece of the one that goes over several.

        Raises `SystemExit` where the device of one of several ranks has no memory or fails: the others wait for it in a
        collective, and vLLM raises the exceptions of one worker only. When a worker ends, it ends the engine at once.
        """
        try:
            self._blend(work)
        except Exception as error:
            if self._engine is None or self._engine.ranks.num_ranks == 1 or not is_device_failure(error):
                raise
            logger.exception("a blend failed on this rank's device; ending it, for the others can't go on without")
            raise SystemExit(1) from error

    def _blend(self, work: BlendJobs) -> None:
        if work.epoch != self._epoch:
            self._begin_epoch(work.epoch)
        start_s = time.perf_counter()
        for job in sorted(work.jobs, key=lambda job: job.piece_tokens is not None):
            begun = self._begin(job, start_s)
            if job.piece_tokens is None:
                while not begun.run_piece():
                    pass
                self._report(begun)
            else:
                assert self._under_way is None, "a second blend in pieces"
                self._under_way = begun
        if self._under_way and self._under_way.run_piece():
            self._end_pieces(self._under_way)

    def take_filled(self, finished: Collection[str]) -> set[str] | None:
        """Requests whose blocks nobody writes to any more, each once: those filled in pieces, and those that ended
        (`finished`) before that was done, of which nothing counts.
        """
        if self._under_way and self._under_way.request_id in finished:
            self._under_way.pieces.close()
            self._end_pieces(replace(self._under_way, report=BlendReport()))
        filled, self._filled = self._filled, set()
        return filled or None

    def _begin(self, job: BlendJob, start_s: float) -> _BlendUnderWay:
        """`start_s`: when the blends of this step began."""
        assert self._engine is not None, "a blend before the KV cache was registered"
        assert self._blender is not None, "a blend without a store"
        report, task = BlendReport(wants_scores=job.token_scores), job.task
        if task.budget_ms is not None:
            task = replace(task, budget_ms=task.budget_ms - 1e3 * (time.perf_counter() - start_s))
        prompt = PagedPrompt(self._engine, job.token_ids, job.block_ids, task.start)
        # What a filter leaves is one batch, also of a blend that is done in this step.
        max_tokens = self._engine.max_batch_tokens
        pieces = self._blender.in_pieces(prompt, task, report, min(job.piece_tokens or max_tokens, max_tokens))
        return _BlendUnderWay(job.request_id, report, pieces)

    def _end_pieces(self, ended: _BlendUnderWay) -> None:
        self._under_way = None
        self._filled.add(ended.request_id)
        self._report(ended)

    def _report(self, ended: _BlendUnderWay) -> None:
        if ended.report.blend_failures:
            logger.error("request %s: its blend failed, see above; all of its tokens were computed", ended.request_id)
        self._reports.reports[ended.request_id] = ended.report

    def missing(
        self, texts: Sequence[Sequence[int]], salt: str, sink: Sequence[int], scores: bool
    ) -> list[ChunkMiss | None]:
        """As `Blender.missing`, of chunks by their token ids and sink."""
        if self._blender is None:
            return ["not_stored"] * len(texts)
        after, all_ids = as_token_ids(sink), map(as_token_ids, texts)
        return self._blender.missing([Chunk(ids, salt, sink_of(ids, after)) for ids in all_ids], scores=scores)

    def take_reports(self) -> BlendReports | None:
        taken, self._reports = self._reports, BlendReports({})
        return taken if taken.reports else None

    def close(self) -> None:
        if self._under_way:
            self._under_way.pieces.close()
        if self._blender:
            self._blender.close()

    def _begin_epoch(self, epoch: str) -> None:
        """KV is kept under another name from now on, which no tier of a store has anything for."""
        self._epoch = epoch
        if self._engine is None or self._blender is None:
            return
        while self._under_way:
            if self._under_way.run_piece():
                self._end_pieces(self._under_way)
        self._blender.close()
        self._blender = self._make_blender(self._engine)

    def _make_blender(self, engine: VllmModel) -> Blender:
        return Blender(TensorParallelStore(self._make_store(engine), engine.ranks), engine.device)

    def _make_store(self, engine: VllmModel) -> ScoredStore:
        if self._config.store == "memory":
            return MemoryStore(self._config.store_bytes)
        from kvarena.stores.lmcache import KVGeometry, LMCacheStore

        geometry = KVGeometry(
            f"kvarena-{model_id(self._vllm_config)}{self._epoch}{rank_name()}",
            len(engine.layers),
            engine.num_kv_heads,
            engine.head_size,
            engine.dtype,
        )
        url, http_url = self._config.lmcache_url, self._config.lmcache_http_url
        timeout_s = self._config.lmcache_timeout_s
        return LMCacheStore(geometry, url, http_url, device=engine.device, timeout_s=timeout_s)
