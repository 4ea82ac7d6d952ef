"""Every bad request gets an OpenAI error object with the status that fits, and never reaches the engine."""

from __future__ import annotations

import json
import logging
import socket
from typing import Any

import httpx
import pytest

from kvarena.server import middleware
from support.real_server import RealServer
from support.request_lines import request_lines
from support.scripted_engine import ScriptedEngine

JSON = {"content-type": "application/json"}
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
USER = [{"role": "user", "content": "say tea"}]


def refusal(reply: httpx.Response, status: int) -> dict[str, Any]:
    assert reply.status_code == status, reply.text
    error: dict[str, Any] = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == status
    assert error["message"]
    return error


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"prompt": None}, "prompt: "),
        ({"prompt": 3}, "given: 3"),
        ({"prompt": []}, "at least 1 item"),
        ({"prompt": [[]]}, "at least 1 item"),
        ({"prompt": ["a", 1]}, "prompt: "),
        ({"prompt": [1.5]}, "prompt: "),
        ({"prompt": [-1]}, "greater than or equal to 0"),
        ({"prompt": [10**30]}, "from 0 to 3"),
        ({"prompt": [99999]}, "from 0 to 3"),
        ({"prompt": ""}, "at least 1 character"),
        ({"prompt": [""], "add_special_tokens": False}, "at least one token"),
        ({"prompt": ["a"] * 1024, "n": 17}, "more than 16384 choices"),
        ({"max_tokens": 0}, "greater than or equal to 1"),
        ({"max_tokens": -5}, "greater than or equal to 1"),
        ({"max_tokens": "five"}, "unable to parse string as an integer (given: 'five')"),
        ({"max_tokens": 10**400}, "maximum context length is 4096"),
        ({"temperature": -1}, "greater than or equal to 0"),
        ({"temperature": 10**400}, "temperature: "),
        ({"top_p": 0}, "greater than 0"),
        ({"top_p": 1.1}, "less than or equal to 1"),
        ({"seed": 2**63}, "seed: "),
        ({"n": 0}, "n: "),
        ({"n": 16385}, "n: "),
        ({"n": 2, "temperature": 0}, "n: with temperature 0"),
        ({"stop": ""}, "stop: "),
        ({"stop": ["a", ""]}, "stop: "),
        ({"stop": ["a"] * 5}, "at most 4 items"),
        ({"stream": "perhaps"}, "valid boolean"),
        ({"stream_options": {"include_usage": True}}, "only allowed with stream true"),
        ({"logprobs": 21}, "less than or equal to 20"),
        ({"logprobs": "3"}, "valid integer"),
        ({"cache_salt": ""}, "cache_salt: "),
        ({"cache_salt": "a/b"}, "cache_salt: must not contain '@', '/'"),
        ({"kv_transfer_params": 3}, "kv_transfer_params: "),
        ({"kv_transfer_params": {"kvarena": 3}}, "must be an object, not 3"),
        ({"kv_transfer_params": {"kvarena": {"rate": 1}}}, "has no 'rate'; it takes mode, depth"),
        ({"kv_transfer_params": {"kvarena": {"mode": "best"}}}, "mode: Input should be 'fast' or 'slow'"),
        ({"kv_transfer_params": {"kvarena": {"depth": "deep"}}}, "depth: "),
        ({"echo": True}, "echo is not supported"),
        ({"suffix": "end"}, "suffix is not supported"),
        ({"logit_bias": {"3": 1}}, "logit_bias is not supported"),
        ({"presence_penalty": 0.5}, "presence_penalty is not supported"),
        ({"frequency_penalty": -1}, "frequency_penalty is not supported"),
        ({"response_format": {"type": "json_object"}}, "accepted is {'type': 'text'}"),
        ({"top_k": 5}, "top_k is not supported"),
    ],
)
def test_bad_fields(http: httpx.Client, real: RealServer[ScriptedEngine], fields: dict[str, Any], said: str) -> None:
    reply = http.post(TEXT, json={"prompt": "say tea", **fields})
    assert said in refusal(reply, 400)["message"]
    if "stream_options" not in fields:
        refusal(http.post(TEXT, json={"prompt": "say tea", "stream": True, **fields}), 400)
    assert not real.engine.open


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"messages": []}, "messages: "),
        ({"messages": "hi"}, "messages: "),
        ({"messages": [{"content": "hi"}]}, "0.role: Field required"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "messages: "),
        ({"messages": [{"role": "user", "content": 3}]}, "messages: "),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "0.id"),
        ({"messages": [{"role": "user", "content": ""}], "add_special_tokens": False, "n": 2, "x": 1}, ""),
        ({"top_logprobs": 3}, "only allowed with logprobs true"),
        ({"logprobs": True, "top_logprobs": 21}, "less than or equal to 20"),
        ({"tools": [{"type": "function"}]}, "tools is not supported"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "add_generation_prompt false"),
        ({"continue_final_message": True}, "add_generation_prompt false"),
        ({"chat_template_kwargs": {"conversation": []}}, "can't set conversation"),
        ({"max_completion_tokens": 0, "max_tokens": 4}, "max_tokens: must be greater than or equal to 1"),
        ({"messages": [{"role": "user", "content": None}]}, "null is for the assistant's messages only"),
    ],
)
def test_bad_chats(http: httpx.Client, fields: dict[str, Any], said: str) -> None:
    if said:
        assert said in refusal(http.post(CHAT, json={"messages": USER, **fields}), 400)["message"]
    else:
        assert http.post(CHAT, json={"messages": USER, **fields}).is_success


