"""Who supplies KV to the vLLM of a contender, as options of vLLM's command line: ours, LMCache's own, or nobody."""

from __future__ import annotations

import json

from kvarena.stack.errors import StackError
from kvarena.stack.plan import Plan
from kvarena.stack.service import LMCACHE_SERVER
from kvarena.vllm_plugin.config import kv_transfer_config
from kvarena.vllm_plugin.lmcache_config import lmcache_blend_options

LMCACHE_CHUNK_TOKENS = 32
"""The pieces in which the LMCache server keeps KV."""
LMCACHE_TIMEOUT_S = 10.0
LMCACHE_HEARTBEAT_S = 2.0


def vllm_connector(name: str, plan: Plan) -> list[str]:
    """What the contenders differ in; whether vLLM keeps a prefix cache itself goes with it."""
    if name == "blend" and plan.blend_engine == "lmcache":
        return _lmcache_blend(plan)
    prefix_caching = ["--enable-prefix-caching" if plan.prefix_caching else "--no-enable-prefix-caching"]
    if name == "blend":
        middleware = ["--middleware", "kvarena.vllm_plugin.middleware.KVArenaMiddleware"]
        return [*prefix_caching, "--kv-transfer-config", kv_transfer_config(plan.blend), *middleware]
    return [*prefix_caching, *(_lmcache_connector(plan) if name == "lmcache" else [])]


def _lmcache_blend(plan: Plan) -> list[str]:
    try:
        return lmcache_blend_options(plan.blend, plan.lmcache_gb)
    except ValueError as error:
        raise StackError(f"BLEND_ENGINE is lmcache, and {error}") from error


def _lmcache_connector(plan: Plan) -> list[str]:
    """LMCache's own connector, failing safe, on the server that has the blend's chunks.

    The server's pieces must be whole blocks of vLLM's, and those have 128 tokens on a CPU where nobody says otherwise.
    A server that is gone or hangs is missed within a heartbeat or two, or when something asked of it times out.
    """
    settings = {
        "lmcache.mp.host": f"tcp://{plan.network.host(LMCACHE_SERVER)}",
        "lmcache.mp.port": plan.ports.lmcache_server,
        "lmcache.mp.mq_timeout": LMCACHE_TIMEOUT_S,
        "lmcache.mp.heartbeat_interval": LMCACHE_HEARTBEAT_S,
    }
    connector = {
        "kv_connector": "FailSafeLMCacheConnector",
        "kv_connector_module_path": "kvarena.vllm_plugin.lmcache_connector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": settings,
    }
    blocks = ["--block-size", str(LMCACHE_CHUNK_TOKENS)] if plan.profile == "cpu" else []
    return [*blocks, "--kv-transfer-config", json.dumps(connector)]
