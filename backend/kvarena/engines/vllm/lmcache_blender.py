"""LMCache's own in-process blender on stock vLLM: its command line, and what every worker does for it.

The command line is made of the blend's settings. LMCache's connector reads its configuration from the keys `lmcache.*`
of `kv_connector_extra_config`, over its file and its environment; what the blender needs is spelled out here.

The blender asks `VLLMModelTracker` for the model, and nothing upstream puts it there (LMCache issue 4131): it stops
with "vllm model for vllm-instance not found". `prepare_lmcache_blender` does that in every worker, and refuses what it
can't serve: LMCache would stop at some of it with a failed assertion, and serve the rest with wrong answers.

LMCache finds the separator by its token ids, `tokenizer.encode(blend_special_str)[1:]`, but in a prompt its text
becomes other tokens (LMCache issues 1136, 2639): white space at its ends goes to its neighbours, some tokenizers put a
space before every text, and others have no token that begins it. `special_string` looks for one that is found.

Imports neither torch nor vllm: the stack makes the command line where there is none.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from kvarena.engines.vllm.config import BlendConfig
from kvarena.policies.params import PARAMETERS

if TYPE_CHECKING:
    from torch import nn
    from vllm.config import VllmConfig

    from kvarena.engines.base import Tokenizer

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


NEIGHBOURS = [(left, right) for left in ("end", "end.", "7") for right in ("The", "the", "a", "7")]
"""What may stand before and after a separator."""


def special_string(tokenizer: Tokenizer, separator: str) -> str:
    """What `blend_special_str` must be for LMCache to find `separator` between texts, once wherever it stands.

    Raises `ValueError` when nothing serves.
    """
    prompts = [tokenizer.encode(left + separator + right) for left, right in NEIGHBOURS]
    for candidate in _candidates(separator):
        searched = tokenizer.encode(candidate)[1:]
        if searched and all(_count(searched, ids) == 1 for ids in prompts):
            return candidate
    raise ValueError(
        f"its tokenizer reads the separator {separator!r} differently beside different texts, and LMCache's own "
        "blender looks for the same tokens everywhere; set SEPARATOR to another one, such as a special token"
    )


def _candidates(separator: str) -> Iterator[str]:
    """Without spaces at its ends first; after a letter for tokenizers whose first token is the separator's own."""
    bodies = dict.fromkeys((separator.strip(" "), separator.rstrip(" "), separator.lstrip(" "), separator))
    for body in bodies:
        for before in ("", "a"):
            yield before + body


def _count(searched: Sequence[int], ids: Sequence[int]) -> int:
    length = len(searched)
    return sum(list(ids[i : i + length]) == list(searched) for i in range(len(ids) - length + 1))


logger = logging.getLogger(__name__)

CONNECTORS = (CONNECTOR, "LMCacheConnectorV1Dynamic")
"""LMCache's in-process connector, by vLLM's name for it and by its own."""
DEVICES = ("cuda", "xpu")
MODELS = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""vLLM's classes whose layers LMCache has written out once more."""


def prepare_lmcache_blender(vllm_config: VllmConfig, model: nn.Module) -> None:
    """Called in a worker that has loaded its model and not yet made its connector; does nothing for other connectors.

    Raises `ValueError` with every reason why LMCache's blender can't serve this.
    """
    transfer = vllm_config.kv_transfer_config
    if transfer is None or transfer.kv_connector not in CONNECTORS:
        return
    from lmcache.integration.vllm.utils import ENGINE_NAME
    from lmcache.v1.compute.models.utils import VLLMModelTracker
    from vllm.platforms import current_platform

    VLLMModelTracker.register_model(ENGINE_NAME, model)
    config = read_config(transfer.kv_connector_extra_config)
    if not config.enable_blending:
        return
    if reasons := refusals(vllm_config, model, config, current_platform.device_type):
        raise ValueError(f"LMCache's own blender can't serve {vllm_config.model_config.model}: {'; '.join(reasons)}")
    special = special_string(_tokenizer(vllm_config), config.blend_special_str)
    logger.info("LMCache looks for %r where the separator is %r", special, config.blend_special_str)
    transfer.kv_connector_extra_config[f"{PREFIX}blend_special_str"] = special


def read_config(extra: dict[str, Any]) -> Any:
    """LMCache's configuration as its connector will see it: file, environment, and over them the command line."""
    from lmcache.integration.vllm.utils import lmcache_get_or_create_config
    from lmcache.v1.config import validate_and_set_config_value

    config = lmcache_get_or_create_config()
    for key, value in extra.items():
        if key.startswith(PREFIX) and not validate_and_set_config_value(config, key.removeprefix(PREFIX), value):
            raise ValueError(f"LMCache has no setting {key.removeprefix(PREFIX)}, or doesn't take {value!r} for it")
    return config


def refusals(vllm_config: VllmConfig, model: nn.Module, config: Any, device: str) -> list[str]:
    """Every reason why LMCache's blender can't serve this model with these settings; empty: it can."""
    return [*_refused_settings(vllm_config, config, device), *_refused_model(model, config)]


def _refused_settings(vllm_config: VllmConfig, config: Any, device: str) -> list[str]:
    parallel = vllm_config.parallel_config
    transfer = vllm_config.kv_transfer_config
    extra = transfer.kv_connector_extra_config if transfer else {}
    reasons = {
        f"it runs on {' and '.join(DEVICES)}, not on {device}": device not in DEVICES,
        "workers would pick tokens by their own heads, each others (tensor parallelism)": (
            parallel.tensor_parallel_size > 1
        ),
        "its keys don't tell the KV of different adapters apart (LoRA)": vllm_config.lora_config is not None,
        "its layers are spread over several devices (pipeline parallelism)": parallel.pipeline_parallel_size > 1,
        "vLLM's prefix cache would give blended KV to exact requests (--no-enable-prefix-caching)": bool(
            vllm_config.cache_config.enable_prefix_caching
        ),
        "chunks would be reused where they were, unmoved (use_layerwise is off)": not config.use_layerwise,
        "whole CUDA graphs would leave LMCache's layers out (use_layerwise without a prefix, for vLLM, is missing)": (
            not extra.get("use_layerwise")
        ),
        "it can't load in the background (enable_async_loading)": config.enable_async_loading,
        "it isn't told how much to recompute (blend_recompute_ratios)": not config.blend_recompute_ratios,
    }
    return [reason for reason, is_so in reasons.items() if is_so]


def _refused_model(model: nn.Module, config: Any) -> list[str]:
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

    name = type(model).__name__
    if name not in MODELS:
        return [f"it knows {', '.join(MODELS)}, not {name}"]
    layers: Any = model.get_submodule("model.layers")
    rotary, backend = layers[0].self_attn.rotary_emb, type(layers[0].self_attn.attn.impl).__name__
    is_sparse = (config.extra_config or {}).get("enable_sparse", False)
    check_layers = config.blend_check_layers or []
    reasons = {
        "it moves keys without RoPE scaling, and over whole heads only": (
            type(rotary) is not RotaryEmbedding or rotary.rotary_dim != rotary.head_size
        ),
        f"it knows FlashAttention, not {backend} (--attention-backend FLASH_ATTN)": (
            backend != "FlashAttentionImpl" and not is_sparse
        ),
        f"blend_check_layers must be among 0 to {len(layers) - 1}, not {check_layers}": (
            not check_layers or not all(0 <= layer < len(layers) for layer in check_layers)
        ),
    }
    return [reason for reason, is_so in reasons.items() if is_so]


def _tokenizer(vllm_config: VllmConfig) -> Any:
    """As LMCache loads it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(vllm_config.model_config.model)
