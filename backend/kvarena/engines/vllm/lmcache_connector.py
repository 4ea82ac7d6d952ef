"""LMCache's own connector, for which a server that died or hangs costs speed only.

vLLM loads it by module path, into the contender `lmcache`, which is stock vLLM otherwise. It is no part of the blend.
"""

from __future__ import annotations

import time
from typing import Any

from lmcache.integration.vllm.lmcache_mp_connector import LMCacheMPConnector, LMCacheMPConnectorMetadata
from lmcache.integration.vllm.lmcache_mp_metadata import LMCacheMPRequestMetadata
from lmcache.integration.vllm.vllm_multi_process_adapter import send_ping
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.logger import init_logger
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import Request

logger = init_logger(__name__)


class FailSafeLMCacheConnector(LMCacheMPConnector):
    """Upstream's connector (LMCache 0.5.6), but no failure of LMCache leaves a call that vLLM makes in every step.

    An exception out of one of these ends vLLM's engine, and all requests with it. The differences, in the worker:

    - Before it loads or stores, it pings the server. Upstream asks right away what it asks: where the server hangs,
      vLLM waits for the whole time-out, and a store that the server then hears of after all reserves space that nobody
      fills, which LMCache gives to readers once this worker unregisters or is gone.
    - `wait_for_save`: a store that failed is not kept. Upstream raises, for example `LMCacheTimeoutError`.
    - `start_load_kv`: a load that failed is reported as failed, so that vLLM computes its blocks.
    - `get_finished`: a transfer that failed, or that had no answer within the time-out, is reported as failed. Upstream
      raises for the one and waits forever for the other: a server drops requests that it can't serve.
    - Each failure marks the server as unhealthy. Upstream's heartbeat marks it healthy again, and registers vLLM's
      memory anew before it does; until then upstream neither stores nor loads.

    A request that is aborted while it loads is reported as loaded, and that once. Upstream also reports it as stored:
    before the load has ended, so that vLLM gives its blocks to others while they are written to; or after it, so that
    vLLM looks for a request that it has dropped, and ends the engine.

    The scheduler's other calls are upstream's: each of them ends by itself, after the time-out at the latest, with the
    answer that nothing was found.

    What is lost needs `kv_load_failure_policy` to be "recompute"; vLLM's default ends the request. A start still needs
    a server that answers: raises `ConnectionError` where there is none. `ValueError` is raised for another policy, and
    with LoRA: LMCache finds an adapter's KV for the requests of another one.
    """

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        policy = vllm_config.kv_transfer_config.kv_load_failure_policy
        if policy != "recompute":
            raise ValueError(f"kv_load_failure_policy must be recompute, not {policy!r}: a lost load would be an error")
        if vllm_config.lora_config:
            raise ValueError("LMCache's keys don't tell the KV of different adapters (LoRA) apart")
        super().__init__(vllm_config, role, kv_cache_config)
        self._pending_since_s: dict[Any, float] = {}
        self._held: set[str] = set()
        """In the scheduler: finished requests whose blocks vLLM holds until it hears of them."""

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        loads = self._transfers("RETRIEVE")
        if not loads:
            return
        try:
            self._ask_server()
            super().start_load_kv(forward_context, **kwargs)
        except Exception as error:
            self._lose_server(error)
            for load in loads:
                if load.request_id not in self.worker_adapter.retrieve_futures:
                    self._report_failed(load)

    def wait_for_save(self) -> None:
        if not self._transfers("STORE"):
            super().wait_for_save()
            return
        try:
            self._ask_server()
            super().wait_for_save()
        except Exception as error:
            self._lose_server(error)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        try:
            self._check_pending()
        except Exception as error:
            self._lose_server(error)
        adapter = self.worker_adapter
        loading = {*adapter.retrieve_futures, *adapter._dropped_retrieves}
        finished: tuple[set[str] | None, set[str] | None] = super().get_finished(finished_req_ids - loading)
        return finished

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        is_held, params = super().request_finished(request, block_ids)
        if is_held:
            self._held.add(request.request_id)
        return is_held, params

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """vLLM calls it first of all, and frees the blocks of finished requests by what is left in it."""
        super().update_connector_output(connector_output)
        self._held.difference_update(connector_output.finished_recving or ())
        stored = self._held.intersection(connector_output.finished_sending or ())
        connector_output.finished_sending = stored
        self._held -= stored

    def _transfers(self, direction: str) -> list[LMCacheMPRequestMetadata]:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, LMCacheMPConnectorMetadata)
        return [transfer for transfer in metadata.requests if transfer.direction == direction]

    def _ask_server(self) -> None:
        """Raises `ConnectionError` where it doesn't answer as fast as the heartbeat expects it to, which is within ms.

        An unhealthy server isn't asked: upstream knows what to do then.
        """
        adapter = self.worker_adapter
        if adapter.is_healthy and not send_ping(adapter.req_client, adapter._heartbeat_interval):
            raise ConnectionError(f"it didn't answer within {adapter._heartbeat_interval:g} s")

    def _lose_server(self, error: Exception) -> None:
        logger.warning("Going on without the LMCache server until it answers again: %r", error)
        self.worker_adapter._ensure_heartbeat_started()
        self.worker_adapter._health_event.clear()

    def _report_failed(self, load: LMCacheMPRequestMetadata) -> None:
        """As upstream does with a load that it doesn't even begin."""
        adapter = self.worker_adapter
        adapter.error_block_ids.update(load.op.flat_block_ids)
        adapter._failed_request_ids.add(load.request_id)
        adapter._dropped_retrieves.add(load.request_id)

    def _check_pending(self) -> None:
        """Raises what a pending transfer raises, and `TimeoutError` for one that takes too long.

        An unhealthy server's transfers are all ended by upstream, which then doesn't look at them.
        """
        adapter = self.worker_adapter
        now_s = time.monotonic()
        pending = [*adapter.store_futures.values(), *(future for future, _ in adapter.retrieve_futures.values())]
        self._pending_since_s = {future: self._pending_since_s.get(future, now_s) for future in pending}
        for future, since_s in self._pending_since_s.items():
            if future.query():
                future.result(timeout=0)
            elif now_s - since_s > adapter._mq_timeout:
                raise TimeoutError(f"a transfer had no answer within {adapter._mq_timeout:g} s")
