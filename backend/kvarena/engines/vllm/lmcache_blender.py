"""LMCache's own in-process blender on stock vLLM: its model is registered, and what it can't serve refused at start.

The blender asks `VLLMModelTracker` for the model, and nothing upstream puts it there (LMCache issue 4131): it stops
with "vllm model for vllm-instance not found". `prepare_lmcache_blender` does that in every worker. Of what it refuses
LMCache would stop at some with a failed assertion; the rest it would serve with wrong answers. LMCache finds the
separator by its token ids, `tokenizer.encode(blend_special_str)[1:]`, but in a prompt its text becomes other tokens
(LMCache issues 1136, 2639): white space at its ends goes to its neighbours, some tokenizers put a space before every
text, and others have no token that begins it. `special_string` looks for one that is found.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.platforms import current_platform

from kvarena.engines.base import Tokenizer
from kvarena.engines.vllm.lmcache_config import CONNECTOR, PREFIX

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
