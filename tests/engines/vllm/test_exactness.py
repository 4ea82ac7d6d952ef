"""The blend against independent computations, on real vLLM with tiny random models.

Ratio 1.0 equals plain vLLM, token for token and in its KV; ratio 0 equals naive reuse written with Hugging Face.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kvarena.engines.hf.blend import HFBlender
from kvarena.policies import params as registry
from kvarena.policies.params import BlendParams
from support.blended import Blended
from support.references import CacheBlend, NaiveReuse
from support.tiny_models import random_text, save_tiny_model
from support.vllm_engine import (
    MEMORY,
    Step,
    plain_tokens,
    prefill_kv,
    run_in_engine,
    run_steps,
    run_steps_and_lose_a_rank,
    run_steps_and_watch_batches,
    take_memory,
)

pytestmark = pytest.mark.slow
SEPARATOR = " # # "
NUM_TOKENS = 32


def make_prompts(seed: int, count: int, *, all_separated: bool = False) -> list[str]:
    """Prompts over one pool of chunks of uneven length, 2 to 8 in each, in several orders, some without separators."""
    rng = random.Random(seed)
    pool = [random_text(rng, rng.choice([8, 20, 35, 60])) for _ in range(14)]
    prompts = []
    for i in range(count):
        chunks = rng.sample(pool, rng.randint(2, 8))
        joiner = SEPARATOR if all_separated or i % 4 else "\n"
        prompts.append(joiner.join([random_text(rng, 4), *chunks, random_text(rng, 5)]))
    return prompts


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def bf16_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("bf16"), dtype=torch.bfloat16))


def test_ratio_one_equals_plain_vllm(model: str) -> None:
    prompts = make_prompts(0, 24)
    expected = run_in_engine(plain_tokens, model, prompts, NUM_TOKENS)
    steps = [Step([prompt], NUM_TOKENS, {"ratio": 1.0}) for prompt in prompts]
    outcomes = run_in_engine(run_steps, model, MEMORY, steps, {})
    assert [outcome.tokens[0] for outcome in outcomes] == expected
    reports = [outcome.reports[0] for outcome in outcomes]
    assert (reports[0]["num_recomputed_tokens"], reports[0]["num_reused_tokens"]) == (0, 0), "nothing was known"
    assert sum(report["num_recomputed_tokens"] for report in reports) > 1000
    assert sum(report["store_hits"] for report in reports) > 20
    for report in reports:
        assert not report["approximate"]
        assert_counts(report)


def test_ratio_one_in_batches_and_pieces_equals_plain_vllm(model: str) -> None:
    prompts = make_prompts(1, 24)
    expected = run_in_engine(plain_tokens, model, prompts, NUM_TOKENS)
    pieces = {"max_num_batched_tokens": 128, "max_num_seqs": 16}
    steps = [Step(prompts, NUM_TOKENS, {"policy": "all"})]
    (outcome,) = run_in_engine(run_steps, model, MEMORY, steps, pieces)
    assert outcome.tokens == expected
    assert outcome.num_left_behind == 0


def test_ratio_zero_equals_naive_reuse_in_hugging_face(model: str) -> None:
    prompts = make_prompts(2, 20, all_separated=True)
    steps = [Step([prompt], NUM_TOKENS, {"ratio": 0}) for prompt in prompts]
    outcomes = run_in_engine(run_steps, model, MEMORY, steps, {})
    reference = NaiveReuse(model)
    assert sum(outcome.reports[0]["num_reused_tokens"] for outcome in outcomes) > 1000
    for prompt, outcome in zip(prompts, outcomes, strict=True):
        tokens, report = outcome.tokens[0], outcome.reports[0]
        assert report["approximate"]
        assert report["num_recomputed_tokens"] == 0
        assert_counts(report)
        assert tokens == reference.generate(prompt, report["spans"], NUM_TOKENS)


@pytest.mark.parametrize("settings", [{}, {"max_num_batched_tokens": 128, "max_num_seqs": 4}], ids=["whole", "pieces"])
@pytest.mark.parametrize(("ratio", "check_layer"), [(0.15, 1), (0.4, 2)])
def test_kv_deviation_equals_cacheblend_written_out(
    model: str, settings: dict[str, Any], ratio: float, check_layer: int
) -> None:
    prompts = make_prompts(4, 8, all_separated=True)
    params = {"ratio": ratio, "check_layer": check_layer}
    steps = [Step([prompt], NUM_TOKENS, params) for prompt in prompts]
    # The same once more, over known chunks: a parameter of another policy keeps vLLM's prefix cache out.
    again = [replace(step, kvarena=params | {"head_tokens": 1}) for step in steps]
    outcomes = run_in_engine(run_steps, model, MEMORY, [*steps, *again], settings)
    reference = CacheBlend(model, {check_layer: ratio})
    for prompt, new, known in zip(prompts, outcomes[: len(prompts)], outcomes[len(prompts) :], strict=True):
        expected = reference.generate(prompt, known.reports[0]["spans"], NUM_TOKENS)
        assert new.tokens[0] == known.tokens[0] == expected
        assert new.reports[0]["num_recomputed_tokens"] <= reference.num_selected
        assert known.reports[0]["num_recomputed_tokens"] == reference.num_selected
        assert known.reports[0]["store_misses"] == 0
        assert_counts(new.reports[0])
        assert_counts(known.reports[0])


ENDS = ("none", "all")
POLICIES: list[dict[str, Any]] = [
    {"policy": "chunk_head", "ratio": 0.1},
    {"policy": "chunk_head", "head_tokens": 5},
    {"policy": "query_attention", "ratio": 0.1, "check_layer": 0},
    {"policy": "query_attention", "ratio": 0.1, "check_layer": 3},
    {"policy": "kv_deviation", "ratio": 0.2, "deviation": "values"},
    {"policy": "kv_deviation", "ratio": 0.2, "num_filters": 3},
    {"policy": "random", "ratio": 0.2},
]
POLICIES += [{"policy": name} for name in registry.POLICIES if name not in (*ENDS, *(p["policy"] for p in POLICIES))]


@pytest.mark.parametrize("settings", [{}, {"max_num_batched_tokens": 128, "max_num_seqs": 4}], ids=["whole", "pieces"])
def test_every_policy_does_what_it_does_over_hugging_face(model: str, settings: dict[str, Any]) -> None:
    """That adapter's policies are tested against stock forwards; the same weights in vLLM pick the same tokens."""
    prompts = make_prompts(5, 2, all_separated=True)
    work = list(itertools.product(POLICIES, prompts))
    cold = [Step([prompt], 1, {"policy": "none"}) for prompt in prompts]
    steps = [Step([prompt], NUM_TOKENS, policy) for policy, prompt in work]
    outcomes = run_in_engine(run_steps, model, MEMORY, [*cold, *steps], settings)[len(prompts) :]
    blended = Blended.load(Path(model))
    for prompt in prompts:
        blended.prefill(blended.encode(prompt), BlendParams("none"))
    for (policy, prompt), outcome in zip(work, outcomes, strict=True):
        expected = blended.prefill(blended.encode(prompt), BlendParams(**policy))
        report = outcome.reports[0]
        assert_counts(report)
        spans = [(span["start"], span["end"]) for span in report["spans"] if span["source"] == "reused"]
        assert spans == expected.report.spans
        assert report["num_recomputed_tokens"] == expected.report.num_recomputed_tokens > 0
        assert report["store_errors"] == 0
        assert outcome.tokens[0] == blended.greedy(expected, NUM_TOKENS), policy


