"""The contender lmcache as a user runs it: vLLM over the LMCache server, beside plain vLLM."""

from __future__ import annotations

import json
import random
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import httpx
import psutil
import pytest

from support.running_stack import Stack, started
from support.salt_isolation import ask_over, assert_isolated
from support.tiny_models import random_text, save_tiny_model
from support.verdicts import check_server
from support.waiting import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
PIECE_TOKENS = 32
LONG_ANSWER_TOKENS = 400


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    model, data = save_tiny_model(tmp_path_factory.mktemp("tiny")), tmp_path_factory.mktemp("data")
    (data / "note.md").write_text("tea and rain")
    options = ("--contenders", "plain,lmcache", "--no-ui", "--model", str(model), "--data", str(data))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_SERVER_DEV_MODE", "1")  # has `/reset_prefix_cache`
        with started(tmp_path_factory.mktemp("lmcache"), *options) as stack:
            yield stack


@pytest.fixture(scope="module")
def plain(stack: Stack) -> Iterator[httpx.Client]:
    with stack.client("plain") as http:
        yield http


@pytest.fixture(scope="module")
def lmcache(stack: Stack) -> Iterator[httpx.Client]:
    with stack.client("lmcache") as http:
        yield http


def test_verdicts_are_those_of_the_table(lmcache: httpx.Client) -> None:
    check_server(lmcache)


def ask(http: httpx.Client, prompt: str) -> tuple[list[int], int, int]:
    """The answer's tokens, the prompt's length, and how many of its tokens were cached."""
    answer: dict[str, Any] = http.post("/v1/completions", json=request(prompt)).raise_for_status().json()
    usage = answer["usage"]
    return answer["choices"][0]["token_ids"], usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]


def request(prompt: str, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "max_tokens": 16, "temperature": 0, "return_token_ids": True} | more


def long_answer(http: httpx.Client, prompt: str, under_way: Callable[[], object] = lambda: None) -> list[int]:
    """Its tokens. `under_way` is called when the first of them has come."""
    tokens: list[int] = []
    body = request(prompt, max_tokens=LONG_ANSWER_TOKENS, ignore_eos=True, stream=True)
    with http.stream("POST", "/v1/completions", json=body) as reply:
        reply.raise_for_status()
        for line in reply.iter_lines():
            if line.startswith("data: {"):
                if not tokens:
                    under_way()
                tokens += json.loads(line.removeprefix("data: "))["choices"][0]["token_ids"]
    return tokens


def restart_vllm(stack: Stack) -> None:
    before = stack.service("lmcache")
    restarted = stack.command("restart", "lmcache", timeout_s=600)
    assert restarted.returncode == 0, restarted.stderr
    after = stack.service("lmcache")
    assert (after["state"], after["pid"] != before["pid"]) == ("healthy", True)


def forget_prefixes(lmcache: httpx.Client) -> None:
    """In vLLM's own cache, as a restart does, which takes a minute."""
    wait_until(lambda: lmcache.post("/reset_prefix_cache").raise_for_status().json()["success"])


def num_stored_bytes(stack: Stack) -> float:
    """0 while there is no server."""
    http_port = stack.recorded("lmcache-server").other_ports[0]
    try:
        metrics = httpx.get(f"http://127.0.0.1:{http_port}/metrics", trust_env=False, timeout=5).text
    except httpx.TransportError:
        return 0.0
    found = [line for line in metrics.splitlines() if line.startswith("lmcache_mp_l1_memory_usage_bytes")]
    return sum(float(line.split()[-1]) for line in found)


def ask_until_stored(stack: Stack, plain: httpx.Client, lmcache: httpx.Client, rng: random.Random) -> str:
    """The first prompt that LMCache keeps once its server is back."""
    stops_by = time.monotonic() + 300
    while time.monotonic() < stops_by:
        before, prompt = num_stored_bytes(stack), random_text(rng, 300)
        assert ask(lmcache, prompt)[0] == ask(plain, prompt)[0]
        if num_stored_bytes(stack) > before:
            return prompt
        time.sleep(1)
    raise AssertionError("nothing is stored after the server's return")


