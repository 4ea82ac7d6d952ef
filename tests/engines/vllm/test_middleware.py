"""What stands around vLLM's server, around a small application that answers in vLLM's form, or fails to."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Route

from kvarena.engines.vllm.config import CONNECTOR
from kvarena.engines.vllm.messages import report_log
from kvarena.server import log as request_log
from support.request_lines import request_lines

pytest.importorskip("vllm")
from vllm.entrypoints.anthropic.protocol import (
    AnthropicContentBlock,
    AnthropicDelta,
    AnthropicMessagesResponse,
    AnthropicStreamEvent,
    AnthropicUsage,
)
from vllm.entrypoints.openai.responses.protocol import ResponseCompletedEvent, ResponseCreatedEvent, ResponsesResponse

from kvarena.server.vllm_middleware import AccessMiddleware

COMPLETIONS = "/v1/completions"
USAGE = {"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11, "prompt_tokens_details": {"cached_tokens": 4}}
REPORT = {
    "contender": "blend",
    "approximate": True,
    "num_prompt_tokens": 9,
    "num_reused_tokens": 5,
    "num_recomputed_tokens": 3,
    "num_computed_tokens": 1,
    "store_hits": 2,
    "blend_ms": 1.23456,
    "misses_by_reason": {"never_seen": 2},
    "misses": [{"start": 0, "end": 4, "reason": "never_seen"}, {"start": 4, "end": 9, "reason": "never_seen"}],
    "spans": [{"start": 0, "end": 9, "source": "reused"}],
}


async def complete(request: Request) -> Response:
    """As the request's `prompt` says. The answer's id is vLLM's: made of the header as it arrives there."""
    body = await request.json()
    answer_id = f"cmpl-{request.headers['x-request-id']}"
    choice = {"index": 0, "text": 'say "usage":{"', "finish_reason": "length"}
    if body["prompt"] == "fail":
        raise RuntimeError("the engine is dead")
    if body["prompt"] == "refuse":
        return JSONResponse({"error": {"message": "no"}}, 400)
    if body["prompt"] == "long":
        message = "This model's maximum context length is 2048 tokens. However, your prompt contains 2049."
        return JSONResponse({"error": {"message": message, "type": "BadRequestError", "param": None, "code": 400}}, 400)
    if body["prompt"] == "unparsed":
        return JSONResponse({"detail": "There was an error parsing the body"}, 400)
    if body["prompt"] == "gone":
        return JSONResponse(None)  # vLLM's answer to a client that has gone
    if "report" in body:
        report_log.add({**body["report"], "request_id": f"{answer_id}-0"})
    if not body.get("stream"):
        return JSONResponse({"id": answer_id, "choices": [choice], "usage": USAGE})

    async def events() -> Any:
        yield f"data: {json.dumps({'id': answer_id, 'choices': []}, separators=(',', ':'))}\n\n"
        await asyncio.sleep(0.01)
        if body["prompt"] == "break":
            yield 'data: {"error": {"message": "lost"}}\n\n'
        else:
            yield f"data: {json.dumps({'choices': [choice]}, separators=(',', ':'))}\n\n"
        yield f"data: {json.dumps({'choices': [], 'usage': USAGE}, separators=(',', ':'))}\n\ndata: [DONE]\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")


def response(status: str, **fields: Any) -> ResponsesResponse:
    """As vLLM makes it for `/v1/responses`, with a tool whose schema has the names that are looked for."""
    tool = {"type": "function", "name": "f", "strict": False, "parameters": {"properties": {"usage": {"type": "x"}}}}
    chosen = {"parallel_tool_calls": True, "tool_choice": "auto", "tools": [tool], "background": False}
    sampling = {"temperature": 0.0, "top_p": 1.0, "max_output_tokens": 2}
    said = {"id": "msg_1", "type": "message", "role": "assistant", "status": "completed", "content": []}
    rest = {"model": "tiny", "output": [said], "service_tier": "auto", "truncation": "disabled", "status": status}
    return ResponsesResponse(**chosen, **sampling, **rest, **fields)