@pytest.mark.parametrize("settings", [{}, {"max_num_batched_tokens": 128, "max_num_seqs": 4}], ids=["whole", "pieces"])
def test_scores_are_those_over_hugging_face(model: str, settings: dict[str, Any]) -> None:
    """There they are compared with their definition; here they choose the same tokens."""
    rng = random.Random(8)
    pool = [random_text(rng, 70) for _ in range(4)]
    orders = [rng.sample(pool, 4) for _ in range(5)]
    prompts = [SEPARATOR.join([random_text(rng, 4), *order, random_text(rng, 5)]) for order in orders]
    chosen: dict[str, Any] = {"policy": "stored_deviation", "ratio": 0.15}
    steps = [Step([prompt], 1, {"policy": "none", "store": "scores"}) for prompt in prompts[1:]]
    *scoring, outcome = run_in_engine(
        run_steps, model, MEMORY, [*steps, Step(prompts[:1], NUM_TOKENS, chosen)], settings
    )
    blended = Blended.load(Path(model))
    for prompt, scored in zip(prompts[1:], scoring, strict=True):
        blended.blender.score(blended.encode(prompt))
        report = scored.reports[0]
        assert_counts(report)
        assert report["num_reused_tokens"] == 0
    ids = blended.encode(prompts[0])
    expected = blended.prefill(ids, BlendParams(**chosen))
    report = outcome.reports[0]
    assert report["unscored_chunks"] == expected.report.unscored_chunks == 0
    assert report["num_recomputed_tokens"] == expected.report.num_recomputed_tokens > 0
    assert outcome.tokens[0] == blended.greedy(expected, NUM_TOKENS)


