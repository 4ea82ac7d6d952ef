"""`POST /v1/chat/completions`."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from kvarena.api.answer import Answer
from kvarena.api.engine import GeneratedToken
from kvarena.api.generation_requests import Prompts, generation_requests, sampling_of
from kvarena.api.json_body import JsonRoute
from kvarena.api.logprobs import chat_logprobs
from kvarena.api.prompts import render_chat
from kvarena.api.request_models import ChatCompletionRequest
from kvarena.api.responding import Choice, respond
from kvarena.api.response_models import (
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    Usage,
)
from kvarena.api.server import ERRORS, TheServer
from kvarena.api.text_stream import StopRule
from kvarena.api.token_texts import TokenTexts

router = APIRouter(route_class=JsonRoute)

_ANSWER = "The completion; with `stream` true, server-sent events with its chunks, and `[DONE]` as the last"


@router.post(
    "/v1/chat/completions",
    response_model=None,
    responses={200: {"model": ChatCompletion, "description": _ANSWER, "content": {"text/event-stream": {}}}, **ERRORS},
)
async def create_chat_completion(body: ChatCompletionRequest, request: Request, server: TheServer) -> Response:
    server.check_model(body.model)
    chat = await asyncio.to_thread(render_chat, server.engine.tokenizer, body.messages, body)
    sampling = sampling_of(
        body,
        max_tokens=body.max_completion_tokens or body.max_tokens,
        num_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )
    form = ChatForm(
        f"chatcmpl-{request.state.request_id}", server.engine.model_name, server.token_texts, bool(body.logprobs)
    )
    prompts = Prompts([chat.text], bool(body.add_special_tokens), chat.messages, chat.template_arguments)
    requests = generation_requests(server, request, form.answer_id, body, sampling, prompts)
    stop = StopRule(body.stop_strings, bool(body.include_stop_str_in_output))
    return await respond(request, server, Answer(server.runner, requests, stop, body.n or 1), form, body)


@dataclass(frozen=True)
class ChatForm:
    answer_id: str
    model: str
    token_texts: TokenTexts
    wants_logprobs: bool
    created: int = field(default_factory=lambda: int(time.time()))

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
        return self._chunk(choice, ChatDelta(role="assistant", content=""))

    def piece(self, choice: Choice, text: str, token: GeneratedToken | None) -> ChatCompletionChunk:
        return self._chunk(choice, ChatDelta(content=text), self._logprobs([token] if token else []))

    def closing(self, choice: Choice) -> ChatCompletionChunk:
        return self._chunk(choice, ChatDelta())

    def usage(self, usage: Usage) -> ChatCompletionChunk:
        return ChatCompletionChunk(
            id=self.answer_id,
            object="chat.completion.chunk",
            created=self.created,
            model=self.model,
            choices=[],
            usage=usage,
        )

    def _chunk(self, choice: Choice, delta: ChatDelta, logprobs: ChatLogprobs | None = None) -> ChatCompletionChunk:
        shown = ChatChunkChoice(index=choice.index, delta=delta, logprobs=logprobs, finish_reason=choice.finish_reason)
        return ChatCompletionChunk(
            id=self.answer_id,
            object="chat.completion.chunk",
            created=self.created,
            model=self.model,
            choices=[shown],
        )

    def _logprobs(self, tokens: list[GeneratedToken]) -> ChatLogprobs | None:
        return chat_logprobs(self.token_texts, tokens) if self.wants_logprobs else None
