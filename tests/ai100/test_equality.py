"""The equation: with the cache an answer is what it is without, and what Hugging Face generates from these tokens."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from ai100.engine import AI100Engine
from ai100.runtimes.runtime import StaticShapes
from ai100.settings import open_runtime
from ai100.topics import KeywordTopics, load_topics
from kvarena.engines.base import Sampling
from kvarena.model import find_model
from support.ai100_engine import AI100, CHAT_TEMPLATE, LISTS, MAX_TOKENS, Answer, at_once, make_ai100, read
from support.tiny_models import WORDS

NUM_TURNS = 30
TOWN = Path(find_model("town", "cpu").name)
Make = Callable[..., AI100]


def random_turns(seed: int, conversations: str = "abc", num: int = NUM_TURNS) -> list[tuple[str, str]]:
    """Conversation and question: topics of the lists, others, and follow-ups."""
    rng = random.Random(seed)
    openings = ["river and rain", "bread, tea", "hill stone", "goat or cat", "seven lamps", "the market road"]
    followups = ["And why?", "Tell me more", "Is it old?"]
    return [
        (
            rng.choice(conversations),
            f"{rng.choice(openings + followups)} {' '.join(rng.choices(WORDS[8:], k=rng.randint(0, 4)))}",
        )
        for _ in range(num)
    ]


def check(ai100: AI100, cached: Answer, uncached: Answer) -> None:
    assert cached.prompt_ids == uncached.prompt_ids, "the same text"
    assert cached.token_ids == uncached.token_ids == ai100.generate(cached.prompt_ids)
    assert cached.finish_reason == uncached.finish_reason
    assert cached.details["turn"] == uncached.details["turn"]
    assert cached.details["topic"] == uncached.details["topic"]
    assert uncached.report.num_reused_tokens == 0
    assert uncached.details["status"] == "FULL_PREFILL"
    ai100.engine.batcher.slots.check_integrity()


@pytest.mark.parametrize("seed", range(2))
def test_over_topics_evictions_and_resets(make: Make, seed: int) -> None:
    cached, uncached = make(max_context=80), make(max_context=80, use_cache=False)
    statuses = []
    for conversation, question in random_turns(seed):
        answer = cached.ask(question, conversation)
        check(cached, answer, uncached.ask(question, conversation))
        statuses.append((answer.details["status"], (answer.details["reason"] or "")[:12]))
    assert {"NEW_TOPIC", "INCREMENTAL_PREFILL", "RESET_TOPIC"} <= {status for status, _ in statuses}
    assert {"its slot had", "its earlier "} <= {reason for _, reason in statuses}, "both kinds of resets"
    assert cached.engine.batcher.slots.num_evictions > 3
    assert cached.runtime.num_prefilled() < 0.8 * uncached.runtime.num_prefilled()


def test_as_a_client_that_sends_its_history_and_no_name(make: Make) -> None:
    cached, uncached = make(), make(use_cache=False)
    for conversation, question in random_turns(7):
        answer = cached.chat(question, conversation)
        check(cached, answer, uncached.chat(question, conversation))
    assert cached.runtime.num_prefilled() < 0.8 * uncached.runtime.num_prefilled()


def test_the_switch_of_a_single_request(ai100: AI100) -> None:
    for number, (conversation, question) in enumerate(random_turns(8, "ab", 24)):
        answer = ai100.ask(question, conversation, use_cache=number % 3 != 0)
        assert answer.token_ids == ai100.generate(answer.prompt_ids)
        assert (answer.details["status"] == "FULL_PREFILL") == (number % 3 == 0)


@pytest.mark.parametrize("salted", [False, True])
def test_several_users_at_once(make: Make, salted: bool) -> None:
    """What a user is answered doesn't depend on who else is there; with more users than slots and batch rows."""
    together, alone = make(), make()
    turns = {user: random_turns(20 + number, "x", 6) for number, user in enumerate("abcde")}

    def talk(ai100: AI100, user: str) -> list[Answer]:
        name, salt = ("same name", user) if salted else (user, "")
        return [ai100.ask(question, name, salt=salt) for _, question in turns[user]]

    answers: dict[str, list[Answer]] = {}

    def keep_answers(user: str) -> Answer:
        answers[user] = talk(together, user)
        return answers[user][-1]

    at_once([partial(keep_answers, user) for user in turns])
    for user in turns:
        for answer, expected in zip(answers[user], talk(alone, user), strict=True):
            assert (answer.prompt_ids, answer.token_ids) == (expected.prompt_ids, expected.token_ids)
            assert answer.token_ids == together.generate(answer.prompt_ids)
    together.engine.batcher.slots.check_integrity()
    assert max(len(rows) for rows in together.runtime.decodes) == 2, "they did decode together"


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_other_families(tmp_path: Path, family: str) -> None:
    from support.tiny_models import save_tiny_model

    folder = save_tiny_model(tmp_path, family)
    reference: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ai100 = make_ai100(folder, reference=reference)
    for conversation, question in random_turns(3, "ab", 10):
        answer = ai100.ask(question, conversation)
        assert answer.token_ids == ai100.generate(answer.prompt_ids)
    ai100.engine.close()