def test_a_blend_in_pieces_is_the_same_for_every_policy(model: str) -> None:
    prompts = make_prompts(7, 2, all_separated=True)
    steps = [Step([prompt], NUM_TOKENS, policy) for policy in [{"ratio": 1.0}, *POLICIES] for prompt in prompts]
    at_once = run_in_engine(run_steps, model, MEMORY, steps, {})
    in_pieces = run_in_engine(run_steps, model, replace(MEMORY, step_tokens=20), steps, {})
    assert max(outcome.arrivals[0][0] for outcome in in_pieces) > 10
    for ours, theirs in zip(in_pieces, at_once, strict=True):
        assert ours.tokens == theirs.tokens
        for count in ("num_recomputed_tokens", "num_reused_tokens", "store_hits", "store_misses", "spans"):
            assert ours.reports[0][count] == theirs.reports[0][count]


def test_what_a_filter_leaves_is_no_more_than_a_batch_has_room_for(model: str) -> None:
    """The metadata's buffers have so many rows, and the model's so many tokens, also where a blend is not in pieces."""
    prompts = make_prompts(9, 4, all_separated=True)
    policies = [{"ratio": 0.4, "num_filters": 2}, {"ratio": 0.9, "num_filters": 1}]
    steps = [Step([prompt], NUM_TOKENS, policy) for prompt in prompts for policy in ({"ratio": 0.0}, *policies)]
    whole, largest = run_in_engine(run_steps_and_watch_batches, model, MEMORY, steps, {})
    assert largest > 128
    small = {"max_num_batched_tokens": 128, "max_num_seqs": 4}
    at_once = replace(MEMORY, step_tokens=4000)
    bounded, largest = run_in_engine(run_steps_and_watch_batches, model, at_once, steps, small)
    assert largest <= 128
    for ours, theirs in zip(bounded, whole, strict=True):
        assert ours.tokens == theirs.tokens
        for count in ("num_recomputed_tokens", "num_reused_tokens", "store_hits", "store_misses", "spans"):
            assert ours.reports[0][count] == theirs.reports[0][count]


def test_ranks_of_a_spread_model_pick_the_same_tokens(model: str) -> None:
    """Half of the heads in each of two workers: the tokens of the whole model in one, and in pieces, too.

    A rank that has no memory for a forward ends them all, not after the 300 s that vLLM waits for a worker.
    """
    prompts = make_prompts(6, 3, all_separated=True)
    policies: list[dict[str, Any] | None] = [{"ratio": 1.0}, {"ratio": 0}, {"ratio": 0.2, "check_layer": 2}]
    policies += [POLICIES[3], {"max_ttft_ms": 0.001}]
    steps = [Step([prompt], NUM_TOKENS, policy) for policy in policies for prompt in prompts]
    one = run_in_engine(run_steps, model, MEMORY, steps, {})
    pieces = replace(MEMORY, step_tokens=150)
    two, waited_s = run_in_engine(run_steps_and_lose_a_rank, model, pieces, steps, {"tensor_parallel_size": 2})
    assert [outcome.tokens for outcome in two] == [outcome.tokens for outcome in one]
    for ours, theirs in zip(two, one, strict=True):
        for count in ("num_recomputed_tokens", "num_reused_tokens", "store_hits", "store_errors"):
            assert ours.reports[0][count] == theirs.reports[0][count]
    assert sum(outcome.reports[0]["store_hits"] for outcome in two) > 20
    print(f"the engine ended after {waited_s:.1f} s")
    assert waited_s < 150


