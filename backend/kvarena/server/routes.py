"""The paths of a server, but for an engine's own: health and metrics, models, settings, reports, tokenising, chat and
text completions. docs/http.md is their reference.
"""

from __future__ import annotations

import asyncio
import json
from html import escape
from typing import Any

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response

from kvarena.engines.base import GeneratedToken
from kvarena.server.errors import ApiError, shown
from kvarena.server.protocol import (
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    Completion,
    CompletionRequest,
    DetokenizedPrompt,
    DetokenizeRequest,
    ErrorAnswer,
    Model,
    ModelList,
    RequestReport,
    TextChoice,
    TextLogprobs,
    TokenizeRequest,
    Tokens,
    Usage,
)
from kvarena.server.requests import (
    JsonRoute,
    Prompts,
    check_token_ids,
    render_chat,
    sampling_of,
    split_prompts,
)
from kvarena.server.responses import Choice, ResponseBuilder, respond
from kvarena.server.state import ERRORS, Server, ServerDep
from kvarena.server.text import chat_logprobs, text_logprobs

open_router = APIRouter()
"""Paths that ask for no API key."""

info_router = APIRouter()

_UNKNOWN: dict[int | str, dict[str, Any]] = {404: {"model": ErrorAnswer}, "default": {"model": ErrorAnswer}}


@open_router.get("/health")
async def health() -> dict[str, str]:
    return {"status": "ok"}


@open_router.get("/metrics", response_class=PlainTextResponse)
def metrics(server: ServerDep) -> Response:
    """In a thread of its own: an engine's collectors may wait for its locks."""
    return Response(server.metrics.exposition(), media_type=CONTENT_TYPE_LATEST)


@info_router.get("/v1/models")
async def models(server: ServerDep) -> ModelList:
    return ModelList(object="list", data=[_model(server)])


@info_router.get("/v1/models/{name:path}", responses=_UNKNOWN)
async def model(name: str, server: ServerDep) -> Model:
    server.check_model(name)
    return _model(server)


@info_router.get("/docs", include_in_schema=False)
async def docs(request: Request) -> HTMLResponse:
    """The paths and schemas of `/openapi.json` for a browser; the page needs nothing from elsewhere."""
    described = request.app.openapi()
    operations = [
        (f"{method.upper()} {path}", operation)
        for path, methods in described["paths"].items()
        for method, operation in methods.items()
    ]
    listed = [*operations, *described.get("components", {}).get("schemas", {}).items()]
    parts = "".join(
        f"<details><summary><code>{escape(name)}</code> {escape(told.get('description', ''))}</summary>"
        f"<pre>{escape(json.dumps(told, indent=2))}</pre></details>"
        for name, told in listed
    )
    title = escape(described["info"]["title"])
    return HTMLResponse(f"<!doctype html><meta charset=utf-8><title>{title}</title><h1>{title}</h1>{parts}")


@info_router.get("/kvarena")
async def settings(server: ServerDep) -> dict[str, Any]:
    return {"contender": server.engine.contender, **server.engine.describe()}


@info_router.get("/kvarena/requests/{request_id:path}", response_model=RequestReport, responses=_UNKNOWN)
async def request_report(request_id: str, server: ServerDep) -> Response:
    """The report of a finished request, by the id of its answer; the last 1,024 are kept."""
    report = server.reports.get(request_id)
    if report is None:
        raise ApiError(404, f"there is no report of a request {shown(request_id)}")
    return JSONResponse(report)


def _model(server: Server) -> Model:
    engine = server.engine
    return Model(
        id=engine.model_name,
        object="model",
        created=server.created,
        owned_by="kvarena",
        root=engine.model_name,
        max_model_len=engine.max_model_len,
    )


tokenization_router = APIRouter(route_class=JsonRoute)


@tokenization_router.post("/tokenize", responses=ERRORS)
async def tokenize(body: TokenizeRequest, server: ServerDep) -> Tokens:
    server.check_model(body.model)
    return await asyncio.to_thread(_tokenize, body, server)


def _tokenize(body: TokenizeRequest, server: Server) -> Tokens:
    tokenizer = server.engine.tokenizer
    if body.prompt is not None:
        text, adds_special = body.prompt, body.add_special_tokens or "add_special_tokens" not in body.model_fields_set
    else:
        text, adds_special = str(render_chat(tokenizer, body.messages or [], body).texts[0]), body.add_special_tokens
    ids = tokenizer.encode(text, add_special_tokens=adds_special)
    names = tokenizer.convert_ids_to_tokens(ids) if body.return_token_strs else None
    return Tokens(count=len(ids), max_model_len=server.engine.max_model_len, tokens=ids, token_strs=names)


@tokenization_router.post("/detokenize", responses=ERRORS)
async def detokenize(body: DetokenizeRequest, server: ServerDep) -> DetokenizedPrompt:
    server.check_model(body.model)
    ids = check_token_ids(body.tokens, server.engine.tokenizer, "tokens")
    prompt = await asyncio.to_thread(server.engine.tokenizer.decode, ids, skip_special_tokens=False)
    return DetokenizedPrompt(prompt=prompt)


chat_router = APIRouter(route_class=JsonRoute)

