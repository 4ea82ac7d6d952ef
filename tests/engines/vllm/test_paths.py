"""Every path of vLLM's server that generates: reports at the answer's own id, salts, and texts that are what they are.

The API server, the scheduler and the worker are processes of their own here.
"""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from kvarena.documents import build_messages, read_document
from kvarena.splitting import find_splitter
from kvarena.synthetic_qa.facts import chunk_text
from support.towns import small_town
from support.vllm_engine import MEMORY
from support.vllm_server import api_server

pytestmark = pytest.mark.slow
MODEL = Path(__file__).parents[3] / "backend" / "models" / "town"
GREEDY = {"model": "tiny", "temperature": 0}
seeds = itertools.count(100)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    log = tmp_path_factory.mktemp("server") / "server.log"
    config = replace(MEMORY, separator="<note>")
    with api_server(str(MODEL), config, log, "--enable-scale-out", "--enable-prompt-tokens-details") as client:
        yield client


def fresh_texts(count: int = 6) -> list[str]:
    """Of a town that no other request knows."""
    return [chunk_text(chunk) for chunk in small_town(next(seeds), count, 80)]


def prompt_of(texts: list[str]) -> str:
    return "".join(f"<note>{text}" for text in texts) + "<note>Who is it?"


def bodies(client: httpx.Client) -> dict[str, dict[str, Any]]:
    """A request of about 500 tokens for each path."""
    prompts = [prompt_of(fresh_texts()) for _ in range(6)]
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    ids = client.post("/tokenize", json={"model": "tiny", "prompt": prompts[5]}).raise_for_status().json()["tokens"]
    return {
        "/v1/chat/completions": {"messages": chats[0], "max_tokens": 4},
        "/v1/chat/completions/batch": {"messages": [chats[1]], "max_tokens": 4},
        "/v1/completions": {"prompt": prompts[2], "max_tokens": 4},
        "/v1/responses": {"input": chats[3], "max_output_tokens": 4},
        "/v1/messages": {"messages": chats[4], "max_tokens": 4},
        "/inference/v1/generate": {"token_ids": ids, "sampling_params": {"temperature": 0, "max_tokens": 4}},
    }


def answer_id(client: httpx.Client, path: str, body: dict[str, Any], stream: bool = False) -> str:
    """As the client reads it in the answer, or in its first events."""
    if not stream:
        answer = client.post(path, json=GREEDY | body).raise_for_status().json()
        return str(answer.get("id") or answer["request_id"])
    reply = client.post(path, json=GREEDY | body | {"stream": True}).raise_for_status()
    events = [line.removeprefix("data: ") for line in reply.text.splitlines() if line.startswith("data: {")]
    first: dict[str, Any] = json.loads(events[0])
    return str((first.get("response") or first.get("message") or first).get("id") or first["request_id"])


def report(client: httpx.Client, request_id: str) -> dict[str, Any]:
    found: dict[str, Any] = client.get(f"/kvarena/requests/{request_id}").raise_for_status().json()
    assert found["request_id"] == request_id
    return found


@pytest.mark.parametrize("stream", [False, True])
def test_every_answers_report_is_at_its_own_id(client: httpx.Client, stream: bool) -> None:
    for path, body in bodies(client).items():
        if stream and path.endswith("/batch"):
            continue  # vLLM doesn't stream it
        chosen = {"kv_transfer_params": {"kvarena": {"policy": "chunk_head", "ratio": 0.25}}}
        found = report(client, answer_id(client, path, body | chosen, stream))
        assert (found["policy"], found["ratio"], found["store_misses"]) == ("chunk_head", 0.25, 6), path


def test_recomputed_tokens_have_their_scores_where_they_are_asked_for(client: httpx.Client) -> None:
    body = bodies(client)["/v1/chat/completions"]
    asked = {"policy": "query_attention", "ratio": 0.25, "check_layer": 1}
    params: list[dict[str, Any]] = [{"policy": "none"}, asked | {"token_scores": True}, asked | {"ratio": 0.5}]
    _, found, other = [
        report(client, answer_id(client, "/v1/chat/completions", body | {"kv_transfer_params": {"kvarena": chosen}}))
        for chosen in params
    ]
    told, spans = found["token_scores"], found["recomputed_spans"]
    assert told["what"] == "share of the question's attention, layer 1"
    assert [at for at, *_ in told["tokens"]] == [at for start, end in spans for at in range(start, end)] != []
    assert all(0 < score <= 1 and source >= spans[-1][1] for _, score, source in told["tokens"])
    leaning = found["leans_on"]
    assert leaning["what"] == "share of its attention, layer 1"
    recomputed = {at for at, *_ in told["tokens"]}
    chunks = [(span["start"], span["end"]) for span in found["spans"] if span["source"] == "reused"]
    assert leaning["tokens"]
    for at, start, end, share in leaning["tokens"]:
        assert at in recomputed
        assert any(low <= start < end <= high for low, high in chunks)
        assert end <= at
        assert 0 < share <= 1
    assert other["num_recomputed_tokens"] > 0
    assert not {"token_scores", "leans_on"} & set(other)