def test_without_memory_for_its_chunks_a_prompt_is_computed_as_usual(model: str) -> None:
    prompts = make_prompts(7, 3, all_separated=True)
    expected = run_in_engine(plain_tokens, model, prompts, NUM_TOKENS)
    (outcome,) = run_in_engine(run_steps, model, MEMORY, [Step(prompts, NUM_TOKENS, damage=take_memory)], {})
    assert outcome.tokens == expected
    for report in outcome.reports:
        assert_counts(report)
        assert report["num_computed_tokens"] == report["num_prompt_tokens"]
        assert report["blend_failures"] == 0
        assert report["store_misses"] >= 1


def test_in_bf16_ratio_one_is_as_near_to_fp32_as_plain_vllm(bf16_model: str) -> None:
    (prompt,) = make_prompts(3, 1, all_separated=True)
    exact = run_in_engine(prefill_kv, bf16_model, None, prompt, "float32")
    plain = run_in_engine(prefill_kv, bf16_model, None, prompt, "bfloat16")
    blended = run_in_engine(prefill_kv, bf16_model, MEMORY, prompt, "bfloat16")
    for layer, (ours, theirs, own) in enumerate(zip(blended, plain, exact, strict=True)):
        assert ours.shape == own.shape
        assert (ours - own).norm() < 1.1 * (theirs - own).norm() < 0.03 * own.norm(), f"KV of layer {layer}"


def assert_counts(report: dict[str, Any]) -> None:
    parts = [report[f"num_{part}_tokens"] for part in ("reused", "recomputed", "computed")]
    assert sum(parts) == report["num_prompt_tokens"]
    assert min(parts) >= 0
    edges = [(span["start"], span["end"]) for span in report["spans"]]
    assert edges[0][0] == 0
    assert edges[-1][1] == report["num_prompt_tokens"]
    assert all(left[1] == right[0] for left, right in itertools.pairwise(edges))


@pytest.mark.parametrize("settings", [{}, {"max_num_batched_tokens": 128, "max_num_seqs": 4}], ids=["whole", "pieces"])
def test_seams_are_those_over_hugging_face(model: str, settings: dict[str, Any]) -> None:
    """There they are compared with stock forwards. In the other order only the pairs that are left are taken."""
    rng = random.Random(9)
    pool = [random_text(rng, 70) for _ in range(4)]
    orders = [pool, [*pool[2:], *pool[:2]], pool[::-1]]
    prompts = [SEPARATOR.join([random_text(rng, 4), *order, random_text(rng, 5)]) for order in orders]
    chosen: dict[str, Any] = {"policy": "chunk_head", "ratio": 0.1}
    making = [Step(prompts[:1], 1, {"policy": "none"}), Step(prompts[:1], 1, {"policy": "none", "store": "seams"})]
    steps = [Step([prompt], NUM_TOKENS, chosen) for prompt in prompts]
    config = replace(MEMORY, seams=True)
    *_, made, first, second, third = run_in_engine(run_steps, model, config, [*making, *steps], settings)
    assert (made.reports[0]["misses"], made.reports[0]["store_errors"]) == ([], 0)
    blended = Blended.load(Path(model))
    blended.blender = HFBlender(blended.model, blended.store, separator=SEPARATOR, seams=True)
    blended.prefill(blended.encode(prompts[0]), BlendParams("none"))
    blended.blender.make_seams(blended.encode(prompts[0]))
    for prompt, outcome, num_seams in zip(prompts, (first, second, third), (3, 2, 0), strict=True):
        expected = blended.prefill(blended.encode(prompt), BlendParams(**chosen))
        report = outcome.reports[0]
        assert_counts(report)
        assert report["num_seams"] == expected.report.num_seams == num_seams
        assert report["num_recomputed_tokens"] == expected.report.num_recomputed_tokens > 0
        assert outcome.tokens[0] == blended.greedy(expected, NUM_TOKENS)
    blended.model.close()
