"""The prefix engine's equations: with and without what is kept, the tokens are Hugging Face `generate`'s."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from kvarena.contenders.prefix.engine import PrefixEngine
from kvarena.engines.base import Sampling
from kvarena.engines.hf.model import HFModel
from support.prefix_engine import GREEDY, Prefix, make_prefix
from support.tiny_models import save_tiny_model

NUM_PROMPTS = 60


def prompts_with_shared_parts(vocab_size: int, num: int, seed: int = 0) -> list[list[int]]:
    """Repeats, prefixes of earlier ones, continuations and branches, in random order."""
    rng = random.Random(seed)
    prompts = [rng.choices(range(5, vocab_size), k=rng.randint(20, 90)) for _ in range(4)]
    while len(prompts) < num:
        earlier = rng.choice(prompts)
        cut = rng.randint(1, len(earlier))
        more = rng.choices(range(5, vocab_size), k=rng.choice([0, 0, 1, 5, 40]))
        prompts.append((earlier[:cut] if rng.random() < 0.6 else earlier) + more)
    return prompts


def test_greedy_answers_are_generates(any_prefix: Prefix) -> None:
    prompts = prompts_with_shared_parts(any_prefix.engine.model.vocab_size, NUM_PROMPTS)
    for prompt in prompts:
        answer = any_prefix.ask(prompt)
        assert answer.token_ids == any_prefix.generate(prompt)
        assert answer.report.num_reused_tokens + answer.report.num_computed_tokens == len(prompt)
    any_prefix.engine.cache.check_integrity()
    assert any_prefix.engine.cache.stats().hits > NUM_PROMPTS / 3


def test_an_entry_has_the_models_own_kv_and_last_logits(any_prefix: Prefix) -> None:
    """`cache.get`, as the prefix-caching demonstration has it."""
    prompt = random.Random(5).choices(range(5, any_prefix.engine.model.vocab_size), k=40)
    assert any_prefix.engine.cache.get(prompt) is None
    any_prefix.ask(prompt)
    entry = any_prefix.engine.cache.get(prompt)
    assert entry is not None
    assert entry.last_logits is not None
    with torch.inference_mode():
        expected = any_prefix.reference(torch.tensor([prompt]), use_cache=True)
    torch.testing.assert_close(entry.last_logits.tensor, expected.logits[0, -1], rtol=1e-4, atol=1e-4)
    kept = torch.cat([segment.tensor for segment in entry.past_key_values], dim=3)
    assert entry.num_tokens == kept.shape[3] == len(prompt)
    for own, layer in zip(kept, expected.past_key_values.layers, strict=True):
        torch.testing.assert_close(own[0], layer.keys[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(own[1], layer.values[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{"use_cache": False}, {"use_prefix_cache": False}])
def test_each_layer_of_caching_gives_the_same(any_prefix: Prefix, options: dict[str, Any]) -> None:
    for prompt in prompts_with_shared_parts(any_prefix.engine.model.vocab_size, 8, seed=1):
        answer = any_prefix.ask(prompt, **options)
        assert answer.token_ids == any_prefix.generate(prompt)
        assert answer.report.num_reused_tokens == 0


def test_seeded_samples_are_generates(any_prefix: Prefix) -> None:
    for seed, prompt in enumerate(prompts_with_shared_parts(any_prefix.engine.model.vocab_size, 30, seed=2)):
        sampling = Sampling(max_tokens=10, temperature=0.8, top_p=0.9, seed=seed)
        expected = any_prefix.generate(prompt, sampling)
        assert any_prefix.ask(prompt, sampling).token_ids == expected
        assert any_prefix.ask(prompt, sampling).token_ids == expected, "the same from the kept logits"


def test_a_window_that_slides(tmp_path: Path) -> None:
    prefix = make_prefix(save_tiny_model(tmp_path, "mistral", sliding_window=24), min_tokens=4)
    for prompt in prompts_with_shared_parts(prefix.engine.model.vocab_size, 12, seed=13):
        assert prefix.ask(prompt).token_ids == prefix.generate(prompt)
    prefix.engine.close()


def test_after_evictions(model_folders: dict[str, Path]) -> None:
    one_prompt = 90 * 2 * 4 * 2 * 32 * 4
    prefix = make_prefix(model_folders["llama"], cache_bytes=2 * one_prompt)
    for prompt in prompts_with_shared_parts(prefix.engine.model.vocab_size, NUM_PROMPTS, seed=3):
        assert prefix.ask(prompt).token_ids == prefix.generate(prompt)
        prefix.engine.cache.check_integrity()
    assert prefix.engine.cache.stats().evictions > 10
    prefix.engine.close()


def test_sixteen_threads(prefix: Prefix) -> None:
    prompts = prompts_with_shared_parts(prefix.engine.model.vocab_size, 96, seed=4)
    expected = [prefix.generate(prompt) for prompt in prompts]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(prefix.ask, prompts))
    assert [answer.token_ids for answer in answers] == expected
    prefix.engine.cache.check_integrity()
    assert all(node.num_pins == 0 for node in prefix.engine.cache._nodes())


def test_an_answer_that_outgrows_its_first_memory(prefix: Prefix) -> None:
    prompt = prompts_with_shared_parts(300, 1, seed=12)[0]
    sampling = Sampling(max_tokens=300, temperature=0.0, ignore_eos=True)
    answers = [prefix.ask(prompt, sampling) for _ in range(2)]
    assert len(answers[0].token_ids) == 300
    assert answers[0].token_ids == answers[1].token_ids
    assert answers[0].token_ids == prefix.ask(prompt, sampling, use_prefix_cache=False).token_ids
    ended = prefix.generate(prompt, Sampling(max_tokens=300, temperature=0.0))
    assert answers[0].token_ids[: len(ended)] == ended


def test_an_exact_repeat_runs_no_forward_pass_before_its_first_token(prefix: Prefix) -> None:
    prompt = prompts_with_shared_parts(300, 1)[0]
    cold = prefix.ask(prompt)
    before = prefix.engine.model.num_forwards
    generation = prefix.start(prompt)
    assert next(iter(generation)).token_id == cold.token_ids[0]
    assert prefix.engine.model.num_forwards == before
    assert generation.report.num_computed_tokens == 0


def test_a_new_question_behind_a_known_prefix_computes_its_own_tokens(prefix: Prefix) -> None:
    rng = random.Random(5)
    shared = rng.choices(range(5, 300), k=100)
    prefix.ask([*shared, 7, 8, 9])
    before = prefix.engine.model.num_forward_tokens
    generation = prefix.start(shared + rng.choices(range(5, 300), k=20), Sampling(max_tokens=1, temperature=0.0))
    assert len(list(generation)) == 1
    assert prefix.engine.model.num_forward_tokens - before == generation.report.num_computed_tokens <= 20


def test_the_turn_after_an_answer_finds_that_answer(prefix: Prefix) -> None:
    prompt = prompts_with_shared_parts(300, 1, seed=6)[0]
    answer = prefix.ask(prompt, Sampling(max_tokens=10, temperature=0.0, ignore_eos=True))
    following = [*prompt, *answer.token_ids, 11, 12, 13]
    again = prefix.ask(following)
    assert again.report.num_computed_tokens == 4, "three new tokens, and the last one of the answer"
    assert again.token_ids == prefix.generate(following)


def test_salts_share_nothing(prefix: Prefix) -> None:
    prompt = prompts_with_shared_parts(300, 1, seed=7)[0]
    prefix.ask(prompt, salt="a")
    assert prefix.ask(prompt, salt="b").report.num_reused_tokens == 0
    assert prefix.ask(prompt, salt="a").report.num_reused_tokens == len(prompt)


def test_a_common_new_prefix_is_computed_once(prefix: Prefix) -> None:
    rng = random.Random(8)
    shared = rng.choices(range(5, 300), k=800)
    prompts = [[*shared, 20 + number] for number in range(6)]
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(prefix.ask, prompts))
    assert sum(answer.report.num_computed_tokens for answer in answers) < 800 + 2 * 6


def test_giving_up_leaves_the_cache_whole(prefix: Prefix) -> None:
    rng = random.Random(9)
    prompt = rng.choices(range(5, 300), k=1500)
    generation = prefix.start(prompt)
    generation.close()
    assert list(generation) == []
    assert prefix.engine.cache.stats().num_nodes == 0
    second = prefix.start(prompt)
    tokens = iter(second)
    next(tokens)
    second.close()
    assert len(list(tokens)) <= 1
    prefix.engine.cache.check_integrity()
    assert prefix.ask(prompt).token_ids == prefix.generate(prompt)


def test_a_cache_that_fails_costs_no_answer(prefix: Prefix, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise MemoryError("no room")

    prompt = prompts_with_shared_parts(300, 1, seed=10)[0]
    monkeypatch.setattr("kvarena.contenders.prefix.engine.Kept.copy", fail)
    assert prefix.ask(prompt).token_ids == prefix.generate(prompt)
    assert prefix.engine.num_store_errors > 0
    prefix.engine.cache.check_integrity()


@pytest.mark.parametrize(
    ("prompt", "sampling", "message"),
    [
        ([], GREEDY, "empty"),
        ([5] * 2048, GREEDY, "2048"),
        ([5] * 2049, GREEDY, "the prompt has 2049"),
        ([5], Sampling(max_tokens=2049), "2048 tokens; max_tokens is 2049"),
        ([5, 10**6], GREEDY, "1000000"),
        ([-1], GREEDY, "-1"),
    ],
)
def test_what_cannot_be_served_is_refused_with_the_bounds(
    prefix: Prefix, prompt: list[int], sampling: Sampling, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        prefix.ask(prompt, sampling)


def test_an_answer_is_cut_at_the_contexts_end(prefix: Prefix) -> None:
    answer = prefix.ask([5] * 2040, Sampling(max_tokens=12, temperature=0.0, ignore_eos=True))
    assert (len(answer.token_ids), answer.finish_reason) == (8, "length")


def test_text_prompts_and_timings(prefix: Prefix) -> None:
    text = "tea rain hill goat blue river stone " * 8
    answer = prefix.ask(text)
    assert answer.report.num_prompt_tokens == len(prefix.engine.tokenizer.encode(text))
    assert {"tokenize_ms", "cache_lookup_ms", "ttft_ms", "decode_ms", "total_ms"} <= answer.timings.keys()
    assert prefix.ask(text).timings["prefix_tokens_saved"] == answer.report.num_prompt_tokens


def test_logprobs_are_the_models(prefix: Prefix) -> None:
    prompt = prompts_with_shared_parts(300, 1, seed=11)[0]
    answer = prefix.ask(prompt, Sampling(max_tokens=3, temperature=0.0, num_logprobs=4))
    with torch.no_grad():
        logprobs = prefix.reference(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
    first = answer.tokens[0]
    assert first.logprob == pytest.approx(float(logprobs.max()), abs=1e-4)
    assert [token for token, _ in first.top] == logprobs.topk(4).indices.tolist()


def test_bad_storage_is_refused(prefix: Prefix) -> None:
    with pytest.raises(ValueError, match="cpu or device"):
        PrefixEngine(prefix.engine.model, "m", cache_bytes=1, storage="disk")


def test_a_context_longer_than_the_models_is_refused(model_folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="2048"):
        HFModel.load(str(model_folders["llama"]), max_model_len=4096)
