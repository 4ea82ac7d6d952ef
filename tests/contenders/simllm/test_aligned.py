"""Mode "aligned": exact where it says so, and elsewhere what stock forwards over the earlier prompt's KV give."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from kvarena.policies.params import BlendParams
from kvarena.simllm import AlignedParams
from support.simllm_tasks import NUM_TOKENS, Tasks, prompt_of


def load(folder: Path, blend: BlendParams | None = None, **settings: Any) -> Tasks:
    aligned = AlignedParams(blend=blend or BlendParams())
    return Tasks.load(folder, mode="aligned", aligned=aligned, **({"similarity_threshold": 0.6} | settings))


@pytest.fixture
def tasks(folder: Path) -> Iterator[Tasks]:
    tasks = load(folder)
    yield tasks
    tasks.simllm.close()


def words_of(prompt: str, start: int, end: int) -> str:
    return " ".join(prompt.split()[start:end])


@torch.inference_mode()
def answer_over(tasks: Tasks, earlier: str, prompt: str, spans: tuple[tuple[int, int], ...]) -> tuple[int, ...]:
    """The earlier prompt's KV of each span, computed with its positions shifted to the new place, and everything else
    computed in order over it.
    """
    earlier_ids, ids = tasks.encode(earlier), tasks.encode(prompt)
    cache, logits = DynamicCache(), torch.empty(0)

    def run(tokens: list[int], start: int, kv: Any) -> Any:
        positions = torch.arange(start, start + len(tokens))[None]
        output = tasks.reference(torch.tensor([tokens]), past_key_values=kv, position_ids=positions, use_cache=True)
        return output.logits[0, -1]

    end = 0
    for start, stop in (*spans, (len(ids), len(ids))):
        if end < start:
            logits = run(ids[end:start], end, cache)
        if start < stop:
            run_ids = ids[start:stop]
            offset = next(i for i in range(len(earlier_ids)) if earlier_ids[i : i + len(run_ids)] == run_ids)
            moved = DynamicCache()
            run(earlier_ids, start - offset, moved)
            for number, layer in enumerate(moved.layers):
                own = slice(offset, offset + len(run_ids))
                cache.update(layer.keys[:, :, own], layer.values[:, :, own], number)
        end = stop
    answer = [int(logits.argmax())]
    while len(answer) < NUM_TOKENS:
        answer.append(int(run(answer[-1:], len(ids) + len(answer) - 1, cache).argmax()))
    return tuple(answer)


def test_the_very_same_prompt_is_exact_and_runs_one_token(tasks: Tasks) -> None:
    prompt = prompt_of(0)
    first, num_tokens = tasks.ask(prompt)[0], len(tasks.encode(prompt))
    assert first.outcome.num_layer_passes == 4 * num_tokens
    with tasks.counted(num_tokens - 1) as passes_of_all_but_the_last, tasks.counted(1) as passes_of_one:
        (again,) = tasks.ask(prompt)
    assert again.token_ids == first.token_ids == tasks.generate(prompt)
    outcome = again.outcome
    assert (outcome.is_hit, outcome.is_approximate) == (True, False)
    assert outcome.similarity == pytest.approx(1)
    assert (outcome.num_reused_tokens, outcome.num_computed_tokens) == (num_tokens - 1, 1)
    assert passes_of_all_but_the_last == [0] * 4
    assert passes_of_one == [NUM_TOKENS] * 4, "the prompt's last token, and all of the answer's but its last"
    assert outcome.num_layer_passes == 4


@pytest.mark.parametrize("num_words", [20, 41, 70])
def test_a_prompt_that_begins_like_the_earlier_one_is_exact(tasks: Tasks, num_words: int) -> None:
    earlier = prompt_of(1)
    tasks.ask(earlier)
    prompt = words_of(f"{earlier} {prompt_of(2)}", 0, num_words)
    (answer,) = tasks.ask(prompt)
    assert answer.token_ids == tasks.generate(prompt)
    assert answer.outcome.is_hit
    assert not answer.outcome.is_approximate
    assert answer.outcome.num_layer_passes == 4 * answer.outcome.num_computed_tokens
    is_news = num_words > 40
    assert len(tasks.simllm.manager) == 1 + is_news
    if is_news:
        (again,) = tasks.ask(prompt)
        assert again.outcome.matched_task_id == answer.outcome.task_id, "it was kept, for it is exact"
        assert again.token_ids == answer.token_ids


def test_moved_runs_without_recomputing(folder: Path) -> None:
    tasks = load(folder, BlendParams("none"))
    for seed in range(3):
        tasks.simllm.reset_cache()
        earlier, new = prompt_of(10 + seed, 60), prompt_of(20 + seed, 12)
        prompt = (
            f"{words_of(new, 0, 5)} {words_of(earlier, 30, 50)} {words_of(new, 5, 8)} {words_of(earlier, 3, 20)} tea"
        )
        tasks.ask(earlier)
        (answer,) = tasks.ask(prompt)
        outcome = answer.outcome
        assert outcome.is_approximate
        assert len(outcome.spans) >= 2
        assert outcome.num_reused_tokens > 25
        assert outcome.num_layer_passes == 4 * outcome.num_computed_tokens
        assert answer.token_ids == answer_over(tasks, earlier, prompt, outcome.spans)
        assert len(tasks.simllm.manager) == 1, "approximate KV is not kept"
    tasks.simllm.close()


def test_recomputing_all_is_exact(folder: Path) -> None:
    tasks = load(folder, BlendParams(ratio=1.0))
    earlier = prompt_of(30)
    tasks.ask(earlier)
    prompt = f"goat {words_of(earlier, 10, 35)} lamp"
    (answer,) = tasks.ask(prompt)
    assert answer.token_ids == tasks.generate(prompt)
    assert answer.outcome.num_recomputed_tokens > 20
    assert not answer.outcome.is_approximate
    tasks.simllm.close()


def test_the_share_that_deviates_most_is_recomputed(folder: Path) -> None:
    tasks = load(folder, BlendParams(ratio=0.25, check_layer=1))
    earlier = prompt_of(31)
    tasks.ask(earlier)
    (answer,) = tasks.ask(f"goat {words_of(earlier, 10, 35)} lamp")
    outcome = answer.outcome
    num_found = sum(end - start for start, end in outcome.spans)
    assert outcome.num_recomputed_tokens == -(-num_found // 4)
    num_looked_at = num_found + outcome.num_computed_tokens - 1
    num_going_on = outcome.num_recomputed_tokens + outcome.num_computed_tokens - 1
    assert outcome.num_layer_passes == 2 * num_looked_at + 3 * num_going_on + 4, "layer 1 is begun twice"
    tasks.simllm.close()


def test_repeats_continuations_and_misses_in_one_batch(tasks: Tasks) -> None:
    earlier = [prompt_of(40, 30), prompt_of(41, 50)]
    tasks.ask(*earlier)
    tasks.simllm.set_similarity_threshold(0.9)
    prompts = [earlier[1], prompt_of(42, 11), f"{earlier[0]} lamp", prompt_of(43, 5), earlier[0], "a"]
    answers = tasks.ask(*prompts)
    assert [answer.outcome.is_hit for answer in answers] == [True, False, True, False, True, False]
    for answer, prompt in zip(answers, prompts, strict=True):
        assert answer.token_ids == tasks.generate(prompt)
    for answer, prompt in zip(tasks.ask(*prompts[1:4]), prompts[1:4], strict=True):
        assert answer.outcome.is_hit, "kept out of a batch"
        assert answer.token_ids == tasks.generate(prompt)


def test_a_similar_prompt_that_shares_no_run_misses(tasks: Tasks) -> None:
    earlier = prompt_of(50)
    shuffled = " ".join(random.Random(51).sample(earlier.split(), 40))
    tasks.ask(earlier)
    tasks.simllm.set_similarity_threshold(0.9)
    (answer,) = tasks.ask(shuffled)
    assert not answer.outcome.is_hit
    assert answer.token_ids == tasks.generate(shuffled)


@pytest.mark.parametrize(("min_reused_ratio", "is_hit"), [(0.3, True), (0.8, False)])
def test_an_earlier_prompt_that_covers_too_little_is_no_match(
    folder: Path, min_reused_ratio: float, is_hit: bool
) -> None:
    """A miss leaves an exact task behind, a hit of moved runs doesn't."""
    tasks = Tasks.load(
        folder, mode="aligned", aligned=AlignedParams(min_reused_ratio=min_reused_ratio), similarity_threshold=0.5
    )
    earlier, new = prompt_of(55), prompt_of(56)
    prompt = f"goat {words_of(earlier, 10, 30)} {words_of(new, 0, 18)}"
    tasks.ask(earlier)
    (answer,) = tasks.ask(prompt)
    assert answer.outcome.is_hit == is_hit
    assert len(tasks.simllm.manager) == (1 if is_hit else 2)
    if not is_hit:
        assert answer.token_ids == tasks.generate(prompt)
    tasks.simllm.close()


