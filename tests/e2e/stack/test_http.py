"""The running stack over HTTP, as an OpenAI client sees it."""

from __future__ import annotations

import json
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from kvarena.documents import build_messages, load_chunks, load_system_prompt
from kvarena.policies.params import PARAMETERS, POLICIES
from kvarena.policies.registry import REQUEST_KEYS
from kvarena.synthetic_qa.facts import chunk_text
from support.running_stack import Stack
from support.salt_isolation import ask_over, assert_isolated
from support.towns import small_town
from support.verdicts import check_server

pytestmark = [pytest.mark.slow, pytest.mark.e2e, pytest.mark.timeout(600)]
DATA = Path(__file__).parents[3] / "backend" / "models" / "town" / "notes"
TEXTS = [chunk.text for chunk in load_chunks(DATA)]
SYSTEM = load_system_prompt(DATA)


def body(texts: list[str], question: str, **more: Any) -> dict[str, Any]:
    messages = build_messages(SYSTEM, texts, question, "<note>")
    return {"model": "town", "messages": messages, "temperature": 0, "max_tokens": 8, **more}


def ask(http: httpx.Client, request: dict[str, Any]) -> dict[str, Any]:
    answer = http.post("/v1/chat/completions", json=request).raise_for_status().json()
    return {
        "text": answer["choices"][0]["message"]["content"],
        "usage": answer["usage"],
        "report": (answer.get("kv_transfer_params") or {}).get("kvarena"),
        "id": answer["id"],
    }


def ours(**params: Any) -> dict[str, Any]:
    return {"kvarena": params}


def test_settings_are_told(stack: Stack) -> None:
    with stack.client("blend") as http:
        told = http.get("/kvarena").json()
    assert (told["contender"], told["separator"], told["store"]) == ("blend", "<note>", "lmcache")
    assert told["defaults"]["policy"] in told["policies"]
    assert told["parameters"]["policy"]["choices"] == told["policies"]
    assert set(told["parameters"]) == set(told["defaults"]) - {"max_ttft_ms"}
    assert told["blends"] is True
    with stack.client("plain") as http:
        assert http.get("/kvarena").status_code == 404


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"policy": "best"}, ", ".join(POLICIES)),
        ({"ratio": 1.5}, "from 0 to 1"),
        ({"ratio": "half"}, "from 0 to 1"),
        ({"check_layer": 99}, "from 0 to 5"),
        ({"run_tokens": 100_000_000}, "a number of tokens from 1 to 1024"),
        ({"store": "yes"}, 'true, false, "all", "scores" or "seams"'),
        ({"chunks": "text"}, "list of strings"),
        ({"ratio": "auto"}, "needs max_ttft_ms"),
        ({"policy": "auto"}, ", ".join(POLICIES)),
        ({"max_ttft_ms": 0}, "a number above 0"),
        ({"max_ttft_ms": 300, "ratio": 0.1}, "not both"),
        ({"max_ttft_ms": 300, "policy": "none"}, "which none doesn't go by"),
        ({"rate": 1}, ", ".join([*PARAMETERS, *REQUEST_KEYS])),
    ],
)
def test_bad_values_are_refused_with_the_choices(stack: Stack, params: dict[str, Any], said: str) -> None:
    with stack.client("blend") as http:
        reply = http.post("/v1/chat/completions", json=body(TEXTS[:2], "Who?", kv_transfer_params=ours(**params)))
    assert reply.status_code == 400
    assert said in reply.json()["error"]["message"]


@pytest.mark.parametrize("contender", ["blend", "plain"])
def test_a_strangers_chunks_are_as_cold_as_new_ones(stack: Stack, contender: str) -> None:
    """By what is called cached and the time to the first token. A false alarm comes in one of 10,000 runs at most."""

    def prompt_of(number: int) -> str:
        return "<note>".join([*(chunk_text(chunk) for chunk in small_town(10_000 + number, 6, 80)), "Who?"])

    with stack.client(contender) as http:
        assert_isolated(ask_over(http, "town"), prompt_of, num_rounds=20)


def test_odd_bodies_are_vllms_to_refuse(stack: Stack) -> None:
    with stack.client("blend") as http:
        for content in (
            b"",
            b"{",
            b"[1]",
            b'{"messages": 3}',
            json.dumps(body([], "x", kv_transfer_params=3)).encode(),
        ):
            reply = http.post("/v1/chat/completions", content=content, headers={"content-type": "application/json"})
            assert 400 <= reply.status_code < 500, reply.text
        assert http.get("/health").is_success


@pytest.mark.parametrize("contender", ["blend", "plain"])
def test_verdicts_are_those_of_the_table(stack: Stack, contender: str) -> None:
    with stack.client(contender) as http:
        check_server(http)