async def respond(request: Request) -> Response:
    body = await request.json()
    usage: dict[str, Any] = {"input_tokens": 9, "output_tokens": 2, "total_tokens": 11, "output_tokens_details": {}}
    usage |= {"input_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 0}}
    whole = response("queued" if body.get("background") else "incomplete", id="resp_1", usage=usage)
    if "report" in body:
        report_log.add({**body["report"], "request_id": "resp_1"})
    if not body.get("stream"):
        return JSONResponse(whole.model_dump(mode="json", by_alias=True))
    started = response("in_progress", id="resp_1")

    async def events() -> Any:
        yield event(ResponseCreatedEvent(type="response.created", sequence_number=0, response=started))
        await asyncio.sleep(0.01)
        yield 'event: response.output_text.delta\ndata: {"delta":"a"}\n\n'
        if body["input"] != "break":
            yield event(ResponseCompletedEvent(type="response.completed", sequence_number=2, response=whole))

    def event(of: Any) -> str:
        return f"event: {of.type}\ndata: {of.model_dump_json(indent=None, by_alias=True)}\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")


async def message(request: Request) -> Response:
    usage = AnthropicUsage(input_tokens=5, output_tokens=2, cache_read_input_tokens=4)
    whole = AnthropicMessagesResponse(
        id=f"chatcmpl-{request.headers['x-request-id']}",
        content=[AnthropicContentBlock(type="tool_use", id="t", name="f", input={"stop_reason": "end_turn"})],
        model="tiny",
        stop_reason="max_tokens",
        usage=usage,
    )
    if not (await request.json()).get("stream"):
        return JSONResponse(whole.model_dump(exclude_none=True))

    async def events() -> Any:
        await asyncio.sleep(0.01)
        started = AnthropicStreamEvent(type="message_start", message=whole.model_copy(update={"stop_reason": None}))
        yield event("message_start", started)
        end = AnthropicDelta(stop_reason="max_tokens", stop_sequence=None)
        yield event("message_delta", AnthropicStreamEvent(type="message_delta", delta=end, usage=usage))
        yield event("message_stop", AnthropicStreamEvent(type="message_stop"))

    def event(name: str, of: AnthropicStreamEvent) -> str:
        return f"event: {name}\ndata: {of.model_dump_json(exclude_unset=True)}\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")


async def fine(_request: Request) -> Response:
    return JSONResponse({})


def make_app(*, api_key: list[str] | None = None, connector: str = "", root_path: str = "") -> FastAPI:
    routes: list[BaseRoute] = [
        Route(COMPLETIONS, complete, methods=["POST"]),
        Route("/v1/responses", respond, methods=["POST"]),
        Route("/v1/messages", message, methods=["POST"]),
        Route("/invocations", fine, methods=["POST"]),
        *(Route(path, fine) for path in ("/health", "/metrics", "/kvarena", "/version")),
    ]
    app = FastAPI(routes=routes, middleware=[Middleware(AccessMiddleware)], root_path=root_path)
    app.state.args = SimpleNamespace(api_key=api_key)
    transfer = SimpleNamespace(kv_connector=connector) if connector else None
    model = SimpleNamespace(max_model_len=2048)
    app.state.vllm_config = SimpleNamespace(kv_transfer_config=transfer, model_config=model)
    return app


def send(app: FastAPI, method: str, path: str, **request: Any) -> httpx.Response:
    async def sent() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://vllm") as http:
            return await http.request(method, path, **request)

    return asyncio.run(sent())


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """The request lines, which otherwise go to standard output alone."""
    monkeypatch.setattr(request_log.logger, "handlers", [logging.NullHandler()])
    caplog.set_level(logging.INFO)
    return caplog


@pytest.mark.parametrize("from_environment", [False, True])
def test_a_key_is_asked_for_everywhere_but_at_health_and_metrics(
    logged: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, from_environment: bool
) -> None:
    if from_environment:
        monkeypatch.setenv("VLLM_API_KEY", "sesame")
    app = make_app(api_key=None if from_environment else ["other", "sesame"])
    good = {"authorization": "Bearer sesame"}
    for method, path in (("POST", COMPLETIONS), ("POST", "/invocations"), ("GET", "/kvarena"), ("GET", "/version")):
        for headers in ({}, {"authorization": "Bearer sesam"}, {"authorization": "Basic sesame"}):
            reply = send(app, method, path, headers=headers, json={"prompt": "a"})
            assert reply.status_code == 401
            assert reply.json()["error"]["type"] == "AuthenticationError"
        assert send(app, method, path, headers=good, json={"prompt": "a"}).status_code == 200
    for path in ("/health", "/metrics"):
        assert send(app, "GET", path).status_code == 200
    assert [line["status"] for line in request_lines(logged)].count(401) == 12
    assert "sesam" not in logged.text