_ANSWER = "The completion; with `stream` true, server-sent events with its chunks, and `[DONE]` as the last"


@chat_router.post(
    "/v1/chat/completions",
    response_model=None,
    responses={200: {"model": ChatCompletion, "description": _ANSWER, "content": {"text/event-stream": {}}}, **ERRORS},
)
async def create_chat_completion(body: ChatCompletionRequest, request: Request, server: ServerDep) -> Response:
    server.check_model(body.model)
    prompts = await asyncio.to_thread(render_chat, server.engine.tokenizer, body.messages, body)
    sampling = sampling_of(body, (body.top_logprobs or 0) if body.logprobs else None)
    form = ChatResponseBuilder(
        f"chatcmpl-{request.state.request_id}", server.engine.model_name, server.token_texts, bool(body.logprobs)
    )
    return await respond(request, server, form, body, sampling, prompts)


class ChatResponseBuilder(ResponseBuilder):
    def whole(self, choices: list[Choice], usage: Usage, report: dict[str, Any]) -> ChatCompletion:
        return ChatCompletion(
            id=self.answer_id,
            object="chat.completion",
            created=self.created,
            model=self.model,
            choices=[
                ChatChoice(
                    index=choice.index,
                    message=ChatMessage(role="assistant", content="".join(choice.texts)),
                    logprobs=self._logprobs(choice.tokens),
                    finish_reason=choice.finish_reason,
                )
                for choice in choices
            ],
            usage=usage,
            kv_transfer_params={"kvarena": report},
        )

    def opening(self, choice: Choice) -> ChatCompletionChunk:
        return self._delta(choice, ChatDelta(role="assistant", content=""))

    def piece(self, choice: Choice, text: str, token: GeneratedToken | None) -> ChatCompletionChunk:
        return self._delta(choice, ChatDelta(content=text), self._logprobs([token] if token else []))

    def closing(self, choice: Choice) -> ChatCompletionChunk:
        return self._delta(choice, ChatDelta())

    def usage(self, usage: Usage) -> ChatCompletionChunk:
        return self._chunk([], usage=usage)

    def _delta(self, choice: Choice, delta: ChatDelta, logprobs: ChatLogprobs | None = None) -> ChatCompletionChunk:
        shown = ChatChunkChoice(index=choice.index, delta=delta, logprobs=logprobs, finish_reason=choice.finish_reason)
        return self._chunk([shown], **choice.usage())

    def _chunk(self, choices: list[ChatChunkChoice], **usage: Usage) -> ChatCompletionChunk:
        return ChatCompletionChunk(
            id=self.answer_id,
            object="chat.completion.chunk",
            created=self.created,
            model=self.model,
            choices=choices,
            **usage,
        )

    def _logprobs(self, tokens: list[GeneratedToken]) -> ChatLogprobs | None:
        return chat_logprobs(self.token_texts, tokens) if self.wants_logprobs else None


completions_router = APIRouter(route_class=JsonRoute)


@completions_router.post(
    "/v1/completions",
    response_model=None,
    responses={200: {"model": Completion, "description": _ANSWER, "content": {"text/event-stream": {}}}, **ERRORS},
)
async def create_completion(body: CompletionRequest, request: Request, server: ServerDep) -> Response:
    server.check_model(body.model)
    prompts = Prompts(split_prompts(body.prompt, server.engine.tokenizer), body.add_special_tokens)
    sampling = sampling_of(body, body.logprobs)
    form = CompletionResponseBuilder(
        f"cmpl-{request.state.request_id}", server.engine.model_name, server.token_texts, body.logprobs is not None
    )
    return await respond(request, server, form, body, sampling, prompts)


class CompletionResponseBuilder(ResponseBuilder):
    """A stream's chunks are of the same kind as the whole."""

    def whole(self, choices: list[Choice], usage: Usage, report: dict[str, Any]) -> Completion:
        shown = [self._choice(choice, "".join(choice.texts), choice.tokens) for choice in choices]
        return self._completion(shown, usage=usage, kv_transfer_params={"kvarena": report})

    def piece(self, choice: Choice, text: str, token: GeneratedToken | None) -> Completion:
        return self._completion([self._choice(choice, text, [token] if token else [])], **choice.usage())

    def closing(self, choice: Choice) -> Completion:
        return self._completion([self._choice(choice, "", [])], **choice.usage())

    def usage(self, usage: Usage) -> Completion:
        return self._completion([], usage=usage)

    def _completion(self, choices: list[TextChoice], **more: Any) -> Completion:
        return Completion(
            id=self.answer_id,
            object="text_completion",
            created=self.created,
            model=self.model,
            choices=choices,
            **more,
        )

    def _choice(self, choice: Choice, text: str, tokens: list[GeneratedToken]) -> TextChoice:
        return TextChoice(
            index=choice.index,
            text=text,
            logprobs=self._logprobs(choice, tokens),
            finish_reason=choice.finish_reason,
        )

    def _logprobs(self, choice: Choice, tokens: list[GeneratedToken]) -> TextLogprobs | None:
        if not self.wants_logprobs:
            return None
        logprobs = text_logprobs(self.token_texts, tokens, choice.num_chars)
        choice.num_chars += sum(map(len, logprobs.tokens))
        return logprobs
