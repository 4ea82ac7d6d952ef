"""`SimLLMInference`: without reuse Hugging Face's `generate`, and what its users see."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from kvarena.simllm import SimLLMInference
from support.simllm_tasks import NUM_TOKENS, Tasks
from support.tiny_models import random_text, save_tiny_model

MODES = ["top_layer", "sandwich", "aligned"]


@pytest.fixture(params=MODES)
def tasks(request: pytest.FixtureRequest, folder: Path) -> Iterator[Tasks]:
    tasks = Tasks.load(folder, mode=request.param, similarity_threshold=0.99)
    yield tasks
    tasks.simllm.close()


def prompts_of(seed: int, count: int) -> list[str]:
    rng = random.Random(seed)
    return [random_text(rng, rng.randint(1, 60)) for _ in range(count)]


def stock_batch(folder: Path, prompts: list[str]) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", pad_token="</s>")
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    batch = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
    output = model.generate(**batch, do_sample=False, max_new_tokens=40)
    texts: list[str] = tokenizer.batch_decode(output[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
    return texts


def test_without_reuse_answers_are_generates(tasks: Tasks, folder: Path) -> None:
    prompts = prompts_of(0, 8)
    simllm = tasks.simllm
    assert simllm.batch_generate(prompts, 40, enable_kv_reuse=False) == stock_batch(folder, prompts)
    for prompt in prompts[:2]:
        assert simllm.generate(prompt, 40, enable_kv_reuse=False) == stock_batch(folder, [prompt])[0]
        assert tasks.ask(prompt, reuse=False)[0].token_ids == tasks.generate(prompt)
    assert len(simllm.manager) == simllm.get_statistics()["num_searches"] == 0


def test_misses_are_generates(tasks: Tasks, folder: Path) -> None:
    prompts = prompts_of(1, 8)
    tasks.simllm.set_similarity_threshold(1.0)
    assert tasks.simllm.batch_generate(prompts[:6], 40) == stock_batch(folder, prompts[:6])
    assert [tasks.simllm.generate(prompt, 40) for prompt in prompts[6:]] == stock_batch(folder, prompts[6:])
    assert tasks.simllm.get_statistics()["num_misses"] == len(prompts)


def test_statistics(tasks: Tasks) -> None:
    prompts = prompts_of(2, 3)
    tasks.simllm.batch_generate(prompts, 1)
    tasks.simllm.generate(prompts[0], 1)
    num_tokens = [len(tasks.encode(prompt)) for prompt in (*prompts, prompts[0])]
    statistics = tasks.simllm.get_statistics()
    assert (statistics["num_hits"], statistics["num_misses"], statistics["cache_size"]) == (1, 3, 3)
    assert (statistics["num_prompts"], statistics["num_prompt_tokens"]) == (4, sum(num_tokens))
    assert statistics["num_layer_passes_without_reuse"] == 4 * sum(num_tokens)
    last = {"top_layer": num_tokens[0], "sandwich": 4 * num_tokens[0], "aligned": 4}[statistics["mode"]]
    assert statistics["num_layer_passes"] == 4 * sum(num_tokens[:3]) + last
    theirs = ("cache_hits", "cache_misses", "total_queries", "hit_rate", "total_inferences")
    assert [statistics[name] for name in theirs] == [1, 3, 4, 0.25, 4], "under the demonstration's names"
    assert statistics["avg_inference_time"] == statistics["total_inference_time"] / 4 > 0
    tasks.simllm.reset_cache()
    reset = tasks.simllm.get_statistics()
    assert not any(reset[name] for name in reset if name.startswith(("num_", "cache_", "total_", "avg_")))
    assert not tasks.ask(prompts[0])[0].outcome.is_hit


def test_the_threshold_decides(tasks: Tasks) -> None:
    prompt = random_text(random.Random(3), 40)
    near = f"{prompt} goat river hill"
    embed = tasks.reference.get_input_embeddings()
    mean, near_mean = (embed(torch.tensor(tasks.encode(text))).detach().mean(0) for text in (prompt, near))
    similarity = float(torch.cosine_similarity(mean, near_mean, dim=0))
    tasks.ask(prompt)
    tasks.simllm.set_similarity_threshold(similarity - 1e-4)
    outcome = tasks.ask(near)[0].outcome
    assert outcome.similarity == pytest.approx(similarity, abs=1e-5)
    tasks.simllm.reset_cache()
    tasks.ask(prompt)
    tasks.simllm.set_similarity_threshold(similarity + 1e-4)
    assert not tasks.ask(near)[0].outcome.is_hit
    with pytest.raises(ValueError, match="from -1 to 1, not 2"):
        tasks.simllm.set_similarity_threshold(2)


def test_names_of_tasks(tasks: Tasks) -> None:
    prompt = prompts_of(4, 1)[0]
    tasks.simllm.generate(prompt, 1, task_id="mine")
    assert tasks.ask(prompt)[0].outcome.matched_task_id == "mine"


def test_repeated_prompts_of_a_batch_hit(tasks: Tasks) -> None:
    one, other = prompts_of(8, 2)
    answers = tasks.ask(one, other, one, one)
    assert [answer.outcome.is_hit for answer in answers] == [False, False, True, True]
    assert {answer.outcome.matched_task_id for answer in answers[2:]} == {answers[0].outcome.task_id}
    assert [answer.token_ids for answer in answers[:2]] == [tasks.generate(one), tasks.generate(other)]
    if tasks.simllm.aligned:
        assert answers[2].token_ids == answers[3].token_ids == tasks.generate(one)


def test_lost_quality_is_told(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Once in the log, and in the statistics. The default mode has nothing to tell."""
    for mode in MODES:
        simllm = Tasks.load(folder, mode=mode).simllm
        simllm.batch_generate(["tea", "tea"], 1)
        told = [record.getMessage() for record in caplog.records]
        assert [message for message in told if "loses its answers" in message] == told
        assert simllm.get_statistics()["warning"] == (told[0] if told else None)
        assert len(told) == (mode != "aligned")
        caplog.clear()
        simllm.close()
    default = SimLLMInference.from_pretrained(str(folder), device="cpu")
    assert default.get_statistics()["mode"] == "aligned"
    default.close()


