"""`lmcache`: vLLM with LMCache's own connector, failing safe, on the LMCache server that has the blend's chunks."""

from __future__ import annotations

import json

from kvarena.contenders.plain import prefix_caching
from kvarena.contenders.servers import Launch, VLLMServer
from kvarena.contenders.spec import LMCACHE_SERVER, Container, ContenderSpec

LMCACHE_CHUNK_TOKENS = 32
"""The pieces in which the LMCache server keeps KV."""
TIMEOUT_S = 10.0
HEARTBEAT_S = 2.0


def _options(launch: Launch) -> list[str]:
    """The server's pieces must be whole blocks of vLLM's, and those have 128 tokens on a CPU where nobody says
    otherwise. A server that is gone or hangs is missed within a heartbeat or two, or when something asked of it times
    out.
    """
    host, _, port = launch.blend.lmcache_url.rpartition(":")
    settings = {
        "lmcache.mp.host": host,
        "lmcache.mp.port": int(port),
        "lmcache.mp.mq_timeout": TIMEOUT_S,
        "lmcache.mp.heartbeat_interval": HEARTBEAT_S,
    }
    connector = {
        "kv_connector": "FailSafeLMCacheConnector",
        "kv_connector_module_path": "kvarena.engines.vllm.lmcache_connector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": settings,
    }
    blocks = ["--block-size", str(LMCACHE_CHUNK_TOKENS)] if launch.profile == "cpu" else []
    return [*prefix_caching(launch), *blocks, "--kv-transfer-config", json.dumps(connector)]


SPEC = ContenderSpec(
    name="lmcache",
    title="vLLM with LMCache (prefixes only)",
    icon="🚀",
    explanation="Reuses the KV of prefixes that LMCache keeps, in memory and on disk.",
    port=8005,
    server=VLLMServer(_options),
    needs=lambda launch: (LMCACHE_SERVER,),
    packages=lambda launch: {"lmcache": launch.profile},
    container=Container(image="cpu", profiles=("cpu", "gpu"), optional_in=("cpu", "gpu")),
)
