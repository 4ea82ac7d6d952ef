"""Many requests, on real vLLM: salts, follow-ups, preemption, aborts, a store that is too small or dies."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvarena.core.report import MIN_RATIO
from kvarena.engines.vllm.config import BlendConfig
from support.lmcache_server import LMCacheServer
from support.tiny_models import random_text, save_tiny_model, tiny_tokenizer
from support.vllm_engine import (
    MEMORY,
    PIECES,
    Outcome,
    Step,
    num_times_noted,
    plain_tokens,
    ratios_in_a_queue,
    run_after_a_weight_update,
    run_in_engine,
    run_session,
    run_steps,
    seeded_tokens,
    watch_few_tokens,
)

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


@pytest.mark.parametrize("settings", [{}, {"max_num_batched_tokens": 128, "max_num_seqs": 4}], ids=["whole", "pieces"])
def test_cached_tokens_are_those_that_were_reused(model: str, chunks: list[str], settings: dict[str, Any]) -> None:
    """Of a new prompt, one with new chunks, and a follow-up. What was recomputed isn't cached."""
    first, second = prompt_of(chunks[:4], "old cat"), prompt_of(chunks[5:1:-1], "old cat")
    asked = [(first, 1, "a"), (first, 1, "b"), (first, 0, "b"), (first, 0.3, "b"), (second, 0.3, "b")]
    steps = [Step([prompt], 8, {"ratio": ratio}, salt) for prompt, ratio, salt in asked]
    steps.append(Step([first + " lamp goat", second], 8, {"ratio": 0.3}, "b"))
    outcomes = run_in_engine(run_steps, model, MEMORY, steps, settings)
    for outcome in outcomes:
        assert outcome.num_cached_tokens == [report["num_reused_tokens"] for report in outcome.reports]
    cold, other_salt, naive, part, half_new, follow_up = (outcome.reports[0] for outcome in outcomes)
    assert [report["num_reused_tokens"] + report["num_recomputed_tokens"] for report in (cold, other_salt)] == [0, 0]
    assert naive["num_reused_tokens"] > 0.8 * naive["num_prompt_tokens"]
    assert 0 < part["num_recomputed_tokens"] < part["num_reused_tokens"] < naive["num_reused_tokens"]
    assert 0 < half_new["num_reused_tokens"] < part["num_reused_tokens"]
    assert follow_up["num_prefix_tokens"] > 0


def test_a_seed_draws_the_same_however_a_prompt_is_prefilled(model: str, chunks: list[str]) -> None:
    """vLLM draws a token after each piece and takes it back; on a CPU it couldn't, and its engine ended."""
    rng = random.Random(31)
    prompts = [prompt_of(rng.sample(chunks, 5), random_text(rng, 4)) for _ in range(4)]
    whole = run_in_engine(seeded_tokens, model, None, prompts)
    assert run_in_engine(seeded_tokens, model, None, prompts, **PIECES) == whole
    assert run_in_engine(seeded_tokens, model, replace(MEMORY, ratio=1.0), prompts, **PIECES) == whole


def test_chunks_are_named_by_their_texts_or_token_ids(model: str, chunks: list[str]) -> None:
    """Without the middleware that tokenises them for a server."""
    prompt = "green " + "\n".join(chunks[:3]) + " river"
    ids = [tiny_tokenizer().encode(text) for text in chunks[:3]]
    steps = [Step([prompt], 8, {"ratio": 0, "chunks": named}, salt) for named, salt in ((chunks[:3], "a"), (ids, "b"))]
    by_text, by_ids = [outcome.reports[0] for outcome in run_in_engine(run_steps, model, MEMORY, steps, {})]
    assert by_text["store_misses"] == by_ids["store_misses"] == 3
    assert by_text["spans"] == by_ids["spans"]


def test_approximate_kv_never_enters_the_exact_cache(model: str, chunks: list[str]) -> None:
    prompts = [prompt_of(chunks[:5], "paper"), prompt_of(chunks[5::-1], "paper")]
    expected = run_in_engine(plain_tokens, model, prompts, 16)
    steps = [Step(prompts, 16, {"ratio": 0}), Step(prompts, 16, {"ratio": 0}), Step(prompts, 16, {"ratio": 1})]
    first, second, exact = run_in_engine(run_steps, model, MEMORY, steps, {})
    assert first.tokens == second.tokens
    assert exact.tokens == expected
    assert first.tokens != expected, "naive reuse changed nothing, so this test shows nothing"
    assert [report["approximate"] for report in second.reports + exact.reports] == [True, True, False, False]