def test_an_empty_batch(tasks: Tasks) -> None:
    assert tasks.simllm.batch_generate([]) == []
    assert tasks.simllm.answer([], enable_kv_reuse=False) == []


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([""], {}, "at least one token, not ''"),
        (["tea", ""], {}, "at least one token, not ''"),
        ("tea", {}, "not one text"),
        (["tea " * 2048], {}, "exceed the context of 2048"),
        (["tea"], {"max_new_tokens": 2048}, "exceed the context of 2048"),
        (["tea"], {"num_beams": 3}, "num_beams must be 1"),
        (["tea"], {"num_return_sequences": 2, "enable_kv_reuse": False}, "num_return_sequences"),
    ],
)
def test_what_cant_be_answered_is_refused(tasks: Tasks, prompts: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tasks.simllm.batch_generate(prompts, **settings)
    assert tasks.ask("tea")[0].token_ids == tasks.generate("tea")


def test_seeded_samples_are_generates(tasks: Tasks) -> None:
    prompt = prompts_of(5, 1)[0]
    ids = torch.tensor([tasks.encode(prompt)])
    drawing: dict[str, Any] = {"do_sample": True, "temperature": 0.8, "top_p": 0.9}
    torch.manual_seed(7)
    output = tasks.reference.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NUM_TOKENS, top_k=0, **drawing
    )
    expected = tasks.simllm.model.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    torch.manual_seed(7)
    assert tasks.simllm.generate(prompt, NUM_TOKENS, **drawing) == expected
    refused: list[dict[str, Any]] = [{"temperature": 0.0}, {"temperature": 1.0, "top_p": 0.0}]
    for settings in refused:
        with pytest.raises(ValueError, match="temperature above 0 and top_p above 0"):
            tasks.simllm.generate(prompt, 1, do_sample=True, **settings)


def test_many_threads(tasks: Tasks) -> None:
    prompts = prompts_of(6, 12)
    tasks.simllm.set_similarity_threshold(1.0)
    expected = [tasks.generate(prompt) for prompt in prompts]
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda prompt: tasks.ask(prompt)[0].token_ids, prompts))
    assert answers == expected
    assert tasks.simllm.get_statistics()["num_misses"] == len(prompts)


def test_a_missing_device_warns_and_is_the_cpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    with pytest.warns(RuntimeWarning, match="no cuda; using the CPU"):
        simllm = SimLLMInference.from_pretrained(str(folder))
    assert simllm.manager.device.type == simllm.model.module.device.type == "cpu"
    simllm.close()


def test_another_family_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model of type llama; .* of type qwen2"):
        SimLLMInference.from_pretrained(str(save_tiny_model(tmp_path, "qwen2")), device="cpu")
