"""Mode "top_layer": hits against layers written in plain torch, misses against Hugging Face's `generate`."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kvarena.contenders.simllm.aligned import AlignedReuse
from kvarena.contenders.simllm.modeling import TaskKV
from kvarena.contenders.simllm.params import WARNINGS
from kvarena.engines.hf.model import HFModel
from kvarena.simllm import AlignedParams, InterTaskKVManager, LlamaForCausalLMWithKVReuse
from support.plain_llama import PlainLlama
from support.simllm_tasks import NUM_TOKENS, Tasks, prompt_of
from support.tiny_models import save_tiny_model


@pytest.fixture
def tasks(folder: Path) -> Iterator[Tasks]:
    tasks = Tasks.load(folder, mode="top_layer", similarity_threshold=0.95)
    yield tasks
    tasks.simllm.close()


def similar(prompt: str, *more: str) -> str:
    return " ".join([prompt, *more])


def reused_from(tasks: Tasks, prompt: str) -> str:
    return tasks.simllm.manager.generate_task_id(prompt)


def test_the_plain_layers_are_a_llama(tasks: Tasks) -> None:
    prompt = prompt_of(0)
    expected, _ = PlainLlama(tasks.reference).answer(tasks.encode(prompt), NUM_TOKENS)
    assert tuple(expected) == tasks.generate(prompt)


def test_a_miss_is_the_standard_pass_and_keeps_the_last_layer(tasks: Tasks) -> None:
    prompt = prompt_of(1)
    (answer,) = tasks.ask(prompt)
    assert answer.token_ids == tasks.generate(prompt)
    assert not answer.outcome.is_hit
    assert answer.outcome.num_layer_passes == 4 * len(tasks.encode(prompt))
    (entry,) = tasks.simllm.manager._entries.values()
    ids = torch.tensor([tasks.encode(prompt)])
    with torch.no_grad():
        cache = tasks.reference(ids, use_cache=True).past_key_values
        embedding = tasks.reference.model.embed_tokens(ids[0]).mean(0)
    torch.testing.assert_close(entry.top_layer_kv, (cache.layers[-1].keys, cache.layers[-1].values))
    torch.testing.assert_close(entry.task_embedding, embedding)


@pytest.mark.parametrize("shape", ["the same", "longer", "shorter"])
def test_a_hit_is_the_last_layer_over_the_earlier_prompt(tasks: Tasks, shape: str) -> None:
    earlier = prompt_of(2)
    prompt = {
        "the same": earlier,
        "longer": similar(earlier, "tea", "lamp"),
        "shorter": " ".join(earlier.split()[:36]),
    }
    tasks.ask(earlier)
    ids, num_layers = tasks.encode(prompt[shape]), 4
    with tasks.counted(len(ids)) as passes:
        (answer,) = tasks.ask(prompt[shape])
    assert answer.outcome.matched_task_id == reused_from(tasks, earlier)
    assert answer.outcome.is_approximate
    assert passes == [0, 0, 0, len(ids)]
    assert answer.outcome.num_layer_passes == len(ids) < num_layers * len(ids)
    expected, _ = PlainLlama(tasks.reference).answer_of_a_hit(tasks.encode(earlier), ids, NUM_TOKENS)
    assert answer.token_ids == tuple(expected)


def test_logits_and_what_each_answer_token_attends_to(tasks: Tasks) -> None:
    """Step by step: all layers for the answer, the lower ones over the answer alone, the last one over everything."""
    earlier, prompt = prompt_of(3), similar(prompt_of(3), "goat")
    tasks.ask(earlier)
    module = tasks.simllm.model.module
    earlier_ids, ids = tasks.encode(earlier), tasks.encode(prompt)
    kv = TaskKV(module.config, ["new"])
    tokens, expected = PlainLlama(tasks.reference).answer_of_a_hit(earlier_ids, ids, NUM_TOKENS)
    with torch.inference_mode():
        logits = [module(torch.tensor([ids]), past_key_values=kv).logits[0, -1]]
        for number, token in enumerate(tokens[:-1]):
            lengths = [kv.get_seq_length(layer) for layer in range(4)]
            assert lengths == [number] * 3 + [len(earlier_ids) + len(ids) + number]
            logits.append(module(torch.tensor([[token]]), past_key_values=kv).logits[0, -1])
    torch.testing.assert_close(torch.stack(logits).double(), expected, atol=1e-3, rtol=1e-3)


def test_hits_and_misses_in_one_batch(tasks: Tasks) -> None:
    earlier = [prompt_of(4, 30), prompt_of(5, 44)]
    tasks.ask(*earlier)
    misses = [prompt_of(6, 7), prompt_of(7, 60)]
    prompts = [similar(earlier[1], "tea"), misses[0], earlier[0], misses[1], similar(earlier[1], "old", "cat")]
    plain = PlainLlama(tasks.reference)
    longest = max(len(tasks.encode(prompt)) for prompt in prompts)
    with tasks.counted(longest) as passes:
        answers = tasks.ask(*prompts)
    assert [answer.outcome.is_hit for answer in answers] == [True, False, True, False, True]
    assert passes == [2 * longest] * 3 + [5 * longest], "padded to the longest"
    for answer, prompt, source in zip(answers, prompts, [earlier[1], None, earlier[0], None, earlier[1]], strict=True):
        ids = tasks.encode(prompt)
        if source is None:
            assert answer.token_ids == tasks.generate(prompt)
            assert answer.outcome.num_layer_passes == 4 * len(ids)
        else:
            assert answer.outcome.matched_task_id == reused_from(tasks, source)
            assert answer.outcome.num_layer_passes == len(ids)
            assert answer.token_ids == tuple(plain.answer_of_a_hit(tasks.encode(source), ids, NUM_TOKENS)[0])
    assert len(tasks.simllm.manager) == 4, "hits keep nothing: what they computed is approximate"
    (again,) = tasks.ask(misses[1])
    expected = plain.answer_of_a_hit(tasks.encode(misses[1]), tasks.encode(misses[1]), NUM_TOKENS)[0]
    assert again.token_ids == tuple(expected), "a prompt kept out of a padded batch"


def test_a_batch_of_hits_only(tasks: Tasks) -> None:
    earlier = [prompt_of(8, 25), prompt_of(9, 50)]
    tasks.ask(*earlier)
    prompts = [similar(earlier[1], "lamp"), similar(earlier[0], "road")]
    for answer, prompt, source in zip(tasks.ask(*prompts), prompts, reversed(earlier), strict=True):
        expected, _ = PlainLlama(tasks.reference).answer_of_a_hit(
            tasks.encode(source), tasks.encode(prompt), NUM_TOKENS
        )
        assert answer.token_ids == tuple(expected)


@pytest.mark.parametrize(("num_layers", "num_end_layers"), [(4, 1), (6, 2), (4, 2)])
def test_a_sandwich_runs_its_ends(tmp_path: Path, num_layers: int, num_end_layers: int) -> None:
    """Beside a miss in one batch. Two and two of four layers leave none out."""
    tasks = Tasks.load(save_tiny_model(tmp_path, num_hidden_layers=num_layers), mode="sandwich")
    simllm, ends = tasks.simllm, (num_end_layers, num_end_layers)
    simllm.params = replace(simllm.params, num_end_layers=num_end_layers)
    simllm.set_similarity_threshold(0.95)
    earlier, miss = prompt_of(3), prompt_of(14, 60)
    tasks.ask(earlier)
    prompts = [similar(earlier, "goat"), miss, similar(earlier, "old", "cat")]
    for answer, prompt in zip(tasks.ask(*prompts), prompts, strict=True):
        ids = tasks.encode(prompt)
        if prompt == miss:
            assert answer.token_ids == tasks.generate(prompt)
            continue
        expected, _ = PlainLlama(tasks.reference).answer_of_a_hit(tasks.encode(earlier), ids, NUM_TOKENS, ends)
        assert answer.token_ids == tuple(expected)
        assert answer.outcome.num_layer_passes == 2 * num_end_layers * len(ids)
        assert answer.outcome.is_approximate
    simllm.close()


def test_a_damaged_entry_costs_time_only(tasks: Tasks) -> None:
    prompt = prompt_of(10)
    tasks.ask(prompt)
    entries = tasks.simllm.manager._entries
    (task_id,) = entries
    keys, values = entries[task_id].top_layer_kv
    entries[task_id] = replace(entries[task_id], top_layer_kv=(keys * float("nan"), values))
    (answer,) = tasks.ask(prompt)
    assert answer.token_ids == tasks.generate(prompt)
    assert tasks.ask(prompt)[0].outcome.is_hit, "kept anew"
    assert tasks.simllm.get_statistics()["num_damaged"] == 1


def test_an_earlier_prompt_that_has_no_room_before_the_new_one_is_not_used(tmp_path: Path) -> None:
    tasks = Tasks.load(
        save_tiny_model(tmp_path, max_position_embeddings=128), mode="top_layer", similarity_threshold=0.9
    )
    prompt = prompt_of(11, 55)
    assert 2 * len(tasks.encode(prompt)) < 128 < 2 * len(tasks.encode(prompt)) + NUM_TOKENS
    for _ in range(2):
        (answer,) = tasks.ask(prompt)
        assert not answer.outcome.is_hit
        assert answer.token_ids == tasks.generate(prompt)
    tasks.simllm.close()


def test_a_model_of_one_layer(tmp_path: Path) -> None:
    tasks = Tasks.load(save_tiny_model(tmp_path, num_hidden_layers=1), mode="top_layer")
    earlier, prompt = prompt_of(12), similar(prompt_of(12), "rain")
    tasks.ask(earlier)
    (answer,) = tasks.ask(prompt)
    plain = PlainLlama(tasks.reference)
    assert answer.token_ids == tuple(plain.answer_of_a_hit(tasks.encode(earlier), tasks.encode(prompt), NUM_TOKENS)[0])
    tasks.simllm.close()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_model_alone(folder: Path, attention: str, caplog: pytest.LogCaptureFixture) -> None:
    """`generate_with_kv_reuse` on token ids, as its users call it. The log says once what it may cost."""
    model = LlamaForCausalLMWithKVReuse.from_pretrained(folder, attn_implementation=attention).eval()
    manager = InterTaskKVManager(128, similarity_threshold=0.99, device="cpu")
    rng = random.Random(13)
    first = rng.choices(range(5, 300), k=30)
    ids = torch.tensor([first])
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": NUM_TOKENS, "min_new_tokens": NUM_TOKENS}
    with pytest.raises(ValueError, match="set_kv_manager"):
        model.generate_with_kv_reuse(ids, "first", **settings)
    model.set_kv_manager(manager)
    stock = model.generate(ids, **settings)
    assert len(manager) == 0
    assert torch.equal(model.generate_with_kv_reuse(ids, "first", **settings), stock)
    again = model.generate_with_kv_reuse(ids, "second", **settings)
    assert caplog.messages.count(WARNINGS["top_layer"]) == 1
    assert list(manager._entries) == ["first"]
    assert again[0, 30:].tolist() == PlainLlama(model).answer_of_a_hit(first, first, NUM_TOKENS)[0]
    assert torch.equal(model.generate(ids, **settings), stock)


def test_a_manager_is_one_models_for_as_long_as_it_keeps_tasks(folder: Path, tasks: Tasks) -> None:
    """The same shapes don't make it the same model's KV."""
    twin = LlamaForCausalLMWithKVReuse.from_pretrained(folder)
    tasks.ask(prompt_of(20))
    with pytest.raises(ValueError, match="tasks of another model; reset forgets them"):
        twin.set_kv_manager(tasks.simllm.manager)
    with pytest.raises(ValueError, match="tasks of another model; reset forgets them"):
        AlignedReuse(HFModel(twin, tasks.simllm.model.tokenizer), tasks.simllm.manager, AlignedParams())
    tasks.simllm.model.module.set_kv_manager(tasks.simllm.manager)
    tasks.simllm.manager.reset()
    twin.set_kv_manager(tasks.simllm.manager)


def test_what_a_model_refuses(folder: Path) -> None:
    model = LlamaForCausalLMWithKVReuse.from_pretrained(folder).eval()
    with pytest.raises(ValueError, match="embedding_dim is 64; the model's embeddings have 128"):
        model.set_kv_manager(InterTaskKVManager(64, device="cpu"))
    manager = InterTaskKVManager(128, device="cpu")
    manager.add_task("another model's", torch.ones(128), (torch.ones(1, 8, 3, 16), torch.ones(1, 8, 3, 16)))
    with pytest.raises(ValueError, match=r"num_kv_heads=8.*num_kv_heads=2"):
        model.set_kv_manager(manager)
    model.set_kv_manager(InterTaskKVManager(128, device="cpu"))
    ids = torch.tensor([[5, 6, 7]])
    refused: list[tuple[dict[str, Any], str]] = [
        ({"input_ids": torch.empty(1, 0, dtype=torch.long)}, r"\(1, T\).*T from 1, not \(1, 0\)"),
        ({"task_id": ["a", "b"]}, r"\(2, T\)"),
        ({"num_beams": 2}, "num_beams must be 1"),
        ({"num_return_sequences": 3, "do_sample": True}, "num_return_sequences"),
        ({"use_cache": False}, "use_cache"),
        ({"attention_mask": torch.zeros(1, 3, dtype=torch.long)}, "empty"),
    ]
    for arguments, message in refused:
        with pytest.raises(ValueError, match=message):
            model.generate_with_kv_reuse(**({"input_ids": ids, "task_id": "a"} | arguments))