@pytest.mark.parametrize("step_tokens", [0, 150], ids=["at once", "in pieces"])
def test_preempted_and_aborted_requests_leave_right_answers_and_nothing_else(
    model: str, chunks: list[str], step_tokens: int
) -> None:
    rng = random.Random(12)
    prompts = [prompt_of(rng.sample(chunks, 5), random_text(rng, 4)) for _ in range(12)]
    expected = run_in_engine(plain_tokens, model, prompts, 160)
    steps = [Step(prompts, 160, {"ratio": 1}), Step(prompts, 160, {"ratio": 1}, abort_after=30)]
    tight = {"num_gpu_blocks_override": 30, "max_num_seqs": 12, "max_num_batched_tokens": 512}
    whole, aborted = run_in_engine(run_steps, model, replace(MEMORY, step_tokens=step_tokens), steps, tight)
    assert whole.tokens == expected
    assert whole.num_preemptions > 0
    assert aborted.tokens == expected[6:]
    assert whole.num_left_behind == aborted.num_left_behind == 0
    assert aborted.aborted_reports[0] is not None, "what was computed counts, aborted or not"
    for report, finished in zip(aborted.aborted_reports, whole.reports, strict=False):
        if report is None:
            continue
        assert 0 < report["num_prompt_tokens"] <= finished["num_prompt_tokens"]
        parts = [report[f"num_{part}_tokens"] for part in ("reused", "recomputed", "computed")]
        assert sum(parts) == report["num_prompt_tokens"]
        assert min(parts) >= 0


def test_waiting_requests_blend_in_turn_and_not_all_in_one_step(model: str, chunks: list[str]) -> None:
    """The budget of a step is what counts, and the order is that in which they came."""
    step_tokens = 700
    prompts = [prompt_of(chunks[i:] + chunks[:i], "marsh") for i in range(8)]
    expected = run_in_engine(plain_tokens, model, prompts, 16)
    config = replace(MEMORY, step_tokens=step_tokens)
    steps = [Step(prompts[:1], 1, {"ratio": 0}), Step(prompts, 16, {"ratio": 1})]
    _, outcome = run_in_engine(run_steps, model, config, steps, {})
    assert outcome.tokens == expected
    firsts = [arrivals[0] for arrivals in outcome.arrivals]
    assert firsts == sorted(firsts)
    num_run = [report["num_prompt_tokens"] for report in outcome.reports]
    for step in set(firsts):
        together = [tokens for tokens, first in zip(num_run, firsts, strict=True) if first == step]
        assert len(together) == 1 or sum(together) <= step_tokens + len(together)
    assert len(set(firsts)) == 8


@pytest.mark.parametrize("params", [{"ratio": 1}, {"policy": "kv_deviation", "ratio": 0.3, "check_layer": 1}])
def test_others_decode_between_the_pieces_of_a_long_blend(
    model: str, chunks: list[str], params: dict[str, Any]
) -> None:
    long, other = prompt_of(chunks, "stone"), "a short one"
    whole, _ = run_in_engine(run_steps, model, MEMORY, [Step([long], 16, params), Step([other], 40)], {})
    config = replace(MEMORY, step_tokens=100)
    steps = [Step([other, long], 40, params), Step([other, prompt_of(chunks[::-1], "stone")], 40, params)]
    cold, warm = run_in_engine(run_steps, model, config, steps, {})
    assert cold.tokens[1][:16] == whole.tokens[0]
    assert [report["in_pieces"] for report in (*whole.reports, *cold.reports)] == [False, False, True]
    for outcome in (cold, warm):
        decoding, blending = outcome.arrivals
        num_pieces = blending[0] - decoding[0]
        assert num_pieces >= outcome.reports[1]["num_recomputed_tokens"] // 100
        assert decoding[: num_pieces + 1] == list(range(decoding[0], blending[0] + 1)), "a token in every step"
        assert outcome.num_left_behind == 0
    for name in ("num_reused_tokens", "num_recomputed_tokens", "num_computed_tokens", "store_misses", "spans"):
        assert cold.reports[1][name] == whole.reports[0][name]