def test_the_cards_code_over_the_exported_graph(ai100_folder: Path, reference: Any) -> None:
    """Nothing above the runtime knows which one it is."""
    pytest.importorskip("onnxruntime")
    runtime: Any = open_runtime("onnx", str(ai100_folder), StaticShapes(8, 128, 2, 2))
    runtime.tokenizer.chat_template = CHAT_TEMPLATE
    ai100 = AI100(AI100Engine(runtime, "tiny", KeywordTopics(LISTS), gen_len=MAX_TOKENS), runtime, reference)
    turns = random_turns(5, "ab", 8)
    answers = [ai100.ask(question, conversation) for conversation, question in turns]
    answers += at_once([partial(ai100.ask, "river bread", name) for name in "xyz"])
    assert all(answer.token_ids == ai100.generate(answer.prompt_ids) for answer in answers)
    assert {"NEW_TOPIC", "INCREMENTAL_PREFILL", "RESET_TOPIC"} == {answer.details["status"] for answer in answers}
    ai100.engine.close()


def test_a_context_of_any_small_length_is_filled_and_never_passed(make: Make) -> None:
    shapes = StaticShapes(prefill_seq_len=8, ctx_len=61, full_batch_size=2, kv_cache_batch_size=2)
    ai100 = make(shapes=shapes)
    statuses = set()
    for _ in range(12):
        answer = ai100.ask("river rain", "c")
        assert answer.token_ids == ai100.generate(answer.prompt_ids)
        statuses.add(answer.details["status"])
    assert "RESET_TOPIC" in statuses
    endless = make(shapes=shapes, gen_len=100)
    longest = endless.ask("rain", sampling=Sampling(temperature=0.0, ignore_eos=True))
    assert len(longest.prompt_ids) + len(longest.token_ids) == 61
    assert endless.ask("rain").details["status"] == "RESET_TOPIC"
    ai100.engine.batcher.slots.check_integrity()


def test_the_town_model_whose_answers_end_by_themselves() -> None:
    """The end-of-sequence token has no KV yet: it is the first token of the follow-up's prefill."""
    reference: Any = AutoModelForCausalLM.from_pretrained(TOWN, dtype=torch.float32).eval()
    ai100 = make_ai100(TOWN, StaticShapes(64, 512, 1, 2), KeywordTopics(load_topics()), reference=reference)
    notes = {
        "role": "system",
        "content": "Use only the notes below.<note>Igor keeps bees. The door of Igor is pink.<note>",
    }
    questions = ["What colour is the door of Igor?", "And what does he keep?", "Who is Igor?", "And what does he keep?"]
    answers = [read(ai100.start([notes, {"role": "user", "content": q}], "c"), ai100.engine) for q in questions]
    assert [answer.text.strip() for answer in answers[:2]] == ["pink", "bees"]
    for before, after in pairwise(answers):
        known = before.prompt_ids + before.token_ids
        assert (before.finish_reason, after.details["topic"]) == ("stop", "townspeople")
        assert after.prompt_ids[: len(known) + 1] == [*known, *ai100.runtime.eos_token_ids]
        assert after.report.num_reused_tokens == len(known)
        assert after.token_ids == ai100.generate(after.prompt_ids)
    ai100.engine.close()


def test_a_follow_up_prefills_its_new_tokens_and_the_pending_one(ai100: AI100) -> None:
    """Counted at the device."""
    first = ai100.ask("river rain stone")
    ai100.runtime.prefills.clear()
    following = ai100.ask("And the rain?")
    known = first.prompt_ids + first.token_ids
    new = following.prompt_ids[len(known) :]
    assert following.prompt_ids == known + new
    assert first.finish_reason == "length"
    assert ai100.engine.tokenizer.decode(new) == "</s>user: And the rain?\nassistant: "
    assert ai100.runtime.num_prefilled() == len(new) + 1 == following.details["num_prefilled_tokens"]
    assert ai100.runtime.prefills[0][1] == len(known) - 1, "from the slot's last position"
    assert following.report.num_reused_tokens == len(known) - 1
    assert following.details["num_decoded_tokens"] == len(following.token_ids) <= MAX_TOKENS


def test_seeded_samples_with_and_without(ai100: AI100) -> None:
    for seed in range(8):
        sampling = Sampling(max_tokens=MAX_TOKENS, temperature=0.9, top_p=0.9, seed=seed, num_logprobs=2)
        with_cache, without = (
            ai100.ask("river rain", name, sampling=sampling, use_cache=on) for name, on in (("a", True), ("b", False))
        )
        assert with_cache.prompt_ids == without.prompt_ids
        assert with_cache.token_ids == without.token_ids
