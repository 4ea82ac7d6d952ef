"""The engine's tokens against the library's and Hugging Face's, and its reports."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from kvarena.contenders.simllm.engine import NUM_FIRST_TOKENS, NUM_LAST_TOKENS, SimLLMEngine, excerpt
from kvarena.contenders.simllm.inference import load_simllm
from kvarena.core.plan import as_token_ids
from kvarena.engines.base import GenerationRequest, Sampling
from kvarena.simllm import SimLLMParams
from support.simllm_engine import GREEDY, Served, served
from support.simllm_tasks import Tasks, prompt_of
from support.tiny_models import save_tiny_model, tiny_tokenizer


@pytest.fixture(params=["top_layer", "aligned"])
def any_served(request: pytest.FixtureRequest, folder: Path) -> Iterator[Served]:
    found = served(folder, request.param)
    yield found
    found.engine.close()


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
    reused = [span["end"] - span["start"] for span in details["spans"] if span["source"] == "reused"]
    assert sum(reused) == report.num_reused_tokens + report.num_recomputed_tokens
    assert report.texts == {"matched_prompt": earlier}
    assert details["num_matched_prompt_tokens"] == first.num_prompt_tokens
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
    again = any_served.ask(prompt, salt="a")[1]
    assert again.details["hit"]
    assert not again.texts, "reports are found by id, whatever one's salt is"
    assert len(any_served.tasks.simllm.manager) == 2


def test_a_request_may_choose_its_mode(folder: Path) -> None:
    """What mode aligned keeps of a task serves both modes; what top_layer keeps serves that one alone."""
    earlier, prompt = prompt_of(7), f"{prompt_of(7)} goat tea"
    expected = {}
    for mode in ("top_layer", "aligned"):
        alone = served(folder, mode)
        alone.ask(earlier)
        expected[mode] = alone.ask(prompt)[0]
        alone.engine.close()
    both = served(folder, "aligned")
    both.ask(earlier)
    tokens, report = both.ask(prompt, mode="top_layer")
    assert (tokens, report.details["mode"], report.approximate) == (expected["top_layer"], "top_layer", True)
    assert report.details["num_layer_passes"] == report.num_prompt_tokens
    assert "loses its answers" in report.details["warning"]
    assert both.ask(prompt, mode="sandwich")[1].details["num_layer_passes"] == 4 * report.num_prompt_tokens
    tokens, report = both.ask(prompt)
    assert (tokens, report.details["mode"], report.approximate) == (expected["aligned"], "aligned", False)

    both.tasks.simllm.reset_cache()
    both.ask(earlier, mode="top_layer")
    assert not both.ask(prompt)[1].details["hit"], "its lower layers weren't kept"
    assert both.ask(prompt)[1].details["hit"]
    both.engine.close()


def test_a_request_may_choose_its_threshold(any_served: Served) -> None:
    earlier, prompt = prompt_of(8), f"{prompt_of(8)} goat tea rain hill"
    any_served.ask(earlier)
    _, strict = any_served.ask(prompt, similarity_threshold=1.0)
    assert (strict.details["hit"], strict.details["similarity_threshold"]) == (False, 1.0)
    any_served.tasks.simllm.reset_cache()
    any_served.ask(earlier)
    _, loose = any_served.ask(prompt, similarity_threshold=-1)
    assert (loose.details["hit"], loose.details["similarity_threshold"]) == (True, -1)
    assert 0.9 < loose.details["similarity"] < 1


def test_a_model_whose_keys_do_not_turn_as_needed_has_no_mode_aligned(tmp_path: Path) -> None:
    scaled = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
    folder = save_tiny_model(tmp_path, rope_parameters=scaled)
    top_layer = served(folder, "top_layer")
    assert top_layer.engine.describe()["modes"] == ["sandwich", "top_layer"]
    with pytest.raises(ValueError, match="mode must be one of top_layer, sandwich with this model, not 'aligned'"):
        top_layer.ask(prompt_of(0), mode="aligned")
    top_layer.engine.close()
    with pytest.raises(ValueError, match="depend on the length"):
        served(folder, "aligned")


def test_a_long_prompt_is_shown_by_its_ends() -> None:
    tokenizer = tiny_tokenizer()
    num_tokens = NUM_FIRST_TOKENS + NUM_LAST_TOKENS
    ids = tokenizer.encode("goat tea " * num_tokens)[: num_tokens + 5]
    assert excerpt(as_token_ids(ids[:-5]), tokenizer) == tokenizer.decode(ids[:-5])
    first, said, last = excerpt(as_token_ids(ids), tokenizer).split("\n")
    assert said == "[... 5 tokens ...]"
    assert tokenizer.encode(first) == ids[:NUM_FIRST_TOKENS]
    assert tokenizer.decode(ids).endswith(last)


@pytest.mark.parametrize("mode", ["top_layer", "aligned"])
def test_a_context_that_is_cut(folder: Path, mode: str) -> None:
    """A hit of mode top_layer has both prompts in it."""
    simllm = load_simllm(str(folder), SimLLMParams(mode), device="cpu", max_model_len=120)
    cut = Served(Tasks(simllm, None), SimLLMEngine(simllm, "tiny"))
    open_ended, prompt = Sampling(temperature=0.0, ignore_eos=True), [9] * 50
    assert len(cut.ask(prompt, open_ended)[0]) == 70
    tokens, report = cut.ask(prompt, open_ended)
    assert (len(tokens), report.details["hit"]) == (70, mode == "aligned")
    tokens, report = cut.ask(prompt, Sampling(max_tokens=20, temperature=0.0, ignore_eos=True))
    assert (len(tokens), report.details["hit"]) == (20, True)
    with pytest.raises(ValueError, match="context length is 120"):
        cut.ask([9] * 120)
    cut.engine.close()


@pytest.mark.parametrize("max_model_len", [0, 2049])
def test_a_context_that_the_model_does_not_have(folder: Path, max_model_len: int) -> None:
    with pytest.raises(ValueError, match=f"max_model_len is {max_model_len}; .* 1 to 2048"):
        load_simllm(str(folder), SimLLMParams(), device="cpu", max_model_len=max_model_len)


def test_random_weights_need_a_config_only(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path)
    (folder / "model.safetensors").unlink()
    simllm = load_simllm(str(folder), SimLLMParams("aligned"), device="cpu", random=True)
    made_up = Served(Tasks(simllm, None), SimLLMEngine(simllm, "tiny"))
    assert made_up.ask(prompt_of(1))[0] == made_up.ask(prompt_of(1))[0]
    made_up.engine.close()


def test_eight_threads(any_served: Served) -> None:
    any_served.tasks.simllm.set_similarity_threshold(1.0)
    prompts = [prompt_of(seed, 10 + seed) for seed in range(10, 22)]
    expected = [any_served.tasks.generate(prompt) for prompt in prompts]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda prompt: any_served.ask(prompt)[0], prompts))
    assert answers == expected
    any_served.tasks.simllm.manager.check_integrity()


def test_an_answer_of_open_length_ends_with_the_context(tmp_path: Path) -> None:
    """After an earlier prompt there is less of it."""
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
        ([5] * 2049, GREEDY, "the prompt has 2049"),
        ([5], Sampling(max_tokens=2049), "2048 tokens; max_tokens is 2049"),
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
    mode = any_served.tasks.simllm.params.mode
    assert described["defaults"] == {"reuse": True, "mode": mode, "similarity_threshold": 0.95}
    assert described["modes"] == ["aligned", "sandwich", "top_layer"]
    assert described["similarity_threshold"] == 0.95
    assert described["aligned"]["blend"]["policy"] == "kv_deviation"
