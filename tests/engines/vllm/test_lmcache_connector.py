"""LMCache's own connector on real vLLM and a real server that is lost and comes back: answers stay what they are."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.lmcache_engine import NUM_TOKENS, Answer, abort_while_loading, lose_server
from support.lmcache_server import LMCacheServer
from support.tiny_models import random_text, save_tiny_model
from support.vllm_engine import plain_tokens, run_in_engine

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
PIECE_TOKENS = 32


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LMCacheServer]:
    with LMCacheServer(tmp_path_factory.mktemp("lmcache")) as server:
        yield server


def transfer(server: LMCacheServer, **settings: Any) -> dict[str, Any]:
    """A look-up is given up before the heartbeat notices, so that the worker still takes the server for healthy."""
    extra = {"host": "tcp://127.0.0.1", "port": server.port, "mq_timeout": 4.0, "heartbeat_interval": 10.0, **settings}
    return {
        "kv_connector": "FailSafeLMCacheConnector",
        "kv_connector_module_path": "kvarena.engines.vllm.lmcache_connector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {f"lmcache.mp.{key}": value for key, value in extra.items()},
    }


@pytest.mark.parametrize(
    ("how", "mode"), [("frozen", "engine_driven"), ("forgotten", "engine_driven"), ("frozen", "lmcache_driven")]
)
def test_a_lost_server_costs_only_speed(how: str, mode: str, server: LMCacheServer, tmp_path: Path) -> None:
    """The engine moves KV by default on a CPU, LMCache's server on a GPU."""
    model = str(save_tiny_model(tmp_path))
    rng = random.Random(f"{how} {mode}")
    known, new, later = ([random_text(rng, 200) for _ in range(3)] for _ in range(3))
    settings = transfer(server, mp_transfer_mode=mode)
    seen = run_in_engine(lose_server, how, server.pid, model, settings, known, new, later)

    prompts = [*known, *new, *later]
    expected = dict(zip(prompts, run_in_engine(plain_tokens, model, prompts, NUM_TOKENS), strict=True))
    assert_answers(seen.known, known, expected)
    assert_answers(seen.lost, [*new, *known, *(new if how == "frozen" else [])], expected)
    assert_answers(seen.after, later, expected)
    assert_answers(seen.kept, [*later, *known], expected)
    assert all(num_cached == 0 for _, num_cached in [*seen.known, *seen.lost[:6], *seen.after])
    assert all(num_cached >= 5 * PIECE_TOKENS for _, num_cached in seen.kept), "stored and found again"


@pytest.mark.parametrize("when", ["before", "in"])
def test_a_request_that_is_aborted_while_it_loads_ends_itself_alone(
    when: str, server: LMCacheServer, tmp_path: Path
) -> None:
    """It ended the engine, and all requests with it."""
    model, prompt = str(save_tiny_model(tmp_path)), random_text(random.Random(when), 200)
    seen = run_in_engine(abort_while_loading, model, transfer(server), prompt, when)
    (expected,) = run_in_engine(plain_tokens, model, [prompt], NUM_TOKENS)
    assert [tokens for tokens, _ in seen.answers] == [expected] * 2
    assert seen.answers[1][1] >= 5 * PIECE_TOKENS, "found again"
    assert seen.was_held
    assert seen.num_left == 0


def assert_answers(answers: list[Answer], prompts: list[str], expected: dict[str, list[int]]) -> None:
    assert [tokens for tokens, _ in answers] == [expected[prompt] for prompt in prompts]