def test_prefixes_survive_vllms_restart_and_a_lost_server_costs_only_speed(
    stack: Stack, plain: httpx.Client, lmcache: httpx.Client
) -> None:
    """A restart empties vLLM's own cache. Strangers don't find what LMCache kept over it."""
    rng = random.Random(3)
    first, second = random_text(rng, 300), random_text(rng, 300)
    longer = first + " " + random_text(rng, 60)
    expected = {prompt: ask(plain, prompt)[0] for prompt in (first, longer, second)}

    assert ask(lmcache, first)[::2] == (expected[first], 0)
    assert ask(lmcache, second)[::2] == (expected[second], 0)
    assert_strangers_find_nothing(lmcache, 1000, restart=lambda: restart_vllm(stack))
    tokens, num_first_tokens, num_cached = ask(lmcache, first)
    assert tokens == expected[first]
    assert num_cached == (num_first_tokens - 1) // PIECE_TOKENS * PIECE_TOKENS, "whole pieces, vLLM's cache was empty"
    tokens, _, num_cached = ask(lmcache, longer)
    assert tokens == expected[longer]
    assert num_cached >= num_first_tokens - PIECE_TOKENS

    lost = lose_server(stack, plain, lmcache, rng, signal.SIGSTOP, known=[second, longer])
    again = ask_until_stored(stack, plain, lmcache, rng)
    forget_prefixes(lmcache)
    assert_found_again(plain, lmcache, again)
    for prompt in lost:
        assert ask(lmcache, prompt)[0] == ask(plain, prompt)[0], "no KV that nobody stored"

    lose_server(stack, plain, lmcache, rng, signal.SIGKILL, known=[second, longer])
    again = ask_until_stored(stack, plain, lmcache, rng)
    forget_prefixes(lmcache)
    assert_found_again(plain, lmcache, again)


def test_a_strangers_prompt_is_as_cold_as_a_new_one(stack: Stack, lmcache: httpx.Client) -> None:
    assert_strangers_find_nothing(lmcache, 0)


def assert_strangers_find_nothing(
    lmcache: httpx.Client, seed: int, restart: Callable[[], object] | None = None
) -> None:
    """A false alarm comes in one of 10,000 runs at most."""
    ask_salted = ask_over(lmcache, lmcache.get("/v1/models").json()["data"][0]["id"])
    assert_isolated(
        ask_salted, lambda number: random_text(random.Random(seed + number), 600), num_rounds=24, restart=restart
    )


def lose_server(
    stack: Stack,
    plain: httpx.Client,
    lmcache: httpx.Client,
    rng: random.Random,
    loss: signal.Signals,
    known: list[str],
) -> list[str]:
    """With answers under way, and eight prompts at once while it is gone. All are plain's, by the same processes.

    Returns the new prompts that were asked meanwhile.
    """
    new, long = [random_text(rng, 300) for _ in range(6)], [random_text(rng, 200) for _ in range(2)]
    prompts = [*new, *known]
    expected = [ask(plain, prompt)[0] for prompt in prompts]
    expected_long = [long_answer(plain, prompt) for prompt in long]
    server, vllm = (psutil.Process(stack.service(name)["pid"]) for name in ("lmcache-server", "lmcache"))
    engine = {process.pid for process in vllm.children(recursive=True)}

    under_way = Barrier(len(long) + 1, timeout=120)
    with ThreadPoolExecutor(16) as pool:
        running = [pool.submit(long_answer, lmcache, prompt, under_way.wait) for prompt in long]
        under_way.wait()
        server.send_signal(loss)
        try:
            answers = list(pool.map(lambda prompt: ask(lmcache, prompt)[0], prompts))
            assert answers == expected
            assert [answer.result() for answer in running] == expected_long
            assert [ask(lmcache, prompt)[0] for prompt in prompts] == expected
        finally:
            if loss == signal.SIGSTOP:
                server.send_signal(signal.SIGCONT)
    assert stack.service("lmcache")["pid"] == vllm.pid
    assert engine <= {process.pid for process in vllm.children(recursive=True)}, "its engine is another"
    return new


def assert_found_again(plain: httpx.Client, lmcache: httpx.Client, prompt: str) -> None:
    tokens, num_tokens, num_cached = ask(lmcache, prompt)
    assert tokens == ask(plain, prompt)[0]
    assert num_cached == (num_tokens - 1) // PIECE_TOKENS * PIECE_TOKENS
