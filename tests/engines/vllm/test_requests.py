"""Many requests, on real vLLM: salts, follow-ups, preemption, aborts, a store that is too small or dies."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvarena.core.blend import MIN_RATIO
from kvarena.engines.vllm.config import BlendConfig
from support.lmcache_server import LMCacheServer
from support.tiny_models import random_text, save_tiny_model
from support.vllm_engine import MEMORY, Step, plain_tokens, run_in_engine, run_steps

pytestmark = pytest.mark.slow
SEPARATOR = " # # "


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def chunks() -> list[str]:
    rng = random.Random(11)
    return [random_text(rng, rng.choice([40, 60, 80])) for _ in range(8)]


def prompt_of(chunks: list[str], question: str) -> str:
    return SEPARATOR.join(["tea", *chunks, question])


def test_salts_follow_ups_and_what_is_stored(model: str, chunks: list[str]) -> None:
    question, other = prompt_of(chunks[:4], "old cat"), prompt_of(chunks[3::-1], "old cat")
    unseparated = "\n".join(["green", *chunks[2:0:-1], "river"])
    steps = [
        Step([question], 40, {"ratio": 0}, salt="a"),
        Step([other], 8, {"ratio": 0}, salt="b"),
        Step([unseparated], 8, {"ratio": 0}, salt="a"),
        Step([unseparated], 8, {"ratio": 0}, salt="c"),
        Step([question + " lamp goat"], 8, {"ratio": 0}, salt="a"),
        Step([question], 8, {"ratio": 0, "store": False}, salt="d"),
        Step([other], 8, {"ratio": 0}, salt="d"),
    ]
    outcomes = run_in_engine(run_steps, model, MEMORY, steps, {})
    cold, other_salt, known, unknown, follow_up, unstored, again = [outcome.reports[0] for outcome in outcomes]
    assert cold["store_misses"] == 4
    assert (other_salt["store_hits"], other_salt["store_misses"]) == (0, 4)
    assert known["store_hits"] == 2
    assert known["num_reused_tokens"] > 0.8 * known["num_prompt_tokens"]
    assert unknown["num_reused_tokens"] == 0
    assert not unknown["approximate"]
    assert follow_up["num_prefix_tokens"] >= 0.8 * cold["num_prompt_tokens"]
    assert follow_up["store_misses"] == 0
    assert unstored["store_misses"] == again["store_misses"] == 4


def test_approximate_kv_never_enters_the_exact_cache(model: str, chunks: list[str]) -> None:
    prompts = [prompt_of(chunks[:5], "paper"), prompt_of(chunks[5::-1], "paper")]
    expected = run_in_engine(plain_tokens, model, prompts, 16)
    steps = [Step(prompts, 16, {"ratio": 0}), Step(prompts, 16, {"ratio": 0}), Step(prompts, 16, {"ratio": 1})]
    first, second, exact = run_in_engine(run_steps, model, MEMORY, steps, {})
    assert first.tokens == second.tokens
    assert exact.tokens == expected
    assert first.tokens != expected, "naive reuse changed nothing, so this test shows nothing"
    assert [report["approximate"] for report in second.reports + exact.reports] == [True, True, False, False]


def test_preempted_and_aborted_requests_leave_right_answers_and_nothing_else(model: str, chunks: list[str]) -> None:
    rng = random.Random(12)
    prompts = [prompt_of(rng.sample(chunks, 5), random_text(rng, 4)) for _ in range(12)]
    expected = run_in_engine(plain_tokens, model, prompts, 160)
    steps = [Step(prompts, 160, {"ratio": 1}), Step(prompts, 160, {"ratio": 1}, abort_after=30)]
    tight = {"num_gpu_blocks_override": 30, "max_num_seqs": 12, "max_num_batched_tokens": 512}
    whole, aborted = run_in_engine(run_steps, model, MEMORY, steps, tight)
    assert whole.tokens == expected
    assert whole.num_preemptions > 0
    assert aborted.tokens == expected[6:]
    assert whole.num_left_behind == aborted.num_left_behind == 0


def test_a_time_to_first_token_decides_on_the_ratio(model: str, chunks: list[str]) -> None:
    """Blends teach what tokens cost; blocks that were blended under one time aren't another's."""
    prompts = [prompt_of(chunks[i:] + chunks[:i], "heron") for i in range(4)]
    steps = [
        Step(prompts[:1], 8, {"max_ttft_ms": 60_000}),
        Step(prompts[1:2], 8, {"max_ttft_ms": 60_000}),
        Step(prompts[1:2], 8, {"max_ttft_ms": 60_000}),
        Step(prompts[1:2], 8, {"max_ttft_ms": 0.001}),
        Step(prompts[2:], 8, {"ratio": "auto", "max_ttft_ms": 0.001}),
    ]
    expected = run_in_engine(plain_tokens, model, prompts[1:2], 8)
    outcomes = run_in_engine(run_steps, model, MEMORY, steps, {})
    unknown, whole, again, late = (outcome.reports[0] for outcome in outcomes[:4])
    assert unknown["ratio"] == MEMORY.ratio
    assert (whole["ratio"], whole["max_ttft_ms"], whole["approximate"]) == (1.0, 60_000, True)
    assert outcomes[1].tokens == outcomes[2].tokens == expected
    assert again["num_prefix_tokens"] > 0.8 * again["num_prompt_tokens"]
    assert (late["ratio"], late["num_prefix_tokens"]) == (MIN_RATIO, 0)
    assert [report["ratio"] for report in outcomes[4].reports] == [MIN_RATIO] * 2


def test_the_servers_own_time_holds_for_what_names_no_ratio(model: str, chunks: list[str]) -> None:
    prompts = [prompt_of(chunks[i:] + chunks[:i], "heron") for i in range(4)]
    given: list[dict[str, Any]] = [{}, {}, {"ratio": 0.2}, {"policy": "none"}]
    steps = [Step([prompt], 8, params) for prompt, params in zip(prompts, given, strict=True)]
    outcomes = run_in_engine(run_steps, model, replace(MEMORY, max_ttft_ms=0.001), steps, {})
    first, timed, named, none = (outcome.reports[0] for outcome in outcomes)
    assert (first["ratio"], timed["ratio"], named["ratio"]) == (MEMORY.ratio, MIN_RATIO, 0.2)
    assert ["max_ttft_ms" in report for report in (first, timed, named, none)] == [True, True, False, False]
    assert none["num_recomputed_tokens"] == 0


def test_a_store_that_is_too_small_costs_only_speed(model: str, chunks: list[str]) -> None:
    prompts = [prompt_of(chunks[i:] + chunks[:i], "under") for i in range(6)]
    expected = run_in_engine(plain_tokens, model, prompts, 16)
    for budget in (0, 300_000):
        config = replace(MEMORY, store_bytes=budget)
        steps = [Step([prompt], 16, {"ratio": 1}) for prompt in prompts]
        outcomes = run_in_engine(run_steps, model, config, steps, {})
        assert [outcome.tokens[0] for outcome in outcomes] == expected
        assert sum(outcome.reports[0]["store_misses"] for outcome in outcomes) > 20


@pytest.fixture
def server(tmp_path: Path) -> Iterator[LMCacheServer]:
    with LMCacheServer(tmp_path) as server:
        yield server


def over_lmcache(server: LMCacheServer, index: Path) -> BlendConfig:
    return BlendConfig(
        store="lmcache",
        lmcache_url=server.url,
        lmcache_http_url=server.http_url,
        index_path=str(index / "known.sqlite"),
    )


def test_lmcache_outlives_vllm_and_its_death_costs_only_speed(
    model: str, chunks: list[str], server: LMCacheServer, tmp_path: Path
) -> None:
    prompts = [prompt_of(chunks[i:] + chunks[:i], "bread") for i in range(6)]
    unseparated = ["\n".join(["green", *chunks[5:1:-1], "river"])]
    expected = run_in_engine(plain_tokens, model, [*prompts, *unseparated], 16)
    config = over_lmcache(server, tmp_path)

    (cold,) = run_in_engine(run_steps, model, config, [Step(prompts[:1], 16, {"ratio": 1})], {})
    assert cold.reports[0]["store_misses"] == len(chunks)

    steps = [Step([prompt], 16, {"ratio": 1}) for prompt in [*unseparated, *prompts]]
    steps[3] = replace(steps[3], kill_pid=server.pid)
    outcomes = run_in_engine(run_steps, model, config, steps, {})
    assert [outcome.tokens[0] for outcome in outcomes] == [*expected[6:], *expected[:6]]
    reports = [outcome.reports[0] for outcome in outcomes]
    assert [report["store_hits"] for report in reports[:3]] == [4, len(chunks), len(chunks)]
    assert [report["store_misses"] for report in reports[3:]] == [len(chunks)] * 4
    assert all(report["store_errors"] > 0 for report in reports[3:])


def test_a_damaged_index_file_costs_only_what_it_knew(model: str, chunks: list[str], tmp_path: Path) -> None:
    (tmp_path / "known.sqlite").write_bytes(b"not a database" * 100)
    nowhere = BlendConfig(
        store="lmcache",
        lmcache_url="tcp://127.0.0.1:9",
        lmcache_http_url="http://127.0.0.1:9",
        index_path=str(tmp_path / "known.sqlite"),
    )
    prompt = prompt_of(chunks[:3], "hill")
    expected = run_in_engine(plain_tokens, model, [prompt], 16)
    (outcome,) = run_in_engine(run_steps, model, nowhere, [Step([prompt], 16, {"ratio": 1})], {})
    assert outcome.tokens == expected
    assert outcome.reports[0]["store_errors"] > 0
