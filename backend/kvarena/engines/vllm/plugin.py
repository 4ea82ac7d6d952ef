"""What vLLM loads in every process before the model (`vllm.general_plugins`), so that our connector finds the model.

A KV connector isn't given the model, and the blend is the model's own forward. So a worker's `load_model` is wrapped
to remember what it loaded, for our connector and for LMCache's own. The worker gets two methods for the API server:
one tells why a model isn't blended, one which chunks the store has. On a CPU, requests with a seed get generators that
can take a draw back. Loaded in every vLLM process, so vllm is imported inside the functions.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
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
    Worker.kvarena_missing = _missing
    _let_seeded_requests_be_prefilled_in_pieces()


class RewindableGenerator(torch.Generator):
    """A CPU's generator whose last draw can be taken back, in the words in which vLLM does that.

    vLLM draws a token after each piece of a prompt and discards all but the last. It moves the generator of a request
    with a seed back by its offset, which a CPU's doesn't have: the engine died. Here setting the offset restores the
    state at the last `remember`.
    """

    _remembered: torch.Tensor

    @classmethod
    def like(cls, generator: torch.Generator) -> RewindableGenerator:
        own = cls()
        own.set_state(generator.get_state())
        return own

    def remember(self) -> None:
        self._remembered = self.get_state()

    def get_offset(self) -> int:
        return 0

    def set_offset(self, offset: int) -> torch.Generator:
        self.set_state(self._remembered)
        return self


def _let_seeded_requests_be_prefilled_in_pieces() -> None:
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    original = CPUModelRunner._sample

    @functools.wraps(original)
    def sample(self: Any, *args: Any, **kwargs: Any) -> Any:
        generators = self.input_batch.generators
        for index, generator in list(generators.items()):
            if not isinstance(generator, RewindableGenerator):
                generators[index] = RewindableGenerator.like(generator)
                self.requests[self.input_batch.req_ids[index]].generator = generators[index]
            generators[index].remember()
        return original(self, *args, **kwargs)

    CPUModelRunner._sample = sample


def _refusal(_worker: Any) -> str:
    """A method that the API server may call in every worker: why the model isn't blended, or nothing."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    return str(get_kv_transfer_group().refusal)


def _missing(_worker: Any, texts: list[list[int]], salt: str, sink: list[int], scores: bool) -> list[str | None]:
    """The same, to look into the store: why it doesn't have the chunk of each of these token ids, or None."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    return list(get_kv_transfer_group().missing(texts, salt, sink, scores))


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