@pytest.mark.parametrize("path", [CHAT, TEXT, "/tokenize", "/detokenize"])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[1]",
        b"3",
        b"null",
        b'{"prompt": NaN}',
        b'{"seed": -Infinity, "tokens": NaN, "prompt": NaN}',
        b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800"}',
        b"[" * 100_000,
        b'{"seed": ' + b"9" * 5000 + b"}",
        b"\x00",
        b"{}",
    ],
    ids=lambda content: repr(content[:16]),
)
def test_bodies_that_are_no_request(http: httpx.Client, path: str, content: bytes) -> None:
    refusal(http.post(path, content=content, headers=JSON), 400)


def test_numbers_out_of_range(http: httpx.Client) -> None:
    refusal(http.post(TEXT, content=b'{"prompt": "x", "temperature": 1e999}', headers=JSON), 400)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_other_content_types(http: httpx.Client, kind: str) -> None:
    refusal(http.post(TEXT, content=json.dumps({"prompt": "x"}), headers={"content-type": kind}), 400)
    good = {"content-type": "application/json; charset=utf-8"}
    assert http.post(TEXT, content=json.dumps({"prompt": "say x"}), headers=good).is_success


def test_a_large_body(http: httpx.Client) -> None:
    """With its length said beforehand, and without."""
    body = json.dumps({"prompt": "a" * 10_000_000}).encode()
    assert "4194304 bytes" in refusal(http.post(TEXT, content=body, headers=JSON), 413)["message"]
    parts = (body[at : at + 65536] for at in range(0, len(body), 65536))
    refusal(http.post(TEXT, content=parts, headers=JSON), 413)
    assert http.post(TEXT, json={"prompt": "say " + "a" * 3000}).is_success