def test_every_token_is_counted_once_and_streams_have_their_report_too(stack: Stack) -> None:
    texts = random.Random(1).sample(TEXTS, 6)
    with stack.client("blend") as http:
        answer = ask(http, body(texts, "What does she keep?"))
        assert http.get(f"/kvarena/requests/{answer['id']}").json() == answer["report"]
        assert http.get("/kvarena/requests/chatcmpl-none").status_code == 404
        assert "kvarena_prompt_tokens_total" in http.get("/metrics").text
    report = answer["report"]
    parts = [report[f"num_{name}_tokens"] for name in ("reused", "recomputed", "computed")]
    assert sum(parts) == report["num_prompt_tokens"] == answer["usage"]["prompt_tokens"]
    assert report["approximate"]
    assert parts[0] > sum(parts) / 2

    with openai.OpenAI(base_url=stack.address("blend") + "/v1", api_key=stack.api_key or "none") as api:
        request = body(texts[::-1], "What does she keep?")
        chunks = list(api.chat.completions.create(**request, stream=True, stream_options={"include_usage": True}))
    with stack.client("blend") as http:
        streamed = http.get(f"/kvarena/requests/{chunks[0].id}").json()
    assert streamed["num_prompt_tokens"] == chunks[-1].usage.prompt_tokens
    assert streamed["store_hits"] == 6
    assert any(chunks[0].id in line for line in stack.command("logs", "blend", "-n", "400").stdout.splitlines())


def test_message_parts_are_boundaries(stack: Stack) -> None:
    rng = random.Random(2)
    parts = [{"type": "text", "text": " ".join(rng.sample(text.split(), len(text.split())))} for text in TEXTS[:3]]
    question = {"type": "text", "text": "What does she keep?"}
    messages: list[dict[str, Any]] = [{"role": "user", "content": [*parts, question]}]
    request = {"model": "town", "messages": messages, "temperature": 0, "max_tokens": 4}
    with stack.client("blend") as http:
        first = ask(http, request)["report"]
        messages[0]["content"] = [*parts[::-1], {"type": "text", "text": "Where?"}]
        second = ask(http, request)["report"]
    assert (first["store_hits"], first["store_misses"]) == (0, 3)
    assert (second["store_hits"], second["store_misses"]) == (3, 0)


def test_ratio_one_answers_as_plain_does(stack: Stack) -> None:
    rng = random.Random(3)
    with stack.client("blend") as blend, stack.client("plain") as plain:
        for _ in range(10):
            request = body(rng.sample(TEXTS, rng.randint(2, 6)), "What does the same person keep?")
            blended = ask(blend, {**request, "kv_transfer_params": ours(ratio=1.0)})
            assert blended["text"] == ask(plain, request)["text"]
            assert not blended["report"]["approximate"]


ODD_TEXTS = [
    "",
    " ",
    "a",
    "Ünïcödé 日本語 🦜 " * 20,
    "<note>",
    "<b>&amp;</b> $x$ **y**\n\n# Heading",
    "word " * 900,
    TEXTS[0],
]


def test_odd_chunks_get_an_answer(stack: Stack) -> None:
    with stack.client("blend") as http:
        for texts in ([text] for text in ODD_TEXTS):
            assert ask(http, body(texts, "Who?"))["report"]["num_prompt_tokens"] > 0
        assert ask(http, body([*ODD_TEXTS, TEXTS[0], TEXTS[0]], "Who?"))["report"]["num_prompt_tokens"] > 0


def test_a_prompt_longer_than_the_model_is_refused(stack: Stack) -> None:
    with stack.client("blend") as http:
        reply = http.post("/v1/chat/completions", json=body(["word " * 9000], "Who?"))
        assert reply.status_code == 400
        assert "context length" in reply.json()["error"]["message"]


def many(stack: Stack, count: int, seed: int) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    requests = [
        body(rng.sample(TEXTS, rng.randint(2, 8)), "What does Mara keep?", kv_transfer_params=ours(ratio=1.0))
        for _ in range(count)
    ]
    with stack.client("blend") as blend, stack.client("plain") as plain, ThreadPoolExecutor(count) as pool:
        answers = list(pool.map(lambda request: ask(blend, request), requests))
        expected = [ask(plain, {k: v for k, v in r.items() if k != "kv_transfer_params"}) for r in requests]
    assert [answer["text"] for answer in answers] == [answer["text"] for answer in expected]
    return [answer["report"] for answer in answers]


def test_thirty_two_requests_at_once(stack: Stack) -> None:
    for report in many(stack, 32, seed=4):
        assert report["store_errors"] == 0


def test_lmcache_hangs_is_killed_and_back_under_load(stack: Stack) -> None:
    """Answers stay right throughout; hits come back once it runs again and the chunks are stored anew."""
    server = psutil.Process(stack.service("lmcache-server")["pid"])
    server.suspend()  # if it were killed, another one might be back within one call's time-out
    reports = many(stack, 8, seed=5)
    assert sum(report["store_errors"] for report in reports) > 0
    server.kill()
    many(stack, 8, seed=6)

    deadline = time.monotonic() + 120
    with stack.client("blend") as http:
        while time.monotonic() < deadline:
            report = ask(http, body(TEXTS[:4], f"What does {time.monotonic()} keep?", cache_salt=str(time.time())))
            salted = report["report"]
            if salted["store_errors"] == 0:
                break
            time.sleep(1)
        assert salted["store_errors"] == 0
        ask(http, body(TEXTS[4:8], "Who?", cache_salt="afterwards"))
        again = ask(http, body(TEXTS[7:3:-1], "Who?", cache_salt="afterwards"))["report"]
    assert again["store_hits"] == 4