def test_the_id_goes_in_to_vllm_and_out_to_the_client(logged: pytest.LogCaptureFixture) -> None:
    app = make_app()
    reply = send(app, "POST", COMPLETIONS, json={"prompt": "a"}, headers={"x-request-id": "question-1"})
    assert (reply.headers["x-request-id"], reply.json()["id"]) == ("question-1", "cmpl-question-1")
    reply = send(app, "POST", COMPLETIONS, json={"prompt": "a"}, headers={"x-request-id": "x" * 999})
    assert len(reply.headers["x-request-id"]) == 32
    assert reply.json()["id"] == f"cmpl-{reply.headers['x-request-id']}"
    assert [line["request_id"] for line in request_lines(logged)] == ["question-1", reply.headers["x-request-id"]]
    assert "xxx" not in logged.text


@pytest.mark.parametrize("stream", [False, True])
def test_the_line_of_stock_vllm_counts_by_the_answers_usage(logged: pytest.LogCaptureFixture, stream: bool) -> None:
    body = {"prompt": "private words", "stream": stream}
    send(make_app(), "POST", COMPLETIONS, json=body, headers={"x-request-id": "q"})
    (line,) = request_lines(logged)
    assert line.pop("time")
    assert line.pop("total_ms") >= (line.pop("ttft_ms") + 10 if stream else 0)
    assert line == {
        "contender": "vllm",
        "request_id": "q",
        "status": 200,
        "id": "cmpl-q",
        "finish": "length",
        "approximate": False,
        "num_prompt_tokens": 9,
        "num_reused_tokens": 4,
        "num_recomputed_tokens": 0,
        "num_computed_tokens": 5,
        "num_generated_tokens": 2,
    }
    assert "private" not in logged.text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "answer_id"), [("/v1/responses", "resp_1"), ("/v1/messages", "chatcmpl-q")])
def test_responses_and_messages_have_their_line_too(
    logged: pytest.LogCaptureFixture, path: str, answer_id: str, stream: bool
) -> None:
    body = {"input": "a", "stream": stream}
    send(make_app(), "POST", path, json=body, headers={"x-request-id": "q"})
    (line,) = request_lines(logged)
    assert (line["request_id"], line["status"], line["id"], line["finish"]) == ("q", 200, answer_id, "length")
    names = ("prompt", "reused", "recomputed", "computed", "generated")
    assert [line[f"num_{name}_tokens"] for name in names] == [9, 4, 0, 5, 2]
    assert line["approximate"] is False
    assert line.get("ttft_ms", 10) >= 10, "the first event of a response comes before its first token"
    assert ("ttft_ms" in line) == stream


