"""What is asked of engines with LMCache's own connector, in processes of their own."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kvarena.engines.vllm.config import BlendConfig
from kvarena.engines.vllm.lmcache_blender import CONNECTOR, PREFIX, lmcache_config
from support.vllm_engine import generate, make_engine, tokens_of

WITHOUT_BLENDING: dict[str, Any] = {
    "kv_connector": CONNECTOR,
    "kv_role": "kv_both",
    "kv_connector_extra_config": {"use_layerwise": True},
}
"""On a CPU this connector has nothing to transfer with: it says so, and vLLM computes everything."""

NUM_TOKENS = 12


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
    from kvarena.engines.vllm.lmcache_blender import read_config, refusals
    from kvarena.engines.vllm.plugin import loaded_model

    llm = make_engine(model, None, **({"kv_transfer_config": WITHOUT_BLENDING} | settings))
    written = lmcache_config(BlendConfig(), 1.0) | others
    config = read_config({f"{PREFIX}{key}": value for key, value in written.items()})
    return refusals(llm.llm_engine.vllm_config, loaded_model(), config, device)


Answer = tuple[list[int], int]
"""Tokens, and how many of the prompt's were cached."""


@dataclass
class LostServer:
    """What was answered before the server was lost, while it was, and after: first anew, then from what it keeps.

    `known` prompts were stored before, `new` ones are asked while the server is lost, `later` ones after.
    """

    known: list[Answer]
    lost: list[Answer]
    after: list[Answer]
    kept: list[Answer]


def lose_server(
    how: str, server_pid: int, model: str, transfer: dict[str, Any], known: list[str], new: list[str], later: list[str]
) -> LostServer:
    """`how`: "frozen" stops the server's process for a while; "forgotten" makes the server forget this worker.

    A forgotten worker's requests get no answer, while the server answers pings. vLLM's own cache is emptied before each
    round of questions but the one right after the loss.
    """
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # to ask workers by function
    llm = make_engine(model, None, kv_transfer_config=transfer, block_size=32, distributed_executor_backend="mp")
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler.connector.scheduler_adapter

    def ask(prompts: list[str]) -> list[Answer]:
        outputs = generate(llm, prompts, NUM_TOKENS)
        return [(tokens, output.num_cached_tokens) for tokens, output in zip(tokens_of(outputs), outputs, strict=True)]

    def until_healthy(healthy: bool) -> None:
        stops_by = time.monotonic() + 60
        while {scheduler.is_healthy, *llm.collective_rpc(finds_server_healthy)} != {healthy}:
            assert time.monotonic() < stops_by
            llm.llm_engine.step()
            time.sleep(0.05)

    def empty_cache() -> None:
        """Finished requests' blocks are held until a step hears that their stores are done."""
        stops_by = time.monotonic() + 60
        while not llm.reset_prefix_cache():
            assert time.monotonic() < stops_by
            llm.llm_engine.step()

    stored = ask(known)
    empty_cache()
    if how == "frozen":
        os.kill(server_pid, signal.SIGSTOP)
        try:
            lost = ask([*new, *known])
            until_healthy(False)
            lost += ask(new)
        finally:
            os.kill(server_pid, signal.SIGCONT)
    else:
        llm.collective_rpc(be_forgotten)
        lost = ask([*new, *known])
    until_healthy(True)
    after = ask(later)
    empty_cache()
    return LostServer(stored, lost, after, ask([*later, *known]))


def finds_server_healthy(_worker: Any) -> bool:
    """And waits for no answer of it."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    adapter = get_kv_transfer_group().worker_adapter
    return bool(adapter.is_healthy and not adapter.store_futures and not adapter.retrieve_futures)


def be_forgotten(_worker: Any) -> None:
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    get_kv_transfer_group().worker_adapter.transfer_ctx.unregister().result(10)


@dataclass
class AbortedLoad:
    """`was_held`: whether the blocks of a request that was aborted were kept as long as they were written to."""

    answers: list[Answer]
    was_held: bool
    num_left: int


def abort_while_loading(model: str, transfer: dict[str, Any], prompt: str, when: str) -> AbortedLoad:
    """A prompt is asked, asked again and aborted, and asked once more. The second time is answered from the server, so
    it is aborted "before" its load has ended, or "in" the step in which the worker says that it has.
    """
    from vllm import SamplingParams
    from vllm.v1.request import RequestStatus

    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # to ask workers by function
    llm = make_engine(model, None, kv_transfer_config=transfer, block_size=32, distributed_executor_backend="mp")
    core: Any = llm.llm_engine.engine_core.engine_core
    scheduler, requests = core.scheduler, core.scheduler.requests
    answers = [ask_one(llm, prompt)]
    until(llm.reset_prefix_cache, core)

    updated = scheduler.update_from_output

    def update_from_output(scheduled: Any, output: Any) -> Any:
        """What was aborted during a step is known before its output is."""
        transferred = output.kv_connector_output
        if when == "in" and transferred and transferred.finished_recving:
            scheduler.finish_requests(list(transferred.finished_recving), RequestStatus.FINISHED_ABORTED)
            scheduler.update_from_output = updated
        return updated(scheduled, output)

    scheduler.update_from_output = update_from_output
    if when == "before":
        llm.collective_rpc(hold_loads)
    llm.llm_engine.add_request("again", prompt, SamplingParams(temperature=0, max_tokens=NUM_TOKENS))
    (name,) = requests
    was_held = True
    if when == "before":
        until(lambda: requests[name].status == RequestStatus.WAITING_FOR_REMOTE_KVS, core)
        scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
        for _ in range(5):
            core.step_fn()
            was_held = was_held and name in requests
        llm.collective_rpc(let_loads_end)
    until(lambda: name not in requests, core)
    for _ in range(5):
        core.step_fn()
    llm.llm_engine.abort_request(["again"])
    answers.append(ask_one(llm, prompt))
    until(lambda: not requests, core)
    return AbortedLoad(answers, was_held, len(requests))


def hold_loads(_worker: Any) -> None:
    """None of them has an answer until `let_loads_end`."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    connector = get_kv_transfer_group()
    original = connector.get_finished

    def get_finished(finished: set[str]) -> Any:
        futures = [future for future, _ in connector.worker_adapter.retrieve_futures.values()]
        for future in futures:
            future.query = lambda: False
        result = original(finished)
        for future in futures:
            del future.query
        return result

    connector.get_finished = get_finished


def let_loads_end(_worker: Any) -> None:
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    del get_kv_transfer_group().get_finished


def ask_one(llm: Any, prompt: str) -> Answer:
    (output,) = generate(llm, [prompt], NUM_TOKENS)
    return tokens_of([output])[0], output.num_cached_tokens


def until(is_so: Callable[[], Any], core: Any) -> None:
    stops_by = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < stops_by
        core.step_fn()
        time.sleep(0.01)
