"""The command line that starts vLLM with LMCache's own in-process blender, from the blend's settings.

LMCache's connector reads its configuration from the keys `lmcache.*` of `kv_connector_extra_config`, over its file
and its environment. What the blender needs is spelled out here; `lmcache_blender` checks it against the loaded model.
Imports neither torch nor vllm.
"""

from __future__ import annotations

import json
from typing import Any

from kvarena.engines.vllm.config import BlendConfig
from kvarena.policies.params import PARAMETERS

CONNECTOR = "LMCacheConnectorV1"
PREFIX = "lmcache."
CHUNK_TOKENS = 256
FREE = ("ratio", "check_layer")
SUPPORTED = {
    "policy": "kv_deviation",
    **{name: own.default for name, own in PARAMETERS.items() if name not in ("policy", *FREE)},
    "max_ttft_ms": None,
}
"""The one policy that LMCache's blender has, in the words of `BlendConfig`. Of its parameters `FREE` may change."""


def lmcache_config(config: BlendConfig, memory_gb: float) -> dict[str, Any]:
    """LMCache's own keys for this blend, with `memory_gb` GiB of chunks in the process.

    Without `use_layerwise` the blender is never called, and without `save_unfull_chunk` a prompt's last piece is
    dropped; LMCache sets the second itself, but not for a configuration that comes with the command line. Raises
    `ValueError` for a policy that LMCache doesn't have.
    """
    for name, value in SUPPORTED.items():
        if getattr(config, name) != value:
            raise ValueError(f"LMCache's own blender has {name} {value!r} only, not {getattr(config, name)!r}")
    return {
        "enable_blending": True,
        "use_layerwise": True,
        "save_unfull_chunk": True,
        "blend_special_str": config.separator,
        "blend_check_layers": [config.check_layer],
        "blend_recompute_ratios": [config.ratio],
        "chunk_size": CHUNK_TOKENS,
        "local_cpu": True,
        "max_local_cpu_size": memory_gb,
    }


def lmcache_blend_options(config: BlendConfig, memory_gb: float) -> list[str]:
    """Options of vLLM's command line, beside those of every vLLM here but for the prefix cache.

    vLLM's prefix cache is off, for it would give blended KV to exact requests. vLLM itself looks for `use_layerwise`,
    without a prefix, before it captures whole forward passes in CUDA graphs. LMCache's blender knows one attention.
    """
    extra = {f"{PREFIX}{key}": value for key, value in lmcache_config(config, memory_gb).items()}
    connector = {
        "kv_connector": CONNECTOR,
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"use_layerwise": True, **extra},
    }
    return [
        "--no-enable-prefix-caching",
        *("--attention-backend", "FLASH_ATTN"),
        *("--kv-transfer-config", json.dumps(connector)),
    ]