def test_others_decode_while_a_long_new_chunk_is_computed(model: str, chunks: list[str]) -> None:
    long, other, params = prompt_of([" ".join(chunks)], "stone"), "a short one", {"policy": "none"}
    (whole,) = run_in_engine(run_steps, model, MEMORY, [Step([long], 16, params)], {})
    config = replace(MEMORY, step_tokens=100)
    (cold,) = run_in_engine(run_steps, model, config, [Step([other, long], 40, params)], {})
    assert cold.tokens[1][:16] == whole.tokens[0]
    decoding, blending = cold.arrivals
    num_pieces = blending[0] - decoding[0]
    assert num_pieces >= cold.reports[1]["num_computed_tokens"] // 100 > 3
    assert decoding[: num_pieces + 1] == list(range(decoding[0], blending[0] + 1)), "a token in every step"


def test_a_long_blend_that_is_aborted_leaves_nothing(model: str, chunks: list[str]) -> None:
    prompts = [prompt_of(chunks[i:] + chunks[:i], "bridge") for i in range(4)]
    expected = run_in_engine(plain_tokens, model, prompts, 24)
    config = replace(MEMORY, step_tokens=64)
    steps = [Step(prompts, 24, {"ratio": 1}, abort_after=3), Step(prompts, 24, {"ratio": 1})]
    aborted, whole = run_in_engine(run_steps, model, config, steps, {})
    assert aborted.tokens == expected[2:]
    assert whole.tokens == expected
    assert aborted.num_left_behind == whole.num_left_behind == 0
    assert aborted.aborted_reports == [None, None], "no token of theirs was ready"


def test_a_long_blend_that_is_aborted_teaches_no_time(model: str, chunks: list[str]) -> None:
    """It would count as one that took no time, and all since its start as what a request takes beside it."""
    prompts = [prompt_of(chunks[i:] + chunks[:i], "bridge") for i in range(2)]
    step = Step(prompts, 4, {"ratio": 1}, abort_after=3)
    assert run_in_engine(num_times_noted, model, replace(MEMORY, step_tokens=64), step) == 1


def test_a_prompt_that_is_too_long_to_be_scored_is_computed(model: str, chunks: list[str]) -> None:
    prompts = [prompt_of(chunks[:5], "paper"), prompt_of(chunks[5::-1], "paper")]
    scoring = Step(prompts[1:], 16, {"policy": "none", "store": "scores"}, damage=watch_few_tokens)
    _, outcome = run_in_engine(run_steps, model, MEMORY, [Step(prompts[:1], 1, {"ratio": 0}), scoring], {})
    assert outcome.tokens == run_in_engine(plain_tokens, model, prompts[1:], 16)
    (report,) = outcome.reports
    assert not report["approximate"]
    assert report["num_reused_tokens"] == 0


def test_a_prompt_that_grows_is_blended_as_far_as_it_was_planned(model: str, chunks: list[str]) -> None:
    """A streaming-input session that loses its blocks after its prompt grew."""
    texts = [prompt_of(chunks[:4], "paper"), " tree goat river"]
    expected, _ = run_in_engine(run_session, model, None, texts)
    tokens, reports = run_in_engine(run_session, model, MEMORY, texts)
    assert tokens == expected
    (report,) = reports
    assert report["store_misses"] == 4
    parts = [report[f"num_{part}_tokens"] for part in ("reused", "recomputed", "computed")]
    assert sum(parts) == report["num_prompt_tokens"]


def test_the_wait_for_others_blends_counts_against_the_time(model: str, chunks: list[str]) -> None:
    """Each blends in a step of its own, and what those before it took is gone."""
    prompts = [prompt_of(chunks[i:] + chunks[:i], "heron") for i in range(8)]
    config = replace(MEMORY, step_tokens=1000)
    ratios = run_in_engine(ratios_in_a_queue, model, config, prompts)
    assert ratios[0] > 2 * ratios[-1]


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


def reasons(outcome: Outcome) -> dict[str, int]:
    """Of the first request's misses. Those that are listed are those that are counted."""
    report = outcome.reports[0]
    listed = Counter(miss["reason"] for miss in report["misses"])
    assert listed == report["misses_by_reason"]
    assert (
        sum(listed[reason] for reason in listed if reason not in ("too_short", "mostly_new")) == report["store_misses"]
    )
    by_reason: dict[str, int] = report["misses_by_reason"]
    return by_reason


