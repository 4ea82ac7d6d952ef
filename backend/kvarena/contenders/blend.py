"""`blend`: vLLM with KV Arena's connector, or with LMCache's own blender (`BLEND_ENGINE`)."""

from __future__ import annotations

from kvarena.contenders.plain import prefix_caching
from kvarena.contenders.servers import GIB, Launch, VLLMServer
from kvarena.contenders.spec import LMCACHE_SERVER, Container, ContenderSpec
from kvarena.engines.vllm.config import kv_transfer_config
from kvarena.engines.vllm.lmcache_blender import lmcache_blend_options


def _options(launch: Launch) -> list[str]:
    if launch.blend_engine == "lmcache":
        try:
            return lmcache_blend_options(launch.blend, launch.lmcache_gb)
        except ValueError as error:
            raise ValueError(f"BLEND_ENGINE is lmcache, and {error}") from error
    middleware = ["--middleware", "kvarena.engines.vllm.middleware.KVArenaMiddleware"]
    # vLLM would give back the KV before a window, and a blend needs all of it.
    all_kv = ["--disable-hybrid-kv-cache-manager"] if launch.has_some_windows else []
    return [*prefix_caching(launch), *all_kv, "--kv-transfer-config", kv_transfer_config(launch.blend), *middleware]


def _asks_lmcache_server(launch: Launch) -> bool:
    """LMCache's own blender keeps its chunks in its process."""
    return launch.blend_engine == "kvarena" and launch.blend.store == "lmcache"


def _chunks_gb(launch: Launch) -> float:
    """Of chunks in the process itself."""
    if _asks_lmcache_server(launch):
        return 0
    return launch.lmcache_gb if launch.blend_engine == "lmcache" else launch.blend.store_bytes / GIB


SPEC = ContenderSpec(
    name="blend",
    title="vLLM with LMCache (CacheBlend)",
    icon="🚀",
    explanation="Reuses the KV of text chunks anywhere in the prompt, and recomputes some of their tokens.",
    port=8000,
    server=VLLMServer(_options, has_plugin=True),
    is_approximate=True,
    report="blend",
    needs=lambda launch: (LMCACHE_SERVER,) if _asks_lmcache_server(launch) else (),
    packages=lambda launch: {"lmcache": launch.profile},
    chunk_store_gb=_chunks_gb,
    container=Container(image="cpu", profiles=("cpu", "gpu")),
)
