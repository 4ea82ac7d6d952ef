"""Contenders that answer questions: over a real HTTP server, and in this process beside Hugging Face `generate`."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvarena.bench.quality.asking import (
    MAX_FAILURES_IN_A_ROW,
    Asking,
    Attempt,
    GreedyAnswer,
    Messages,
    NoAnswer,
    ask_all,
    closeness,
)
from kvarena.bench.quality.hf_answerer import engines
from kvarena.bench.quality.questions import load_questions
from kvarena.bench.quality.session import HTTPAnswerer, servers
from kvarena.bench.variants import Variant, blend_variants
from kvarena.server.state import ApiConfig
from support.question_folder import write_question_folder
from support.real_server import RealServer, serving
from support.scripted_engine import ScriptedEngine
from support.small_openai_server import OFFER, SmallServer
from support.tiny_models import save_tiny_model

SETUP = Variant("scripted")
NUM_TOKENS = 8
ASKING = Asking("#", 9)


def at_most(max_tokens: int) -> Asking:
    return Asking("#", max_tokens)


@pytest.fixture(scope="module")
def real() -> Iterator[RealServer[ScriptedEngine]]:
    with serving(ScriptedEngine()) as server:
        yield server


def said(script: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"#One.#Two.#\n{script}"}]


def test_the_sink_of_a_blend_is_the_one_that_it_tells() -> None:
    blend = SmallServer(pieces=["tea"], offer=OFFER | {"sink_tokens": 3})
    try:
        assert HTTPAnswerer("blend", blend.url).sinks == (3,)
    finally:
        blend.stop()


def test_an_answer_over_http(real: RealServer[ScriptedEngine]) -> None:
    server = HTTPAnswerer("scripted", real.url + "/v1")
    answer = server.answer(said("say the old lamp"), SETUP, at_most(20))
    assert answer.text == "the old lamp"
    assert answer.is_complete
    assert answer.ttft_ms > 0
    assert answer.reuse
    assert 0 < answer.reuse.num_reused_tokens < answer.reuse.num_prompt_tokens
    assert "".join(one.token for one in answer.logprobs) == "the old lamp</s>"
    assert max(answer.logprobs[0].top.values()) == pytest.approx(-0.5)
    assert not server.answer(said("forever"), SETUP, at_most(3)).is_complete
    assert HTTPAnswerer("x", real.url, has_logprobs=False).answer(said("say tea"), SETUP, at_most(9)).logprobs == []
    assert not server.is_blend
    assert server.sinks == ()
    server.warm([], "#", lambda: None)


@pytest.mark.parametrize(
    ("script", "why"), [("refuse", "nothing is accepted"), ("fail", "."), ("break one two three four", ".")]
)
def test_what_goes_wrong_has_its_reason(real: RealServer[ScriptedEngine], script: str, why: str) -> None:
    with pytest.raises(NoAnswer, match=why):
        HTTPAnswerer("scripted", real.url).answer(said(script), SETUP, at_most(9))


def test_choices_reach_the_server(real: RealServer[ScriptedEngine]) -> None:
    with pytest.raises(NoAnswer, match="policy"):  # which this engine doesn't have
        HTTPAnswerer("scripted", real.url).answer(said("say tea"), Variant("scripted", "random", 0.1), at_most(9))


def test_no_server() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(ValueError, match=rf"there: no OpenAI server answers at http://127.0.0.1:{port}"):
        servers([f"there=127.0.0.1:{port}"], 1.0, True)


def test_a_server_that_wants_a_key() -> None:
    with serving(ScriptedEngine(), ApiConfig(api_key="sesame")) as locked:
        for key, has in (("", "not set here"), ("other", "another one than this")):
            with pytest.raises(ValueError, match=f"wants KVARENA_API_KEY, which is {has}"):
                HTTPAnswerer("scripted", locked.url, api_key=key)


def test_names_without_a_stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVARENA_HOME", str(tmp_path))
    with pytest.raises(ValueError, match="nothing runs; start the stack"):
        servers([], 1.0, True)
    with pytest.raises(ValueError, match="blend isn't running; running: nothing"):
        servers(["blend"], 1.0, True)
    with pytest.raises(ValueError, match="there are plain, blend, not 'prefix'"):
        engines(["prefix"], None, None, 1.0)


def test_a_dead_contender_is_given_up_and_the_others_go_on(real: RealServer[ScriptedEngine], tmp_path: Path) -> None:
    records = [{"question": "\nsay tea", "answers": ["tea"]}] * (MAX_FAILURES_IN_A_ROW + 3)
    question_set = load_questions(write_question_folder(tmp_path, records))
    alive = HTTPAnswerer("alive", real.url)
    with serving(ScriptedEngine()) as stopped:
        dead = HTTPAnswerer("dead", stopped.url)
    attempts: list[Attempt] = []
    ask_all(question_set, [Variant("alive"), Variant("dead")], {"alive": alive, "dead": dead}, ASKING, attempts.append)
    outcomes = {name: [one.outcome for one in attempts if one.variant.contender == name] for name in ("alive", "dead")}
    assert outcomes == {"alive": ["answered"] * len(records), "dead": ["failed"] * len(records)}
    reasons = [one.reason for one in attempts if one.variant.contender == "dead"]
    assert sum(reason.startswith("not asked") for reason in reasons) == 3


class Counting(HTTPAnswerer):
    num_asked = 0

    def answer(self, messages: Messages, variant: Variant, *how: Any) -> GreedyAnswer:
        self.num_asked += 1
        return super().answer(messages, Variant(self.name), *how)


def test_what_is_the_same_work_is_done_once(real: RealServer[ScriptedEngine], tmp_path: Path) -> None:
    question_set = load_questions(write_question_folder(tmp_path, [{"question": "\nsay tea", "answers": ["tea"]}] * 3))
    blend = Counting("blend", real.url)
    variants = blend_variants("blend", ["kv_deviation", "random"], [0.0, 0.5, 1.0], [1, 2])
    attempts: list[Attempt] = []
    ask_all(question_set, variants, {"blend": blend}, ASKING, attempts.append)
    assert sorted((one.question, one.variant.label) for one in attempts) == sorted(
        (number, variant.label) for number in range(3) for variant in variants
    )
    assert blend.num_asked == 3 * 5  # none, all, two check layers, random


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def test_in_process_answers_are_those_of_generate(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    made = engines([], str(folder), " # ", 0.1)
    variants = [Variant("plain"), *blend_variants("blend", ["kv_deviation", "all"], [1.0], [])]
    for words in ("tea rain hill goat blue river", "stone seven market lamp road bread under morning old"):
        text = f" # {words * 6} # {words[::-1] * 5} # {words}"
        messages = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=False
        )
        output = reference.generate(ids, max_new_tokens=NUM_TOKENS, do_sample=False)
        expected = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        for variant in variants:
            assert made[variant.contender].answer(messages, variant, at_most(NUM_TOKENS)).text == expected, variant
    made["plain"].close()


def test_closeness_in_process_is_that_of_plain_forwards(folder: Path) -> None:
    """Full prefill's answer, fed to a KV that came from elsewhere, gives what the model itself gives over all of it."""
    made = engines([], str(folder), " # ", 0.1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = f" # {'tea rain hill goat blue river ' * 6} # {'old lamp road bread ' * 8} # what is blue?"
    messages = [{"role": "user", "content": text}]
    full = made["plain"].answer(messages, Variant("plain"), at_most(NUM_TOKENS))
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)

    def logprobs(prompt: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            logits = model(torch.tensor([[*prompt, *full.token_ids]])).logits[0]
        found: torch.Tensor = logits[len(prompt) - 1 : -1].log_softmax(-1)
        return found

    expected = logprobs(prompt)
    assert full.forced_logprobs is not None
    torch.testing.assert_close(full.forced_logprobs, expected, atol=1e-4, rtol=1e-4)

    shorter = [{"role": "user", "content": text[:-10]}]
    other = made["plain"].answer(shorter, Variant("plain"), at_most(NUM_TOKENS), full)
    theirs = logprobs(tokenizer.apply_chat_template(shorter, add_generation_prompt=True, return_dict=False))
    found = closeness(full, other)
    assert found
    kl = torch.nn.functional.kl_div(theirs, expected, reduction="none", log_target=True).sum(-1)
    assert found.kl == pytest.approx(float(kl.mean()), abs=1e-4)
    assert found.kl > 0.01, "another prompt"
    assert found.token_agreement == pytest.approx(float((theirs.argmax(-1) == expected.argmax(-1)).float().mean()))
    assert other.text == made["plain"].answer(shorter, Variant("plain"), at_most(NUM_TOKENS)).text, (
        "decoded on from there"
    )

    for variant in (Variant("plain"), *blend_variants("blend", ["kv_deviation", "all"], [1.0], [])):
        same = made[variant.contender].answer(messages, variant, at_most(NUM_TOKENS), full)
        found = closeness(full, same)
        assert found
        assert found.token_agreement == 1, variant
        assert found.kl == pytest.approx(0, abs=1e-5), variant
        assert same.text == full.text
    naive = made["blend"].answer(messages, Variant("blend", "none"), at_most(NUM_TOKENS), full)
    found = closeness(full, naive)
    assert found
    assert found.kl > 1e-4
    only = made["blend"].answer(messages, Variant("blend", "none"), Asking("#", NUM_TOKENS, compares_only=True), full)
    assert naive.forced_logprobs is not None
    assert only.forced_logprobs is not None
    torch.testing.assert_close(only.forced_logprobs, naive.forced_logprobs)
    made["plain"].close()


def test_full_prefill_answers_first_and_distributions_are_not_kept(folder: Path, tmp_path: Path) -> None:
    question_set = load_questions(write_question_folder(tmp_path, [{"question": "tea rain?", "answers": ["x"]}] * 3))
    made = engines([], str(folder), " # ", 0.1)
    variants = [*blend_variants("blend", ["kv_deviation"], [0.0, 1.0], []), Variant("plain")]
    attempts: list[Attempt] = []
    ask_all(question_set, variants, made, Asking(" # ", 4, Variant("plain")), attempts.append)
    assert [one.variant for one in attempts[::3]] == [Variant("plain")] * 3
    assert {one.variant for one in attempts[1::3]} == set(variants[:2]), "the others take turns"
    for one in attempts:
        assert one.answer
        assert one.answer.forced_logprobs is None
        assert one.closeness
        assert one.closeness.method == "teacher_forced"
    attempts.clear()
    ask_all(question_set, variants, made, Asking(" # ", 4), attempts.append, numbers=[1])
    assert [(one.question, one.closeness) for one in attempts] == [(1, None)] * 3
    made["plain"].close()


def test_too_long_for_the_model(folder: Path) -> None:
    made = engines(["plain"], str(folder), None, 0.1)
    with pytest.raises(NoAnswer, match="are more than the model's 2048"):
        made["plain"].answer([{"role": "user", "content": "tea " * 3000}], Variant("plain"), at_most(9))
    made["plain"].close()
