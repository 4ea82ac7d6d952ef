"""vLLM engines in processes of their own: one engine each, so that none sees another's state.

`run_in_engine(function, ...)` calls a module-level function there and returns its result. In the process the engine's
core runs in place, so that a test may reach the connector and the model. The processes are forks of one that has only
imported vLLM.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from typing import Any, TypeVar

import pytest
import torch
from vllm.model_executor.layers.attention import Attention

from kvarena.core import blend
from kvarena.engines.vllm import model as vllm_model
from kvarena.engines.vllm.config import BlendConfig, kv_transfer_config
from kvarena.engines.vllm.messages import report_log
from kvarena.engines.vllm.plugin import loaded_model
from support.forks import ENVIRONMENT, IMPORTS, fork_context

Result = TypeVar("Result")

MEMORY = BlendConfig(store="memory", store_bytes=64 << 20)
PIECES: dict[str, Any] = {"max_num_batched_tokens": 128, "max_num_seqs": 4}
"""Settings with which prompts are prefilled in pieces."""


def run_in_engine(function: Callable[..., Result], *args: Any, **settings: Any) -> Result:
    with ProcessPoolExecutor(1, mp_context=fork_context(), initializer=_prepare) as pool:
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
        "num_gpu_blocks_override": 512,  # of 128 tokens; a gibibyte takes longer to clear than a tiny engine to start
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


def seeded_tokens(model: str, config: BlendConfig | None, prompts: list[str], **settings: Any) -> list[list[int]]:
    """Drawn at random, each prompt with a seed of its own; all are sent together."""
    from vllm import SamplingParams

    seeds = [SamplingParams(temperature=1, seed=seed, max_tokens=24) for seed in range(len(prompts))]
    return tokens_of(make_engine(model, config, **settings).generate(prompts, seeds, use_tqdm=False))


def adapted_tokens(
    model: str, config: BlendConfig | None, prompts: list[str], adapters: list[tuple[str, str] | None]
) -> tuple[list[list[list[int]]], list[dict[str, Any]]]:
    """Twice with each adapter, named by name and folder, and what was reported with the blend."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    llm = make_engine(model, config, enable_lora=True, max_lora_rank=8)
    sampling = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    tokens, reports = [], []
    for number, adapter in enumerate(adapters):
        lora = LoRARequest(adapter[0], number, adapter[1]) if adapter else None
        rounds = [llm.generate(prompts, sampling, lora_request=lora, use_tqdm=False) for _ in range(2)]
        assert tokens_of(rounds[0]) == tokens_of(rounds[1])
        tokens.append(tokens_of(rounds[0]))
        reports += [report_of(output) for outputs in rounds for output in outputs] if config else []
    return tokens, reports


@dataclass(frozen=True)
class Step:
    """Prompts that are sent together. `abort_after`: engine steps after which the first half of them is aborted.
    `kill_pid`: a process that is killed before. `damage`: what else is done before.
    """

    prompts: list[str]
    max_tokens: int = 8
    kvarena: dict[str, Any] | None = None
    salt: str | None = None
    abort_after: int = 0
    kill_pid: int = 0
    damage: Callable[[], None] | None = None


