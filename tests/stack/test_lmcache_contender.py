"""The contender lmcache as a user runs it: stock vLLM over the LMCache server, beside plain vLLM."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from running_stack import Stack, started
from tiny_models import random_text, save_tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
PIECE_TOKENS = 32


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    model = save_tiny_model(tmp_path_factory.mktemp("tiny"))
    options = ("--contenders", "plain,lmcache", "--no-ui", "--model", str(model))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXX", "none")  # without a compiler vLLM's servers compile nothing, which takes them minutes
        with started(tmp_path_factory.mktemp("lmcache"), *options) as stack:
            yield stack


def ask(stack: Stack, name: str, prompt: str) -> tuple[list[int], int, int]:
    """The answer's tokens, the prompt's length, and how many of its tokens were cached."""
    request: dict[str, Any] = {"prompt": prompt, "max_tokens": 16, "temperature": 0, "return_token_ids": True}
    with stack.client(name) as http:
        request["model"] = http.get("/v1/models").json()["data"][0]["id"]
        answer: dict[str, Any] = http.post("/v1/completions", json=request).raise_for_status().json()
    usage = answer["usage"]
    return answer["choices"][0]["token_ids"], usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]


def test_prefixes_survive_vllms_restart_and_the_servers_death_costs_only_speed(stack: Stack) -> None:
    rng = random.Random(3)
    first, second = random_text(rng, 300), random_text(rng, 300)
    longer = first + " " + random_text(rng, 60)
    expected = {prompt: ask(stack, "plain", prompt)[0] for prompt in (first, longer, second)}

    assert ask(stack, "lmcache", first)[::2] == (expected[first], 0)
    restarted = stack.command("restart", "lmcache", timeout_s=300)
    assert restarted.returncode == 0, restarted.stderr
    tokens, num_first_tokens, num_cached = ask(stack, "lmcache", first)
    assert tokens == expected[first]
    assert num_cached == (num_first_tokens - 1) // PIECE_TOKENS * PIECE_TOKENS, "whole pieces, vLLM's cache was empty"
    tokens, _, num_cached = ask(stack, "lmcache", longer)
    assert tokens == expected[longer]
    assert num_cached >= num_first_tokens - PIECE_TOKENS

    psutil.Process(stack.service("lmcache-server")["pid"]).kill()
    assert ask(stack, "lmcache", second)[::2] == (expected[second], 0)
    assert ask(stack, "lmcache", longer)[0] == expected[longer]