@pytest.mark.parametrize("damage", ["nan", "shape", "lost"])
def test_a_damaged_entry_costs_time_only(tasks: Tasks, damage: str) -> None:
    prompt = prompt_of(60)
    tasks.ask(prompt)
    entries = tasks.simllm.manager._entries
    ((task_id, entry),) = entries.items()
    assert entry.whole_kv is not None
    if damage == "nan":
        with torch.inference_mode():
            entry.whole_kv.kv[0, 2, 5, 7] = float("nan")
    elif damage == "shape":
        entries[task_id] = replace(entry, whole_kv=replace(entry.whole_kv, kv=entry.whole_kv.kv[:, :, :5]))
    else:
        entries[task_id] = replace(entry, whole_kv=None)
    (answer,) = tasks.ask(prompt)
    assert not answer.outcome.is_hit
    assert answer.token_ids == tasks.generate(prompt)
    assert tasks.ask(prompt)[0].outcome.is_hit


def test_bad_parameters_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="min_run_tokens must be at least 1, not 0"):
        AlignedParams(min_run_tokens=0)
    with pytest.raises(ValueError, match=r"min_reused_ratio must be from 0 to 1, not 1\.5"):
        AlignedParams(min_reused_ratio=1.5)
    with pytest.raises(ValueError, match="check_layer must be from 0 to 3, not 4"):
        load(folder, BlendParams(check_layer=4))
    with pytest.raises(ValueError, match="aligned, top_layer, sandwich, not 'bottom'"):
        Tasks.load(folder, mode="bottom")