def test_the_reason_of_each_miss_is_told(model: str, chunks: list[str]) -> None:
    question, other = prompt_of(chunks[:3], "old cat"), prompt_of([*chunks[2::-1], "lamp"], "old cat")
    new_text = random_text(random.Random(13), 400)
    steps = [
        Step([question], 8, {"ratio": 0}),
        Step([other], 8, {"ratio": 0}),
        Step([other], 8, {"ratio": 0}, salt="a"),
        Step([prompt_of(chunks[3:5], "tea")], 8, {"ratio": 0}, salt="a"),
        Step([prompt_of(chunks[3:5], "tea")], 8, {"ratio": 0}, salt="b"),
        Step([prompt_of(chunks[3:5], "tea")], 8, {"ratio": 0}),
        Step(["\n".join([new_text, chunks[0]])], 8, {"ratio": 0}),
        Step([question], 8, {"ratio": 0}),
    ]
    cold, known, public, secret, stranger, without, far, again = run_in_engine(run_steps, model, MEMORY, steps, {})
    assert reasons(cold) == {"never_seen": 3}
    assert reasons(known) == {"too_short": 1}
    assert reasons(public) == {"other_salt": 3, "too_short": 1}
    assert reasons(secret) == reasons(stranger) == reasons(without) == {"never_seen": 2}, "a tenant's salt is a secret"
    assert reasons(far) == {"mostly_new": 1}
    assert reasons(again) == {}, "vLLM's prefix cache has it"

    small = replace(MEMORY, store_bytes=0)
    steps = [Step([question], 8, {"ratio": 0}), Step([other], 8, {"ratio": 0})]
    _, lost = run_in_engine(run_steps, model, small, steps, {})
    assert reasons(lost) == {"evicted": 3, "too_short": 1}


def test_what_another_model_has_stored_is_told(
    model: str, chunks: list[str], server: LMCacheServer, tmp_path: Path
) -> None:
    """Of the same tokenizer: the KV is another's. And of a server that is down, that it is."""
    config, prompt = over_lmcache(server, tmp_path), prompt_of(chunks[:3], "old cat")
    other = str(save_tiny_model(tmp_path / "other", seed=1))
    (first,) = run_in_engine(run_steps, other, config, [Step([prompt], 8, {"ratio": 0})], {})
    assert reasons(first) == {"never_seen": 3}
    steps = [Step([prompt], 8, {"ratio": 0}), Step([prompt], 8, {"ratio": 0.2}, kill_pid=server.pid)]
    second, down = run_in_engine(run_steps, model, config, steps, {})
    assert reasons(second) == {"other_model": 3}
    assert reasons(down) == {"store_down": 3}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[LMCacheServer]:
    with LMCacheServer(tmp_path) as server:
        yield server


def over_lmcache(server: LMCacheServer, index: Path) -> BlendConfig:
    return BlendConfig(
        store="lmcache",
        lmcache_url=server.url,
        lmcache_http_url=server.http_url,
        lmcache_timeout_s=5.0,
        step_tokens=300,
        index_path=str(index / "known.sqlite"),
    )


@pytest.mark.parametrize("store", ["memory", "lmcache"])
def test_what_was_stored_before_a_weight_update_isnt_used(
    model: str, chunks: list[str], server: LMCacheServer, tmp_path: Path, store: str
) -> None:
    prompts = [prompt_of(chunks[:4], "old cat"), prompt_of(chunks[3::-1], "old cat")]
    steps = [Step([prompt], 16, {"ratio": 0}) for prompt in prompts]
    config = MEMORY if store == "memory" else over_lmcache(server, tmp_path)
    updated = run_in_engine(run_after_a_weight_update, model, config, steps, steps)
    fresh = run_in_engine(run_after_a_weight_update, model, MEMORY, [], steps)
    assert [outcome.tokens for outcome in updated] == [outcome.tokens for outcome in fresh]
    found = [(outcome.reports[0]["store_hits"], outcome.reports[0]["store_misses"]) for outcome in updated]
    assert found == [(0, 4), (4, 0)]


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