@dataclass
class Outcome:
    """Of one step: tokens and reports by prompt; what of the connector's state and of vLLM's blocks was left behind.
    `arrivals`: in which step of the engine each token of each prompt came. `aborted_reports`: of the aborted ones, None
    where nothing was counted.
    """

    tokens: list[list[int]]
    reports: list[dict[str, Any]]
    num_cached_tokens: list[int]
    num_left_behind: int
    num_preemptions: int
    arrivals: list[list[int]]
    aborted_reports: list[dict[str, Any] | None]


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
    if step.damage:
        step.damage()
    names = [f"r{i}" for i in range(len(step.prompts))]
    for name, prompt in zip(names, step.prompts, strict=True):
        engine.add_request(name, {"prompt": prompt, **({"cache_salt": step.salt} if step.salt else {})}, sampling)
    finished: dict[str, Any] = {}
    arrivals: dict[str, list[int]] = {name: [] for name in names}
    preemptions = 0
    for count in itertools.count(1):
        outputs = engine.step()
        finished |= {output.request_id: output for output in outputs if output.finished}
        for output in outputs:
            so_far = arrivals[output.request_id]
            so_far += [count] * (len(output.outputs[0].token_ids) - len(so_far))
        preemptions = max(preemptions, sum(r.num_preemptions for r in scheduler.requests.values()))
        if count == step.abort_after:
            engine.abort_request(names[: len(names) // 2])
        if not engine.has_unfinished_requests():
            break
    half, pool = scheduler.connector._scheduler, scheduler.kv_cache_manager.block_pool
    num_used_blocks = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()
    under_way = half._budget.long_one is not None
    outputs = [finished[name] for name in names if name in finished]
    return Outcome(
        tokens_of(outputs),
        [report_of(output) for output in outputs],
        [output.num_cached_tokens for output in outputs],
        len(half._tracked)
        + len(half._jobs)
        + len(half._finished)
        + len(scheduler.requests)
        + num_used_blocks
        + under_way,
        preemptions,
        [arrivals[name] for name in names if name in finished],
        [report_log.get(name) for name in names if name not in finished],
    )


def run_session(model: str, config: BlendConfig | None, texts: list[str]) -> tuple[list[int], list[dict[str, Any]]]:
    """A streaming-input session in which each text is answered before the next comes, and blocks are lost meanwhile.

    Returns all tokens, and the reports of its end.
    """
    from vllm import SamplingParams
    from vllm.v1.request import RequestStatus

    engine = make_engine(model, config).llm_engine
    core = engine.engine_core.engine_core
    extra = {"kv_transfer_params": {"kvarena": {"ratio": 1}}}
    sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, extra_args=extra)
    tokens: list[int] = []
    reports: list[dict[str, Any]] = []

    def step() -> bool:
        """Whether an answer ended."""
        ended = False
        for outputs in (core.step_fn()[0] or {}).values():
            for output in outputs.outputs:
                tokens.extend(output.new_token_ids)
                ended |= output.finish_reason is not None
            if outputs.scheduler_stats and (stats := outputs.scheduler_stats.kv_connector_stats):
                reports.extend(stats["requests"])
        return ended

    for text in texts:
        tasks = engine.get_supported_tasks()
        request = engine.input_processor.process_inputs("session", {"prompt": text}, sampling, tasks, resumable=True)
        core.add_request(*core.preprocess_add_request(request))
        for _ in range(4):
            step()
        core.scheduler.reset_prefix_cache(reset_running_requests=True)
        while not step():
            pass
    core.scheduler.finish_requests("session", RequestStatus.FINISHED_ABORTED)
    step()
    return tokens, reports


def run_steps_and_watch_batches(
    model: str, config: BlendConfig, steps: list[Step], settings: dict[str, Any]
) -> tuple[list[Outcome], int]:
    """`run_steps`, and how many tokens the largest batch of the blends' own forwards had, at any layer."""
    sizes: list[int] = []
    attention_metadata = vllm_model.VllmModel.attention_metadata

    def watched(
        engine: vllm_model.VllmModel, batch: vllm_model.Batch
    ) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        sizes.append(len(batch))
        return attention_metadata(engine, batch)

    vllm_model.VllmModel.attention_metadata = watched  # type: ignore[method-assign,assignment]
    return run_steps(model, config, steps, settings), max(sizes)


def run_after_a_weight_update(model: str, config: BlendConfig, before: list[Step], after: list[Step]) -> list[Outcome]:
    """The outcomes of the later steps. In between the weights change, and vLLM is told to reset its caches."""
    llm = make_engine(model, config)
    for step in before:
        _run_step(llm, step)
    for parameter in loaded_model().parameters():
        parameter.data.mul_(1.25)
    assert llm.reset_prefix_cache(reset_connector=True)
    return [_run_step(llm, step) for step in after]


def num_times_noted(model: str, config: BlendConfig, step: Step) -> int:
    """From how many long blends of a step the server learnt what a request takes beside its blend."""
    llm = make_engine(model, config)
    _run_step(llm, step)
    half = llm.llm_engine.engine_core.engine_core.scheduler.connector._scheduler
    return len(half._ttft_budgets[True]._beside_ms)


def watch_few_tokens() -> None:
    """A longer prompt isn't scored; `damage` of a step."""
    setattr(blend, "MAX_WATCHED_TOKENS", 64)  # noqa: B010


def take_memory() -> None:
    """For chunks that are computed by themselves; `damage` of a step."""
    vllm_model._empty_kv = lambda engine, num_tokens: None


def run_steps_and_lose_a_rank(
    model: str, config: BlendConfig, steps: list[Step], settings: dict[str, Any]
) -> tuple[list[Outcome], float]:
    """`run_steps`, and how many seconds after its last rank had no memory for a blend's forward the engine ends."""
    llm = make_engine(model, config, **settings)
    outcomes = [_run_step(llm, step) for step in steps]
    llm.collective_rpc(forget_memory)
    start_s = time.monotonic()
    with pytest.raises(RuntimeError, match=r"cancelled|died"):
        generate(llm, [" # # ".join(steps[0].prompts)], 1, {"ratio": 1.0})
    return outcomes, time.monotonic() - start_s


def forget_memory(worker: Any) -> None:
    """The last rank's, for the next forward of a blend."""
    if worker.rank == 0:
        return

    def no_memory(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("none left")

    vllm_model.PagedPrompt.forward = no_memory  # type: ignore[method-assign,assignment]


def ratios_in_a_queue(model: str, config: BlendConfig, prompts: list[str]) -> list[float]:
    """Of prompts that come together and have half as long as all of them took with every token recomputed."""
    llm = make_engine(model, config)
    passed_ms: list[float] = []
    for _ in range(4):
        start_s = time.perf_counter()
        generate(llm, prompts, 1, {"max_ttft_ms": 60_000})
        passed_ms.append(1e3 * (time.perf_counter() - start_s))
        llm.reset_prefix_cache()
    outputs = generate(llm, prompts, 1, {"max_ttft_ms": min(passed_ms) / 2})
    return [report_of(output)["ratio"] for output in outputs]


def _prepare() -> None:
    os.environ.update(ENVIRONMENT)
    import_module(IMPORTS)  # a fork has it already
