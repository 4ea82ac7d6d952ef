"""The threshold "auto" over real models: what is compared, and where it ends."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kvarena.bench.quality.questions import load_questions
from kvarena.contenders.simllm.engine import SimLLMEngine
from kvarena.engines.hf import attention
from kvarena.home import project_root
from kvarena.policies.params import BlendParams
from kvarena.simllm import AlignedParams, AutoThresholdParams, SimLLMInference, TaskAnswer, TaskOutcome
from kvarena.synthetic_qa.questions import AnsweredQuestion, messages
from support.simllm_tasks import Tasks
from support.tiny_models import random_text

MODES = ["top_layer", "sandwich", "aligned"]
SOON = AutoThresholdParams(confidence=0.8, sample_ratio=0.5, lowest_threshold=0.0)
MOVED = AlignedParams(min_reused_ratio=0.0, blend=BlendParams("none"))


def load(folder: Path, mode: str, **settings: Any) -> Tasks:
    settings = {"similarity_threshold": "auto", "max_cache_size": 1, "auto": SOON} | settings
    return Tasks.load(folder, mode=mode, aligned=MOVED, attn_implementation=attention.NAME, **settings)


def pairs(count: int, seed: int = 0) -> Iterator[tuple[str, str]]:
    """An earlier prompt, and in turn one that begins as it does and one in which a part of it stands elsewhere."""
    rng = random.Random(seed)
    for number in range(count):
        earlier = random_text(rng, 40)
        if number % 2 == 0:
            yield earlier, f"{earlier} {random_text(rng, 3)}"
        else:
            before, after = [rng.choice(["tea", "cat"])] * 30, [rng.choice(["goat", "road"])] * 12
            yield earlier, " ".join([*before, *earlier.split()[5:30], *after])


def begin(tasks: Tasks, prompt: str, reuse: bool = True) -> TaskAnswer:
    """The first token, which is all that is compared."""
    return tasks.simllm.answer([prompt], 1, reuse)[0]


@dataclass
class Reusing:
    """What reuse gives for a prompt after an earlier one, whatever their similarity."""

    tasks: Tasks

    def first_token(self, earlier: str, prompt: str) -> tuple[int, TaskOutcome]:
        self.tasks.simllm.reset_cache()
        begin(self.tasks, earlier)
        answer = begin(self.tasks, prompt)
        assert answer.outcome.is_hit
        return answer.token_ids[0], answer.outcome


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> str:
    mode: str = request.param
    return mode


@pytest.fixture
def reusing(folder: Path, mode: str) -> Iterator[Reusing]:
    tasks = load(folder, mode, similarity_threshold=0.0)
    yield Reusing(tasks)
    tasks.simllm.close()


def test_a_check_is_reuse_beside_full_prefill_which_answers(folder: Path, mode: str, reusing: Reusing) -> None:
    tasks, seen = load(folder, mode), set()
    for earlier, prompt in pairs(6):
        begin(tasks, earlier)
        (answer,) = tasks.ask(prompt)
        token, reused = reusing.first_token(earlier, prompt)
        assert answer.token_ids == tasks.generate(prompt)
        outcome = answer.outcome
        assert (outcome.is_hit, outcome.num_reused_tokens) == (False, 0)
        assert outcome.check is not None
        assert outcome.check.similarity == pytest.approx(reused.similarity)
        assert outcome.check.agrees == (token == answer.token_ids[0])
        assert outcome.num_layer_passes == 4 * outcome.num_prompt_tokens + reused.num_layer_passes
        seen.add(outcome.check.agrees)
    assert seen == {"aligned": {False, True}, "top_layer": {False}, "sandwich": {True}}[mode], (
        "it leaves out none of four"
    )
    tasks.simllm.close()


def test_a_batch_and_the_engine_make_the_same_checks(folder: Path, mode: str, reusing: Reusing) -> None:
    """Of prompts of different lengths, one with nothing to compare among them."""
    (earlier, longer), (_, other) = pairs(2)
    prompts = [longer, f"{earlier} lamp", other]
    expected = [reusing.first_token(earlier, prompt) for prompt in prompts[:2]]
    tasks = load(folder, mode)
    assert tasks.ask(earlier)[0].outcome.check is None, "there is nothing to compare with"
    answers = tasks.ask(*prompts)
    checks = [answer.outcome.check for answer in answers]
    served = load(folder, mode)
    served.ask(earlier)
    engine = SimLLMEngine(served.simllm, "tiny")
    for prompt, answer, check, (token, reused) in zip(prompts, answers, checks, expected, strict=False):
        assert check is not None
        assert answer.token_ids == tasks.generate(prompt)
        assert check.similarity == pytest.approx(reused.similarity)
        assert check.agrees == (token == tasks.generate(prompt)[0])
        served.simllm.reset_cache()
        served.ask(earlier)
        prefill = engine.prefillers[mode].prefill(served.encode(prompt), "a task", 1)
        assert int(prefill.logits.argmax()) == answer.token_ids[0]
        assert prefill.outcome.check == pytest.approx(check)
    engine.close()
    tasks.simllm.close()


def test_it_ends_above_the_similarity_below_which_reuse_disagrees(folder: Path) -> None:
    tasks = load(folder, "aligned")
    disagreeing: list[float] = []
    for earlier, prompt in pairs(60):
        begin(tasks, earlier)
        threshold = tasks.simllm.manager.similarity_threshold
        answer = begin(tasks, prompt)
        outcome = answer.outcome
        assert answer.token_ids == begin(tasks, prompt, reuse=False).token_ids, "hits are beginnings, which are exact"
        if outcome.is_hit:
            assert threshold is not None
            assert outcome.similarity is not None
            assert outcome.similarity >= threshold - 1e-6
        if outcome.check and not outcome.check.agrees:
            disagreeing.append(outcome.check.similarity)
    statistics = tasks.simllm.get_statistics()
    found = statistics["auto_threshold"]
    assert len(disagreeing) > 5
    assert max(disagreeing) < statistics["similarity_threshold"] == found["threshold"] < 0.995
    assert found["agreement"] >= found["agreement_bound"] >= SOON.target_agreement
    assert statistics["num_hits"] > 0
    tasks.simllm.close()


def test_where_reuse_disagrees_at_any_similarity_nothing_is_reused(folder: Path) -> None:
    """The last layer of a model with random weights, even after the very same prompt."""
    tasks = load(folder, "top_layer")
    rng = random.Random(0)
    for _ in range(30):
        prompt = random_text(rng, 20)
        tokens = {begin(tasks, prompt).token_ids for _ in range(2)}
        assert tokens == {begin(tasks, prompt, reuse=False).token_ids}
    statistics = tasks.simllm.get_statistics()
    assert (statistics["num_hits"], statistics["similarity_threshold"]) == (0, None)
    assert statistics["auto_threshold"]["agreement"] < SOON.target_agreement
    tasks.simllm.close()


def test_the_same_seed_gives_the_same_course(folder: Path) -> None:
    def course() -> list[TaskOutcome]:
        outcomes = [begin(tasks, prompt).outcome for pair in pairs(20) for prompt in pair]
        tasks.simllm.reset_cache()
        return outcomes

    tasks = load(folder, "aligned")
    assert course() == course()
    tasks.simllm.close()


def test_auto_can_be_set_and_unset(folder: Path, mode: str) -> None:
    tasks = load(folder, mode, similarity_threshold=0.9)
    earlier, prompt = next(pairs(1))
    tasks.ask(earlier)
    assert tasks.ask(prompt)[0].outcome.is_hit
    tasks.simllm.set_similarity_threshold("auto")
    assert tasks.ask(prompt)[0].outcome.check is not None
    tasks.simllm.set_similarity_threshold(0.9)
    (answer,) = tasks.ask(prompt)
    assert answer.outcome.is_hit
    assert tasks.simllm.get_statistics()["auto_threshold"] is None
    tasks.simllm.close()


@pytest.mark.slow
def test_on_the_demo_model(mode: str) -> None:
    """Questions over chunks of the shipped town, in another order than the earlier task had them. Mode "aligned" agrees
    and is used; mode "top_layer" doesn't, and isn't.
    """
    root = project_root()
    exam = load_questions(root / "backend" / "models" / "town" / "notes" / "questions.jsonl")
    simllm = SimLLMInference.from_pretrained(
        str(root / "backend" / "models" / "town"),
        device="cpu",
        mode=mode,
        similarity_threshold="auto",
        max_cache_size=1,
        auto=AutoThresholdParams(target_agreement=0.85, confidence=0.8, sample_ratio=0.3),
    )
    rng, checks, num_hits, num_agreeing = random.Random(0), 0, 0, 0

    def prompt_of(question: str, texts: list[str]) -> str:
        chat = messages(texts, [AnsweredQuestion(question, "")], "<note>", exam.system)
        text: str = simllm.model.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        return text

    for question in exam.questions[: 30 if mode == "aligned" else 12]:
        texts = [chunk.text for chunk in question.chunks[:3]]
        simllm.answer([prompt_of(question.question, rng.sample(texts, 3))], 1)
        prompt = prompt_of(question.question, texts)
        (answer,) = simllm.answer([prompt], 1)
        checks += answer.outcome.check is not None
        if answer.outcome.is_hit:
            (expected,) = simllm.answer([prompt], 1, enable_kv_reuse=False)
            num_hits += 1
            num_agreeing += answer.token_ids == expected.token_ids
    found = simllm.get_statistics()["auto_threshold"]
    print(mode, found, f"{num_hits} hits, of which {num_agreeing} agree; {checks} checks")
    assert found["num_samples"] >= checks > 0
    if mode == "aligned":
        assert found["agreement_bound"] >= 0.85
        assert num_agreeing >= 0.85 * num_hits > 5
    else:
        assert (found["threshold"], num_hits) == (None, 0)
    simllm.close()
