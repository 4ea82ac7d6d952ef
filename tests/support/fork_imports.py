"""What vLLM's and LMCache's processes need, imported once for all of them; `forks.py` makes them.

Kernels are registered and logging is configured here too, for both look at all that was imported; and that is never
garbage, though vLLM has it searched several times at each end of an engine.
"""

from __future__ import annotations

import atexit
import gc
import multiprocessing
from functools import partial
from importlib import import_module

import vllm.entrypoints.llm
import vllm.model_executor.layers.quantization.online.base
import vllm.model_executor.models.llama
import vllm.v1.engine.core
import vllm.v1.worker.cpu_worker  # noqa: F401
from vllm.config.logging import LoggingConfig
from vllm.logger import configure_logging
from vllm.model_executor.models import registry
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.executor import multiproc_executor

import kvarena.engines.vllm.connector  # noqa: F401

configure_logging(LoggingConfig())
CpuPlatform.register_triton_kernel_overrides()
CpuPlatform.register_triton_kernel_overrides = classmethod(lambda cls: None)
# vLLM looks at a model's class in a process of its own, lest CUDA is initialised; a tiny model doesn't wait for that.
registry._run_in_subprocess = lambda look: look()
# For CPUs vLLM wants workers to import all of it once more.
multiproc_executor.get_mp_context = partial(multiprocessing.get_context, "fork")
# After the kernels: vLLM 0.32 can't look through a library of LMCache's.
for name in (
    "cli.main",
    "cli.commands.server",
    "v1.multiprocess.http_server",
    "v1.distributed.l2_adapters.bigtable_l2_adapter",
):
    import_module(f"lmcache.{name}")
gc.collect()
gc.freeze()
atexit.register(gc.unfreeze)  # else libraries tell at the end what they think has leaked
gc.unfreeze = lambda: None
