"""What vLLM loads in every process before the model (`vllm.general_plugins`): it makes the loaded model findable.

A KV connector isn't given the model, and the blend is the model's own forward. So a worker's `load_model` is wrapped
to remember what it loaded, for our connector and for LMCache's own, and the worker gets a method that tells why a
model isn't blended. Loaded in every vLLM process, so vllm is imported inside the functions.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

from torch import nn

_loaded: list[nn.Module] = []


def register() -> None:
    """The entry point. Safe to call more than once."""
    _log_like_vllm()
    from vllm.v1.worker.gpu_worker import Worker

    from kvarena.engines.vllm.lmcache_blender import prepare_lmcache_blender

    original = Worker.load_model
    if getattr(original, "_is_kvarena", False):
        return

    @functools.wraps(original)
    def load_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        _loaded[:] = [self.get_model()]
        prepare_lmcache_blender(self.vllm_config, _loaded[0])
        return result

    load_model._is_kvarena = True  # type: ignore[attr-defined]
    Worker.load_model = load_model
    Worker.kvarena_refusal = _refusal


def _refusal(_worker: Any) -> str:
    """A method that the API server may call in every worker: why the model isn't blended, or nothing."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    return str(get_kv_transfer_group().refusal)


def _log_like_vllm() -> None:
    """Our log lines go where vLLM's go, in the same form."""
    ours, theirs = logging.getLogger("kvarena"), logging.getLogger("vllm")
    ours.handlers[:] = theirs.handlers
    ours.setLevel(theirs.level)
    ours.propagate = theirs.propagate


def loaded_model() -> nn.Module:
    """The model of this worker process. Raises `RuntimeError` when the plugin wasn't loaded before the model was."""
    if not _loaded:
        raise RuntimeError(
            "kvarena's vLLM plugin was not loaded: is kvarena installed in vLLM's environment, and is 'kvarena' "
            "among VLLM_PLUGINS where that is set?"
        )
    return _loaded[0]
