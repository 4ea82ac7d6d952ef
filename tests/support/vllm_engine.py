"""vLLM engines in processes of their own: one engine each, so that none sees another's state.

`run_in_engine(function, ...)` calls a module-level function there and returns its result. In the process the engine's
core runs in place, so that a test may reach the connector and the model. The processes are forks of one that has only
imported vLLM, which takes longer than a tiny engine's start.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import forkserver
from typing import Any, TypeVar
from unittest.mock import patch

import torch
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models import registry

from kvarena.engines.vllm.config import BlendConfig, kv_transfer_config
from kvarena.engines.vllm.plugin import loaded_model

Result = TypeVar("Result")

MEMORY = BlendConfig(store="memory", store_bytes=64 << 20)
PIECES: dict[str, Any] = {"max_num_batched_tokens": 128, "max_num_seqs": 4}
"""Settings with which prompts are prefilled in pieces."""
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "PYTHONHASHSEED": "0",
    "LMCACHE_TRACK_USAGE": "false",
}

IMPORTED = ["vllm.entrypoints.llm", "vllm.v1.engine.core", "vllm.v1.worker.cpu_worker"]


def run_in_engine(function: Callable[..., Result], *args: Any, **settings: Any) -> Result:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    with patch.dict(os.environ, ENVIRONMENT):
        forkserver.ensure_running()
    with ProcessPoolExecutor(1, mp_context=context, initializer=_prepare) as pool:
        return pool.submit(function, *args, **settings).result()


def make_engine(model: str, config: BlendConfig | None, **settings: Any) -> Any:
    """A `vllm.LLM` with the blend, or without for `config` None."""
    from vllm import LLM

    if config is not None:
        settings["kv_transfer_config"] = json.loads(kv_transfer_config(config))
    defaults: dict[str, Any] = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 2048,
        "disable_log_stats": False,
    }
    return LLM(model, **(defaults | settings))


def generate(llm: Any, prompts: list[str], max_tokens: int, kvarena: dict[str, Any] | None = None) -> list[Any]:
    """Greedy answers, one `RequestOutput` per prompt. They run as one batch."""
    from vllm import SamplingParams

    extra = {"kv_transfer_params": {"kvarena": kvarena}} if kvarena is not None else None
    sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, extra_args=extra)
    return list(llm.generate(prompts, sampling, use_tqdm=False))


def tokens_of(outputs: list[Any]) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


def report_of(output: Any) -> dict[str, Any]:
    report: dict[str, Any] = output.kv_transfer_params["kvarena"]
    return report


def plain_tokens(model: str, prompts: list[str], max_tokens: int, **settings: Any) -> list[list[int]]:
    return tokens_of(generate(make_engine(model, None, **settings), prompts, max_tokens))


@dataclass(frozen=True)
class Step:
    """Prompts that are sent together. `abort_after`: engine steps after which the first half of them is aborted.
    `kill_pid`: a process that is killed before.
    """

    prompts: list[str]
    max_tokens: int = 8
    kvarena: dict[str, Any] | None = None
    salt: str | None = None
    abort_after: int = 0
    kill_pid: int = 0


@dataclass
class Outcome:
    """Of one step: tokens, reports and cached tokens by prompt; what of the connector's state was left behind."""

    tokens: list[list[int]]
    reports: list[dict[str, Any]]
    num_left_behind: int
    num_preemptions: int


def run_steps(model: str, config: BlendConfig, steps: list[Step], settings: dict[str, Any]) -> list[Outcome]:
    """Run steps one after the other on one engine with the blend."""
    llm = make_engine(model, config, **settings)
    return [_run_step(llm, step) for step in steps]


def prefill_kv(model: str, config: BlendConfig | None, prompt: str, dtype: str) -> list[torch.Tensor]:
    """Keys and values of a prompt `(2, T, H_kv * D)` by layer, as its prefill computes them.

    With the blend its chunks are put into the store first, and then all tokens recomputed.
    """
    llm = make_engine(model, config, dtype=dtype)
    if config is not None:
        generate(llm, [prompt], 1, {"ratio": 0.5})
    attentions = [layer for layer in loaded_model().modules() if isinstance(layer, Attention)]
    passed: list[list[torch.Tensor]] = [[] for _ in attentions]
    for layer, seen in zip(attentions, passed, strict=True):
        layer.register_forward_pre_hook(lambda _m, args, seen=seen: seen.append(torch.stack(args[1:3]).clone()))
    generate(llm, [prompt], 1, None if config is None else {"ratio": 1.0})
    return [torch.cat(seen, dim=1).float() for seen in passed]


def _run_step(llm: Any, step: Step) -> Outcome:
    from vllm import SamplingParams

    extra = {"kv_transfer_params": {"kvarena": step.kvarena}} if step.kvarena is not None else None
    sampling = SamplingParams(temperature=0, max_tokens=step.max_tokens, ignore_eos=True, extra_args=extra)
    engine, scheduler = llm.llm_engine, llm.llm_engine.engine_core.engine_core.scheduler
    if step.kill_pid:
        os.kill(step.kill_pid, signal.SIGKILL)
    names = [f"r{i}" for i in range(len(step.prompts))]
    for name, prompt in zip(names, step.prompts, strict=True):
        engine.add_request(name, {"prompt": prompt, **({"cache_salt": step.salt} if step.salt else {})}, sampling)
    finished: dict[str, Any] = {}
    preemptions = 0
    for count in itertools.count(1):
        finished |= {output.request_id: output for output in engine.step() if output.finished}
        preemptions = max(preemptions, sum(r.num_preemptions for r in scheduler.requests.values()))
        if count == step.abort_after:
            engine.abort_request(names[: len(names) // 2])
        if not engine.has_unfinished_requests():
            break
    half = scheduler.connector._scheduler
    outputs = [finished[name] for name in names if name in finished]
    return Outcome(
        tokens_of(outputs),
        [report_of(output) for output in outputs],
        len(half._tracked) + len(half._jobs) + len(half._finished) + len(scheduler.requests),
        preemptions,
    )


def _prepare() -> None:
    """vLLM looks at a model's class in a process of its own, lest CUDA is initialised; a tiny model doesn't wait."""
    os.environ.update(ENVIRONMENT)
    registry._run_in_subprocess = lambda look: look()
