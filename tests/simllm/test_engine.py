"""The engine's tokens against the library's and Hugging Face's, and its reports."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kvarena.api.engine import GenerationRequest, Report, Sampling
from kvarena.engines import attention
from kvarena.engines.simllm.engine import SimLLMEngine
from kvarena.engines.simllm.options import SimLLMOptions
from simllm.tasks import NUM_TOKENS, Tasks
from tiny_models import random_text, save_tiny_model

GREEDY = Sampling(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)


@dataclass
class Served:
    tasks: Tasks
    engine: SimLLMEngine

    def ask(
        self, prompt: str | Sequence[int], sampling: Sampling = GREEDY, salt: str = "", **options: bool
    ) -> tuple[tuple[int, ...], Report]:
        ids = prompt if isinstance(prompt, str) else tuple(prompt)
        request = GenerationRequest("test", ids, sampling, cache_salt=salt, options=SimLLMOptions(**options))
        generation = self.engine.generate(request)
        tokens = tuple(token.token_id for token in generation)
        report = generation.report
        assert report.num_prompt_tokens == len(generation.prompt_token_ids)
        assert sum(span["end"] - span["start"] for span in report.details["spans"]) == report.num_prompt_tokens
        assert {"prefill_ms", "first_token_ms", "decode_ms", "total_ms"} <= report.details["timings"].keys()
        return tokens, report


def served(folder: Path, mode: str) -> Served:
    tasks = Tasks.load(folder, mode=mode, similarity_threshold=0.95, attn_implementation=attention.NAME)
    return Served(tasks, SimLLMEngine(tasks.simllm, "tiny"))


@pytest.fixture(params=["top_layer", "aligned"])
def any_served(request: pytest.FixtureRequest, folder: Path) -> Iterator[Served]:
    found = served(folder, request.param)
    yield found
    found.engine.close()


def prompt_of(seed: int, num_words: int = 40) -> str:
    return random_text(random.Random(seed), num_words)


def test_a_miss_is_generates(any_served: Served) -> None:
    prompt = prompt_of(0)
    tokens, report = any_served.ask(prompt)
    assert tokens == any_served.tasks.generate(prompt)
    assert not report.approximate
    assert report.num_computed_tokens == report.num_prompt_tokens
    details = report.details
    assert (details["hit"], details["similarity"], details["matched_task_id"]) == (False, None, None)
    assert details["num_layer_passes"] == details["num_layer_passes_without_reuse"] == 4 * report.num_prompt_tokens


def test_a_hit_is_the_librarys_and_is_reported(any_served: Served, folder: Path) -> None:
    earlier, prompt = prompt_of(1), f"{prompt_of(1)} goat tea"
    library = Tasks.load(folder, mode=any_served.tasks.simllm.params.mode, similarity_threshold=0.95)
    library.ask(earlier)
    (expected,) = library.ask(prompt)
    _, first = any_served.ask(earlier)
    tokens, report = any_served.ask(prompt)
    assert tokens == expected.token_ids
    details, outcome = report.details, expected.outcome
    assert details["hit"]
    assert details["mode"] == library.simllm.params.mode
    assert details["similarity_threshold"] == 0.95
    assert details["matched_task_id"] == first.details["task_id"]
    assert details["similarity"] == pytest.approx(outcome.similarity)
    assert details["num_layer_passes"] == outcome.num_layer_passes < details["num_layer_passes_without_reuse"]
    assert report.approximate == outcome.is_approximate == (details["mode"] == "top_layer")
    assert report.num_reused_tokens == outcome.num_reused_tokens > 0
    library.simllm.close()


def test_the_very_same_prompt_aligned(folder: Path) -> None:
    aligned = served(folder, "aligned")
    prompt = prompt_of(2)
    for number in range(3):
        tokens, report = aligned.ask(prompt)
        assert tokens == aligned.tasks.generate(prompt)
        assert report.details["hit"] == (number > 0)
    assert report.details["num_layer_passes"] == 4
    assert [span["source"] for span in report.details["spans"]] == ["reused", "computed"]
    aligned.engine.close()


def test_without_reuse_nothing_is_searched_or_kept(any_served: Served) -> None:
    prompt = prompt_of(3)
    any_served.ask(prompt)
    tokens, report = any_served.ask(prompt, reuse=False)
    assert tokens == any_served.tasks.generate(prompt)
    assert not report.details["hit"]
    any_served.ask(prompt_of(4), reuse=False)
    assert any_served.tasks.simllm.get_statistics()["num_searches"] == len(any_served.tasks.simllm.manager) == 1


def test_salts_share_nothing(any_served: Served) -> None:
    prompt = prompt_of(5)
    any_served.ask(prompt, salt="a")
    assert not any_served.ask(prompt, salt="b")[1].details["hit"]
    assert any_served.ask(prompt, salt="a")[1].details["hit"]
    assert len(any_served.tasks.simllm.manager) == 2


def test_eight_threads(any_served: Served) -> None:
    any_served.tasks.simllm.set_similarity_threshold(1.0)
    prompts = [prompt_of(seed, 10 + seed) for seed in range(10, 22)]
    expected = [any_served.tasks.generate(prompt) for prompt in prompts]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda prompt: any_served.ask(prompt)[0], prompts))
    assert answers == expected
    any_served.tasks.simllm.manager.check_integrity()


def test_an_answer_of_open_length_ends_with_the_context(tmp_path: Path) -> None:
    """Behind an earlier prompt there is less of it."""
    top_layer = served(save_tiny_model(tmp_path, max_position_embeddings=400), "top_layer")
    open_ended, prompt = Sampling(temperature=0.0, ignore_eos=True), [9] * 50
    tokens, report = top_layer.ask(prompt, open_ended)
    assert (len(tokens), report.details["hit"]) == (400 - 50, False)
    tokens, report = top_layer.ask(prompt, open_ended)
    assert (len(tokens), report.details["hit"]) == (400 - 100, True)
    sampling = Sampling(max_tokens=310, temperature=0.0, ignore_eos=True)
    tokens, report = top_layer.ask(prompt, sampling)
    assert (len(tokens), report.details["hit"]) == (310, False), "what was asked for is given"
    top_layer.engine.close()


def test_ends(any_served: Served) -> None:
    request = GenerationRequest("test", prompt_of(6), Sampling(max_tokens=3, temperature=0.0, ignore_eos=True))
    generation = any_served.engine.generate(request)
    assert len(list(generation)) == 3
    assert generation.finish_reason == "length"
    closed = any_served.engine.generate(request)
    tokens = iter(closed)
    next(tokens)
    closed.close()
    assert len(list(tokens)) <= 1
    assert closed.finish_reason is None


@pytest.mark.parametrize(
    ("prompt", "sampling", "message"),
    [
        ([], GREEDY, "empty"),
        ("", GREEDY, "empty"),
        ([5] * 2048, GREEDY, "2048"),
        ([5] * 2040, GREEDY, "2048"),
        ([5, 10**6], GREEDY, "1000000"),
        ([-1], GREEDY, "-1"),
    ],
)
def test_what_cannot_be_served_is_refused_with_the_bounds(
    any_served: Served, prompt: Any, sampling: Sampling, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        any_served.ask(prompt, sampling)


def test_it_describes_itself(any_served: Served) -> None:
    described = any_served.engine.describe()
    assert described["contender"] == "simllm"
    assert described["defaults"] == {"reuse": True}
    assert described["similarity_threshold"] == 0.95
    assert described["aligned"]["blend"]["policy"] == "kv_deviation"