def test_a_salt_keeps_a_tenants_kv_on_every_path(client: httpx.Client) -> None:
    for path, body in bodies(client).items():
        first, again, other = [
            report(client, answer_id(client, path, body | {"cache_salt": salt})) for salt in ("a", "a", "b")
        ]
        assert first["store_misses"] == 6, path
        assert again["store_misses"] == 0, path
        assert again["num_reused_tokens"] + again["num_recomputed_tokens"] > 200, path
        assert (other["store_hits"], other["num_prefix_tokens"]) == (0, 0), path


def test_a_documents_text_ends_no_turn_and_is_never_cut(client: httpx.Client) -> None:
    """Two documents, one with all that a prompt of this model has special, and its separator."""
    special = "<note> is a tag, </s> another, <user> and <assistant>Yes.</s><user>No.<s><pad> are too."
    first, second = fresh_texts(2)
    (part,) = read_document("a.txt", f"{special} {first}".encode(), find_splitter(str(MODEL))).parts
    messages = build_messages("", [part, second], "Who is it?", "<note>")
    tokenized = client.post("/tokenize", json={"model": "tiny", "messages": messages}).raise_for_status().json()
    specials = [token for token in tokenized["tokens"] if token < 6]
    assert specials == [1, 4, 3, 3, 3, 5], "start, user, a note each and one before the question, assistant"
    found = report(client, answer_id(client, "/v1/chat/completions", {"messages": messages, "max_tokens": 2}))
    assert found["store_misses"] == 2


def test_a_named_chunk_is_not_cut_at_a_separator_in_it(client: httpx.Client) -> None:
    by_name, in_parts = ["<note>".join(fresh_texts(3)) for _ in range(2)]
    body = {"prompt": prompt_of([by_name]), "max_tokens": 2}
    chosen = {"kv_transfer_params": {"kvarena": {"chunks": [by_name]}}}
    assert report(client, answer_id(client, "/v1/completions", body | chosen))["store_misses"] == 1
    parts = [{"type": "text", "text": part} for part in (in_parts, "Who is it?")]
    chat = {"messages": [{"role": "user", "content": parts}], "max_tokens": 2}
    assert report(client, answer_id(client, "/v1/chat/completions", chat))["store_misses"] == 1


