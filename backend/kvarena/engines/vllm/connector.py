"""`KVArenaConnector`, the KV connector that vLLM loads by module path: it delegates to its scheduler or worker side.

One is built in the scheduler's process and one in each worker. A blend is complete before the step's forward, so there
is nothing to wait for in a layer or at the end of a step. A long one takes several steps, as one of vLLM's asynchronous
loads: its request waits, and others go on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorRole, SupportsHMA
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats
from vllm.tokenizers import cached_tokenizer_from_config
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import Request

from kvarena.core.store import ChunkMiss
from kvarena.engines.vllm.config import BlendConfig
from kvarena.engines.vllm.messages import BlendJobs, BlendPromMetrics, BlendRefusal, BlendReports, BlendStats
from kvarena.engines.vllm.scheduler import SchedulerConnector
from kvarena.engines.vllm.worker import WorkerConnector, model_id


class KVArenaConnector(KVConnectorBase_V1, SupportsHMA):
    """Blends known chunks into new prompts. Raises `ValueError` for unknown settings or an unsupported model."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        config = BlendConfig.from_extra_config(vllm_config.kv_transfer_config.kv_connector_extra_config)
        if role == KVConnectorRole.SCHEDULER:
            tokenizer = cached_tokenizer_from_config(vllm_config.model_config)
            block_size = vllm_config.cache_config.block_size
            max_step_tokens = vllm_config.scheduler_config.max_num_batched_tokens
            self._scheduler = SchedulerConnector(config, model_id(vllm_config), tokenizer, block_size, max_step_tokens)
        else:
            self._worker = WorkerConnector(config, vllm_config, kv_cache_config)

    # Worker

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self._worker.attach()

    def get_handshake_metadata(self) -> BlendRefusal | None:
        return BlendRefusal(self.refusal) if self.refusal else None

    @property
    def refusal(self) -> str:
        """Why this worker's model is served without blending; empty where it is blended."""
        return self._worker.refusal

    def missing(
        self, texts: Sequence[Sequence[int]], salt: str, sink: Sequence[int], scores: bool
    ) -> list[ChunkMiss | None]:
        """What the API server asks through `Worker.kvarena_missing`."""
        return self._worker.missing(texts, salt, sink, scores)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        jobs = self._get_connector_metadata()
        assert isinstance(jobs, BlendJobs)
        self._worker.blend(jobs)

    def wait_for_layer_load(self, layer_name: str) -> None:
        return

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        return

    def wait_for_save(self) -> None:
        return

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        return None, self._worker.take_filled(finished_req_ids)

    def build_connector_worker_meta(self) -> BlendReports | None:
        return self._worker.take_reports()

    # Scheduler

    def set_xfer_handshake_metadata(self, metadata: dict[int, Any]) -> None:
        for refusal in metadata.values():
            assert isinstance(refusal, BlendRefusal)
            self._scheduler.refusal = refusal.reason

    def on_new_request(self, request: Request) -> None:
        self._scheduler.on_new_request(request)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        return self._scheduler.num_matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        self._scheduler.after_alloc(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> BlendJobs:
        return self._scheduler.take_jobs()

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        reports = connector_output.kv_connector_worker_meta
        if isinstance(reports, BlendReports):
            self._scheduler.on_reports(reports)

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return False, self._scheduler.request_finished(request)

    def reset_cache(self) -> bool:
        """vLLM asks the scheduler's side only, after new weights, too. Workers hear of it with the next step."""
        self._scheduler.reset()
        return True

    # Both

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        return self._scheduler.take_stats() if self.role == KVConnectorRole.SCHEDULER else None

    def shutdown(self) -> None:
        if self.role == KVConnectorRole.SCHEDULER:
            self._scheduler.close()
        else:
            self._worker.close()

    # API server

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectorStats | None:
        return BlendStats(data or {"requests": []})

    @classmethod
    def build_prom_metrics(cls, *args: Any, **kwargs: Any) -> KVConnectorPromMetrics | None:
        return BlendPromMetrics(*args, **kwargs)
