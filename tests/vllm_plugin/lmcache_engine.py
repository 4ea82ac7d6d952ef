"""What is asked of engines with LMCache's own connector, in processes of their own."""

from __future__ import annotations

import os
from typing import Any

from engine import make_engine

from kvarena.vllm_plugin.config import BlendConfig
from kvarena.vllm_plugin.lmcache_config import CONNECTOR, PREFIX, lmcache_config

WITHOUT_BLENDING: dict[str, Any] = {
    "kv_connector": CONNECTOR,
    "kv_role": "kv_both",
    "kv_connector_extra_config": {"use_layerwise": True},
}
"""On a CPU this connector has nothing to transfer with: it says so, and vLLM computes everything."""


def is_registered(worker: Any) -> bool:
    from lmcache.integration.vllm.utils import ENGINE_NAME
    from lmcache.v1.compute.models.utils import VLLMModelTracker

    return VLLMModelTracker.get_model(ENGINE_NAME) is worker.get_model()


def registrations(model: str, **settings: Any) -> list[bool]:
    """Of every worker: whether LMCache finds the model that it serves."""
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # to ask workers by function
    found: list[bool] = make_engine(model, None, kv_transfer_config=WITHOUT_BLENDING, **settings).collective_rpc(
        is_registered
    )
    return found


def refused(model: str, device: str, others: dict[str, Any], **settings: Any) -> list[str]:
    """Why LMCache's blender can't serve the model on this device, with the blend's own settings but for `others`."""
    from kvarena.vllm_plugin.lmcache_blend import read_config, refusals
    from kvarena.vllm_plugin.plugin import loaded_model

    llm = make_engine(model, None, **({"kv_transfer_config": WITHOUT_BLENDING} | settings))
    written = lmcache_config(BlendConfig(), 1.0) | others
    config = read_config({f"{PREFIX}{key}": value for key, value in written.items()})
    return refusals(llm.llm_engine.vllm_config, loaded_model(), config, device)