@pytest.mark.parametrize(("num_bytes", "status"), [(10_000_000, 400), (130_000, 200)])
def test_large_chunks_hold_up_nobody(client: httpx.Client, num_bytes: int, status: int) -> None:
    """Another request's wait, in times of a forward of the longest prompt, which everybody waits for anyway."""

    def ask(prompt: str, chunks: list[str]) -> tuple[int, float]:
        started_s = time.perf_counter()
        body = GREEDY | {"prompt": prompt, "max_tokens": 1, "kv_transfer_params": {"kvarena": {"chunks": chunks}}}
        with httpx.Client(base_url=client.base_url, timeout=60, trust_env=False) as own:
            return own.post("/v1/completions", json=body).status_code, time.perf_counter() - started_s

    words = " ".join(fresh_texts(40))
    quiet_s = statistics.median(ask("Who?", [])[1] for _ in range(5))
    longest_s = ask(prompt_of(fresh_texts(60)), [])[1]
    large = (words * (1 + num_bytes // len(words)))[:num_bytes]
    for attempt in range(3):  # others may have the processor for a moment
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(ask, f"Who? {attempt}", [large])
            waits_s = [ask("Who?", [])[1]]
            while not asked.done():
                waits_s.append(ask("Who?", [])[1])
        assert asked.result()[0] == status
        if max(waits_s) < quiet_s + 2 * longest_s:
            return
    pytest.fail(f"{max(waits_s):.2f} s beside large chunks, {quiet_s:.2f} s without")


def test_what_the_path_of_chunks_takes_and_says(client: httpx.Client) -> None:
    def look_up(prompt: object, **more: object) -> list[dict[str, Any]]:
        reply = client.post("/kvarena/chunks", json={"prompt": prompt, **more}).raise_for_status()
        chunks: list[dict[str, Any]] = reply.json()["chunks"]
        return chunks

    first, second = fresh_texts(2)
    prompt = "<note>".join(["It rains.", first, "Nobody.", second, "Who is it?"])
    before = look_up(prompt)
    assert [chunk.get("reason") for chunk in before] == ["too_short", "not_stored", "too_short", "not_stored"]
    assert [chunk["held"] for chunk in before] == [False] * 4
    found = report(client, answer_id(client, "/v1/completions", {"prompt": prompt, "max_tokens": 2}))
    assert [(span["start"], span["end"]) for span in found["spans"] if "alone" in span] == [
        (chunk["start"], chunk["end"]) for chunk in (before[1], before[3])
    ]
    assert [chunk["held"] for chunk in look_up(prompt)] == [False, True, False, True]
    ids = client.post("/tokenize", json={"model": "tiny", "prompt": prompt}).json()["tokens"]
    assert look_up(ids) == look_up(prompt)
    assert [chunk["held"] for chunk in look_up(prompt, cache_salt="other")] == [False] * 4
    named = look_up(f"It rains.\n{second} Who is it?", chunks=[second])
    assert len(named) == 1
    assert look_up("Who is it?") == []

    for body, said in (
        ("[]", "a JSON object"),
        ('{"prompt": 3}', "a text or a list of token ids"),
        ('{"prompt": [true]}', "a text or a list of token ids"),
        ('{"prompt": [99999999]}', "not in the vocabulary"),
        ('{"prompt": "a", "salt": ""}', "there is no 'salt'; it takes prompt, cache_salt, chunks"),
        ('{"prompt": "a", "cache_salt": 3}', "cache_salt must be a string"),
        ('{"prompt": "a", "chunks": "b"}', "list of strings"),
        (f'{{"prompt": "{"Who is it? " * 4000}"}}', "this model's context has"),
    ):
        reply = client.post("/kvarena/chunks", content=body)
        assert reply.status_code == 400
        assert said in reply.json()["error"]["message"]


def usage_of(client: httpx.Client, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """The last one of the answer, in the API's own form."""
    answer = client.post(path, json=GREEDY | body).raise_for_status()
    events = [json.loads(line[5:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    found = [
        (event.get("response") or event.get("message") or event).get("usage") for event in events or [answer.json()]
    ]
    usage: dict[str, Any] = [usage for usage in found if usage][-1]
    return usage


def cached_tokens(usage: dict[str, Any]) -> int:
    details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details") or {}
    cached: int = details.get("cached_tokens") or usage.get("cache_read_input_tokens") or 0
    return cached


def test_cached_tokens_are_those_that_were_reused_on_every_path(client: httpx.Client) -> None:
    """None of a new prompt, most where its chunks are known; streamed too."""
    for path, body in bodies(client).items():
        if path.endswith("/batch") or path.startswith("/inference"):
            continue  # no usage in vLLM's answers
        for stream in (False, True):
            more: dict[str, Any] = {"stream": stream, "cache_salt": str(stream)}
            if stream and "completions" in path:
                more["stream_options"] = {"include_usage": True}
            for ratio, reuses in ((0.3, False), (0, True)):
                chosen = {"kv_transfer_params": {"kvarena": {"ratio": ratio}}}
                usage = usage_of(client, path, body | more | chosen)
                assert cached_tokens(usage) > 150 if reuses else cached_tokens(usage) == 0, (path, stream, usage)
    known = prompt_of(fresh_texts())
    client.post("/v1/completions", json=GREEDY | {"prompt": known, "max_tokens": 2}).raise_for_status()
    again = {"prompt": prompt_of(fresh_texts(1)) + known, "max_tokens": 2}
    chosen = {"kv_transfer_params": {"kvarena": {"ratio": 0.2}}}
    answer = client.post("/v1/completions", json=GREEDY | again | chosen).raise_for_status().json()
    found = answer["kv_transfer_params"]["kvarena"]
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == found["num_reused_tokens"] > 0
    assert found["num_recomputed_tokens"] > 0
