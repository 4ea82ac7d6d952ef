"""The connector in a worker: blends each new prompt into vLLM's paged cache before the step's own forward.

`model_id` names a model's KV: two servers share chunks only when their weights and number format are the same.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from pathlib import Path
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import KVCacheConfig

from kvarena.core.blend import Blender
from kvarena.core.store import ChunkStore
from kvarena.engines.vllm.config import BlendConfig
from kvarena.engines.vllm.messages import BlendJobs, BlendReports
from kvarena.engines.vllm.model import VllmModel, rank_name
from kvarena.engines.vllm.plugin import loaded_model
from kvarena.policies.params import make_policy
from kvarena.stores.memory import MemoryStore
from kvarena.stores.tensor_parallel import TensorParallelStore

_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".gguf"}
_LAYOUT_VERSION = 1


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


logger = logging.getLogger(__name__)


class WorkerConnector:
    """Made before the KV cache is; the model is taken up once the cache is there (`attach`)."""

    def __init__(self, config: BlendConfig, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> None:
        self._config = config
        self._vllm_config = vllm_config
        self._kv_cache_config = kv_cache_config
        self._engine: VllmModel | None = None
        self._blender: Blender | None = None
        self._reports = BlendReports({})
        self.refusal = ""

    def attach(self) -> None:
        """Raises `ValueError` for a model that can't be blended, or keeps the reason as `refusal`, as is set."""
        try:
            self._engine = VllmModel(loaded_model(), self._vllm_config, self._kv_cache_config)
        except ValueError as error:
            self.refusal = f"{self._vllm_config.model_config.model} can't be blended: {error}"
            if self._config.unsupported == "refuse":
                hint = "--blend-unsupported plain serves it without blending"
                raise ValueError(f"{self.refusal}; {hint}") from error
            logger.warning("%s; it is served without blending", self.refusal)
            return
        self._blender = Blender(TensorParallelStore(self._make_store(self._engine), self._engine.ranks))
        logger.info("blending %d layers over the %s store", len(self._engine.layers), self._config.store)

    def blend(self, work: BlendJobs) -> None:
        if not work.jobs:
            return
        assert self._engine is not None, "a blend before the KV cache was registered"
        assert self._blender is not None, "a blend without a store"
        start_s = time.perf_counter()
        for job in work.jobs:
            left_ms = None if job.budget_ms is None else job.budget_ms - 1e3 * (time.perf_counter() - start_s)
            prompt = self._engine.prompt(job.token_ids, job.block_ids, job.start)
            report = self._blender.blend(
                prompt,
                job.plan,
                job.start,
                job.end,
                make_policy(job.params),
                store_new=job.store_new,
                budget_ms=left_ms,
            )
            if report.blend_failures:
                logger.error("request %s: its blend failed, see above; all of its tokens were computed", job.request_id)
            self._reports.reports[job.request_id] = report

    def take_reports(self) -> BlendReports | None:
        taken, self._reports = self._reports, BlendReports({})
        return taken if taken.reports else None

    def clear(self) -> None:
        if self._blender:
            self._blender.clear()

    def close(self) -> None:
        if self._blender:
            self._blender.close()

    def _make_store(self, engine: VllmModel) -> ChunkStore:
        if self._config.store == "memory":
            return MemoryStore(self._config.store_bytes)
        from kvarena.stores.lmcache import KVGeometry, LMCacheStore

        geometry = KVGeometry(
            f"kvarena-{model_id(self._vllm_config)}{rank_name()}",
            len(engine.layers),
            engine.num_kv_heads,
            engine.head_size,
            engine.dtype,
        )
        url, http_url = self._config.lmcache_url, self._config.lmcache_http_url
        return LMCacheStore(geometry, url, http_url, timeout_s=self._config.lmcache_timeout_s)
