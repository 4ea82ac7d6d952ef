"""`POST /v1/completions`: one prompt or several, each a text or token ids."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from kvarena.api.answer import Answer
from kvarena.api.engine import GeneratedToken
from kvarena.api.generation_requests import Prompts, generation_requests, sampling_of
from kvarena.api.json_body import JsonRoute
from kvarena.api.logprobs import text_logprobs
from kvarena.api.prompts import split_prompts
from kvarena.api.request_models import CompletionRequest
from kvarena.api.responding import Choice, respond
from kvarena.api.response_models import Completion, TextChoice, TextLogprobs, Usage
from kvarena.api.server import ERRORS, TheServer
from kvarena.api.text_stream import StopRule
from kvarena.api.token_texts import TokenTexts

router = APIRouter(route_class=JsonRoute)

_ANSWER = "The completion; with `stream` true, server-sent events with its chunks, and `[DONE]` as the last"
_DEFAULT_MAX_TOKENS = 16  # OpenAI's, and vLLM's.


@router.post(
    "/v1/completions",
    response_model=None,
    responses={200: {"model": Completion, "description": _ANSWER, "content": {"text/event-stream": {}}}, **ERRORS},
)
async def create_completion(body: CompletionRequest, request: Request, server: TheServer) -> Response:
    server.check_model(body.model)
    prompts = split_prompts(body.prompt, server.engine.tokenizer)
    sampling = sampling_of(body, max_tokens=body.max_tokens or _DEFAULT_MAX_TOKENS, num_logprobs=body.logprobs)
    form = TextForm(
        f"cmpl-{request.state.request_id}", server.engine.model_name, server.token_texts, body.logprobs is not None
    )
    adds_special = body.add_special_tokens is not False
    requests = generation_requests(server, request, form.answer_id, body, sampling, Prompts(prompts, adds_special))
    stop = StopRule(body.stop_strings, bool(body.include_stop_str_in_output))
    return await respond(request, server, Answer(server.runner, requests, stop, body.n or 1), form, body)


@dataclass(frozen=True)
class TextForm:
    answer_id: str
    model: str
    token_texts: TokenTexts
    wants_logprobs: bool
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, choices: list[Choice], usage: Usage, report: dict[str, Any]) -> Completion:
        return Completion(
            id=self.answer_id,
            object="text_completion",
            created=self.created,
            model=self.model,
            choices=[self._choice(choice, "".join(choice.texts), choice.tokens) for choice in choices],
            usage=usage,
            kv_transfer_params={"kvarena": report},
        )

    def opening(self, choice: Choice) -> None:
        """A text begins with its first piece."""

    def piece(self, choice: Choice, text: str, token: GeneratedToken | None) -> Completion:
        return self._chunk([self._choice(choice, text, [token] if token else [])])

    def closing(self, choice: Choice) -> Completion:
        return self._chunk([self._choice(choice, "", [])])

    def usage(self, usage: Usage) -> Completion:
        return Completion(
            id=self.answer_id,
            object="text_completion",
            created=self.created,
            model=self.model,
            choices=[],
            usage=usage,
        )

    def _chunk(self, choices: list[TextChoice]) -> Completion:
        return Completion(
            id=self.answer_id, object="text_completion", created=self.created, model=self.model, choices=choices
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
