"""Two vLLMs behind the vLLM project's router, over one LMCache with a second tier: what each computed is the other's,
whichever the router chooses, and what is left when one of them dies under load.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from support.fleet import Fleet, open_fleet
from support.tiny_models import random_text, save_tiny_model
from support.vllm_engine import plain_tokens, run_in_engine

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
SEPARATOR = " # # "
NUM_TOKENS = 8


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("fleet")
    with open_fleet(str(save_tiny_model(folder / "model")), folder, SEPARATOR) as fleet:
        yield fleet


def prompt_of(chunks: list[str], question: str) -> str:
    return SEPARATOR.join(["tea", *chunks, question])


def ask(client: httpx.Client, prompt: str, session: str = "", salt: str = "") -> dict[str, Any]:
    body: dict[str, Any] = {"model": "tiny", "prompt": prompt, "max_tokens": NUM_TOKENS, "temperature": 0}
    body |= {"ignore_eos": True, "return_token_ids": True, "kv_transfer_params": {"kvarena": {"ratio": 1}}}
    body |= {"cache_salt": salt} if salt else {}
    headers = {"x-session-id": session} if session else {}
    reply = client.post("/v1/completions", json=body, headers=headers)
    answer: dict[str, Any] = reply.raise_for_status().json()
    return answer


def tokens_of(answer: dict[str, Any]) -> list[int]:
    return list(answer["choices"][0]["token_ids"])


def report_of(answer: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = answer["kv_transfer_params"]["kvarena"]
    return found


def test_a_session_stays_and_finds_the_chunks_of_all(fleet: Fleet) -> None:
    """Each server answers over chunks that the other one computed, and right."""
    rng = random.Random(31)
    chunks = [random_text(rng, 60) for _ in range(4)]
    first = ask(fleet.by_session, prompt_of(chunks, "bread"), "the first")
    assert report_of(first)["store_misses"] == 4
    prompts = [prompt_of(rng.sample(chunks, 4), random_text(rng, 6)) for _ in range(18)]
    sessions = [f"session {number % 6}" for number in range(18)]
    answers = [ask(fleet.by_session, prompt, session) for prompt, session in zip(prompts, sessions, strict=True)]
    assert [tokens_of(answer) for answer in answers] == run_in_engine(plain_tokens, fleet.model, prompts, NUM_TOKENS)
    chosen = [fleet.who_answered(answer) for answer in answers]
    assert set(chosen) == {0, 1}
    assert chosen[:6] == chosen[6:12] == chosen[12:], "a session's questions went to one server"
    assert [report_of(answer)["store_misses"] for answer in answers] == [0] * 18


def test_a_prefix_stays_where_it_was_computed(fleet: Fleet) -> None:
    """There vLLM's own cache has it; the same chunks in another order, or elsewhere, are blended."""
    rng = random.Random(32)
    contexts = [[random_text(rng, 60) for _ in range(4)] for _ in range(4)]
    for chunks in contexts:
        answers = [ask(fleet.by_prefix, prompt_of(chunks, random_text(rng, 6))) for _ in range(3)]
        assert len({fleet.who_answered(answer) for answer in answers}) == 1
        cached = [answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in answers[1:]]
        assert min(cached) > 128, "a block of vLLM's at least"
        assert report_of(answers[1])["num_prefix_tokens"] > 128
        shuffled = ask(fleet.by_prefix, prompt_of(chunks[::-1], "bread"))
        assert report_of(shuffled)["store_misses"] == 0


def test_one_dies_under_load_and_the_other_has_its_chunks(fleet: Fleet) -> None:
    """The last test here: what was under way there may fail, no other question does, and no answer is wrong."""
    rng = random.Random(33)
    chunks = [random_text(rng, 60) for _ in range(6)]
    prompts = [prompt_of(rng.sample(chunks, 4), random_text(rng, 6)) for _ in range(48)]
    expected = run_in_engine(plain_tokens, fleet.model, prompts, NUM_TOKENS)
    ask(fleet.by_session, prompt_of(chunks, "bread"), "0")

    def answered(number: int) -> list[int] | None:
        if number == 12:
            fleet.servers[0].kill()
        try:
            return tokens_of(ask(fleet.by_session, prompts[number], str(number)))
        except httpx.HTTPError:
            return None

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(answered, range(48)))
    assert all(tokens is None or tokens == right for tokens, right in zip(found, expected, strict=True))
    print(f"{found.count(None)} of 48 questions failed")
    assert found.count(None) <= 8, "only what was under way"
    later = [ask(fleet.by_session, prompt, f"later {number}") for number, prompt in enumerate(prompts[:8])]
    assert [tokens_of(answer) for answer in later] == expected[:8]
    assert {fleet.who_answered(answer) for answer in later} == {1}
    assert [report_of(answer)["store_misses"] for answer in later] == [0] * 8