def test_how_a_response_ends(logged: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    app = make_app(connector=CONNECTOR)
    for body in ({"input": "a", "report": REPORT}, {"input": "break", "stream": True}, {"input": "a", "background": 1}):
        send(app, "POST", "/v1/responses", json=body)
        report_log.forget("resp_1")
    reported, broken, queued = request_lines(logged)
    assert (reported["approximate"], reported["num_reused_tokens"], reported["num_generated_tokens"]) == (True, 5, 2)
    assert (broken["status"], broken["finish"]) == (499, "abort")
    assert "num_prompt_tokens" not in broken
    assert (queued["status"], queued["finish"]) == (200, "queued")


def test_the_line_of_a_blend_is_its_report(logged: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVARENA_CONTENDER", "blend")
    app = make_app(connector=CONNECTOR)
    for report in ({**REPORT, "store_hits": 7}, REPORT):  # two requests of one id: each line has its own report
        send(app, "POST", COMPLETIONS, json={"prompt": "a", "report": report}, headers={"x-request-id": "same"})
    first, line = request_lines(logged)
    assert first["details"]["store_hits"] == 7
    assert line["details"] == {"store_hits": 2, "blend_ms": 1.2}
    assert line["misses"] == {"never_seen": 2}
    assert (line["contender"], line["approximate"], line["num_generated_tokens"]) == ("blend", True, 2)
    assert [line[f"num_{name}_tokens"] for name in ("reused", "recomputed", "computed")] == [5, 3, 1]


def test_what_goes_wrong_has_its_line_too(logged: pytest.LogCaptureFixture) -> None:
    app = make_app()
    for prompt in ("refuse", "fail", "gone"):
        send(app, "POST", COMPLETIONS, json={"prompt": prompt})
    send(app, "POST", COMPLETIONS, json={"prompt": "break", "stream": True})
    send(app, "GET", "/nothing")  # clients look what there is
    send(app, "POST", "/nothing")
    outcomes = [(line["status"], line["finish"]) for line in request_lines(logged)]
    assert outcomes == [(400, "refused"), (500, "error"), (499, "abort"), (200, "error"), (404, "refused")]


def test_the_lines_of_a_request_are_told_to_whoever_has_a_key(logged: pytest.LogCaptureFixture) -> None:
    app, key = make_app(api_key=["sesame"]), {"authorization": "Bearer sesame"}
    send(app, "POST", COMPLETIONS, json={"prompt": "a"}, headers={**key, "x-request-id": "told"})
    (line,) = send(app, "GET", "/kvarena/log/told", headers=key).json()["lines"]
    assert json.loads(line)["id"] == "cmpl-told"
    assert send(app, "GET", "/kvarena/log/other", headers=key).json() == {"lines": []}
    assert send(app, "GET", "/kvarena/log/told").status_code == 401


@pytest.mark.parametrize("prefix", ["", "/llm"])
def test_a_proxys_prefix_is_no_part_of_a_path(logged: pytest.LogCaptureFixture, prefix: str) -> None:
    """Whether the proxy strips it or not: completions had no line, health asked for a key, and no line was found."""
    app, key = make_app(api_key=["sesame"], root_path="/llm"), {"authorization": "Bearer sesame"}
    assert send(app, "GET", f"{prefix}/health").status_code == 200
    assert send(app, "GET", f"{prefix}/version").status_code == 401
    send(app, "POST", prefix + COMPLETIONS, json={"prompt": "a"}, headers={**key, "x-request-id": f"at{prefix[1:]}"})
    assert request_lines(logged)[-1]["finish"] == "length"
    lines = send(app, "GET", f"{prefix}/kvarena/log/at{prefix[1:]}", headers=key).json()["lines"]
    assert [json.loads(line)["id"] for line in lines] == [f"cmpl-at{prefix[1:]}"]


def test_every_refusal_is_an_error_object(logged: pytest.LogCaptureFixture) -> None:
    """Also FastAPI's own; and a prompt that is too long has OpenAI's code."""
    app = make_app()
    codes = {"unparsed": 400, "long": "context_length_exceeded"}
    for prompt, code in codes.items():
        reply = send(app, "POST", COMPLETIONS, json={"prompt": prompt})
        assert (reply.status_code, int(reply.headers["content-length"])) == (400, len(reply.content))
        assert reply.json()["error"]["code"] == code
    assert send(app, "POST", COMPLETIONS, json={"prompt": "refuse"}).json() == {"error": {"message": "no"}}
    assert [line["status"] for line in request_lines(logged)] == [400] * 3


def test_a_body_that_is_too_large_never_reaches_vllm(logged: pytest.LogCaptureFixture) -> None:
    """With its length said beforehand, and without."""
    app, body = make_app(), json.dumps({"prompt": "a" * (4 << 20)}).encode()

    async def parts() -> AsyncIterator[bytes]:
        for at in range(0, len(body), 1 << 16):
            yield body[at : at + (1 << 16)]

    for content in (body, parts()):
        reply = send(app, "POST", COMPLETIONS, content=content)
        assert (reply.status_code, reply.json()["error"]["code"]) == (413, 413)
    assert [line["status"] for line in request_lines(logged)] == [413, 413]
    assert send(app, "POST", COMPLETIONS, content=body[: 3 << 20] + b'"}').status_code == 200