def test_a_body_that_stops_halfway_is_given_up(
    real: RealServer[ScriptedEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would hold its connection for ever."""
    monkeypatch.setattr(middleware, "BODY_TIMEOUT_S", 0.2)
    head = f"POST {TEXT} HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"
    address = httpx.URL(real.url)
    with socket.create_connection((address.host, address.port), timeout=30) as connection:
        connection.sendall(head.encode() + b'{"prompt": "say')
        answer = b"".join(iter(lambda: connection.recv(4096), b""))
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"nothing of the body came for 0.2 s" in answer


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (TEXT, {"prompt": [-1] * 900_000}),
        (TEXT, {"prompt": [[True]] * 500_000}),
        (CHAT, {"messages": [{}] * 900_000}),
        ("/detokenize", {"tokens": ["a"] * 700_000}),
        (TEXT, {"prompt": "x", **{f"unknown_{index}": None for index in range(150_000)}}),
    ],
)
@pytest.mark.timeout(60)  # quadratic work on such a body would take many minutes
def test_large_bad_bodies_cost_little(http: httpx.Client, path: str, body: dict[str, Any]) -> None:
    reply = http.post(path, content=json.dumps(body), headers=JSON)
    if "unknown_0" not in body:
        assert len(refusal(reply, 400)["message"]) < 1000


def test_a_prompt_that_is_too_long_has_openais_code(http: httpx.Client) -> None:
    for body in ({"prompt": "tea " * 5000}, {"prompt": ["say tea", "tea " * 5000], "stream": True}):
        reply = http.post(TEXT, json=body)
        assert (reply.status_code, reply.json()["error"]["code"]) == (400, "context_length_exceeded")
        assert "maximum context length is 4096 tokens" in reply.json()["error"]["message"]
    answer = http.post(TEXT, json={"prompt": [5] * 4094, "max_tokens": 99}).json()
    assert (answer["choices"][0]["finish_reason"], answer["usage"]["total_tokens"]) == ("stop", 4096)


def test_unknown_paths_methods_and_models(http: httpx.Client) -> None:
    refusal(http.get("/v1/nothing"), 404)
    refusal(http.post("/v1/completions/", json={}), 404)
    reply = http.get(TEXT)
    refusal(reply, 405)
    assert reply.headers["allow"] == "POST"
    assert refusal(http.post(TEXT, json={"prompt": "x", "model": "other"}), 404)["param"] == "model"
    refusal(http.get("/v1/models/other"), 404)
    refusal(http.get("/kvarena/requests/chatcmpl-none"), 404)


def test_refused_and_failed_by_the_engine(http: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for stream in (False, True):
        assert (
            "nothing is accepted"
            in refusal(http.post(TEXT, json={"prompt": "refuse", "stream": stream}), 400)["message"]
        )
        reply = http.post(TEXT, json={"prompt": "fail", "stream": stream}, headers={"x-request-id": "r-1"})
        assert "cmpl-r-1" in refusal(reply, 500)["message"]
        gone = http.post(TEXT, json={"prompt": "gone", "stream": stream})
        assert "try again" in refusal(gone, 503)["message"]
    assert "out of memory" in caplog.text
    outcomes = [(line["status"], line["finish"]) for line in request_lines(caplog)]
    assert outcomes == [(400, "refused"), (500, "error"), (503, "error")] * 2


def test_no_refusal_puts_a_prompt_into_the_log(http: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for body in (
        {"prompt": {"private": "words"}},
        {"prompt": "private words", "max_tokens": 0},
        {"prompt": "private words", "model": "other"},
    ):
        assert http.post(TEXT, json=body).is_client_error
    http.post(CHAT, json={"messages": [{"role": "user", "content": {"private": "words"}}]})
    http.post(CHAT, content=b'{"messages": "private words', headers=JSON)
    assert [line["finish"] for line in request_lines(caplog)] == ["refused"] * 5
    assert "bad prompt" in caplog.text
    assert "private" not in caplog.text


def test_failing_in_the_middle_of_a_stream(http: httpx.Client) -> None:
    request = {"prompt": "break tea rain old paper", "stream": True, "stream_options": {"include_usage": True}}
    reply = http.post(TEXT, json=request)
    lines = [line.removeprefix("data: ") for line in reply.text.split("\n\n") if line]
    assert json.loads(lines[-2])["error"]["code"] == 500
    assert lines[-1] == "[DONE]"
    assert "".join(json.loads(line)["choices"][0]["text"] for line in lines[:-2]) == "tea rain old"


def test_fields_that_ask_for_nothing_and_unknown_ones_are_fine(http: httpx.Client) -> None:
    neutral = {
        "tools": None,
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "logit_bias": {},
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "top_k": -1,
        "temperature": None,
        "stop": None,
        "metadata": {"a": "b"},
        "not_known": [1, 2],
        "best_of": 3,  # once OpenAI's; vLLM doesn't know it
    }
    assert http.post(CHAT, json={"messages": USER, **neutral}).is_success


def test_a_broken_chat_template(real: RealServer[ScriptedEngine], monkeypatch: pytest.MonkeyPatch) -> None:
    with real.client() as http:
        monkeypatch.setattr(real.engine.tokenizer, "chat_template", "{{ raise_exception('roles must alternate') }}")
        assert "roles must alternate" in refusal(http.post(CHAT, json={"messages": USER}), 400)["message"]
        monkeypatch.setattr(real.engine.tokenizer, "chat_template", None)
        assert "no chat template" in refusal(http.post(CHAT, json={"messages": USER}), 400)["message"]
