"""From an HTTP request to what an engine is asked: the body, the prompts, one `GenerationRequest` for each choice.

FastAPI reads a body through its request's `body` and `json`; `JsonRoute` gives it a request whose two methods refuse
what isn't JSON, by its header or by its content: invalid UTF-8, nesting without end. Clients send messages, texts,
token ids, or several of these; engines take a text or token ids.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

from kvarena.engines.base import Engine, GenerationRequest, Sampling, Tokenizer
from kvarena.server.errors import ApiError, shown, validation_message
from kvarena.server.protocol import INT64, ChatCompletionRequest, Message, SamplingFields, TemplateFields
from kvarena.server.state import Server

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class JsonRequest(Request):
    async def body(self) -> bytes:
        if not hasattr(self, "_body"):
            self._check_type()
            try:
                await super().body()
            except ClientDisconnect:
                raise ApiError(400, "the client went away before its request was complete") from None
            if not self._body:
                raise ApiError(400, "the body is empty; it must be a JSON object")
        return self._body

    async def json(self) -> Any:
        """Parsed as vLLM parses it, and without lone surrogates, which no tokenizer takes."""
        body = await self.body()
        try:
            parsed = json.loads(body)
            if _SURROGATE.search(body):
                json.dumps(parsed, ensure_ascii=False).encode()
            return parsed
        except (ValueError, RecursionError) as error:
            raise ApiError(400, f"the body isn't valid JSON: {error}") from None

    def _check_type(self) -> None:
        given = self.headers.get("content-type", "")
        kind = given.partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(400, f"the content type must be application/json, not {shown(given)}")


class JsonRoute(APIRoute):
    """The route class of every path that takes a body: `APIRouter(route_class=JsonRoute)`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_json(request: Request) -> Response:
            return await handle(JsonRequest(request.scope, request.receive))

        return handle_json


EnginePrompt = str | tuple[int, ...]

_REFUSED_TEMPLATE_ARGUMENTS = frozenset({"chat_template", "conversation", "messages"})
_IGNORED_TEMPLATE_ARGUMENTS = frozenset(
    {
        "add_generation_prompt",
        "continue_final_message",
        "max_length",
        "padding",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "tokenize",
        "tokenizer_kwargs",
        "truncation",
    }
)


@dataclass(frozen=True)
class Prompts:
    """Texts with their special tokens written out, or token ids; of a chat also what its one text was made of."""

    texts: Sequence[EnginePrompt]
    add_special_tokens: bool
    messages: tuple[Mapping[str, Any], ...] = ()
    template_arguments: Mapping[str, Any] = field(default_factory=dict)


def render_chat(tokenizer: Tokenizer, chat: Sequence[Message], how: TemplateFields) -> Prompts:
    if not tokenizer.chat_template:
        raise ApiError(400, "this model has no chat template; use /v1/completions", "messages")
    messages = tuple(_plain(message) for message in chat)
    given = how.chat_template_kwargs or {}
    if refused := sorted(_REFUSED_TEMPLATE_ARGUMENTS & given.keys()):
        raise ApiError(400, f"chat_template_kwargs can't set {refused[0]}", "chat_template_kwargs")
    arguments = {name: value for name, value in given.items() if name not in _IGNORED_TEMPLATE_ARGUMENTS}
    arguments |= {
        "add_generation_prompt": how.add_generation_prompt,
        "continue_final_message": how.continue_final_message,
    }
    if isinstance(how, ChatCompletionRequest):
        further = {"documents": how.documents, "reasoning_effort": how.reasoning_effort}
        arguments |= {name: value for name, value in further.items() if value is not None}
    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, **arguments)
    except Exception as error:
        # A template is a program of the model's author; it fails on messages that it wasn't written for.
        raise ApiError(400, f"the model's chat template can't render these messages: {error}", "messages") from error
    return Prompts([str(text)], how.add_special_tokens, messages, arguments)


def _plain(message: Message) -> dict[str, Any]:
    """Text parts are joined by line breaks, as vLLM does for templates that take texts."""
    content = message.content
    if isinstance(content, list):
        content = "\n".join(part.text for part in content)
    extra = {name: value for name, value in (message.model_extra or {}).items() if value is not None}
    if calls := [call.for_template() for call in message.called]:
        extra["tool_calls"] = calls
    if message.tool_call_id is not None:
        extra["tool_call_id"] = message.tool_call_id
    named = {"name": message.name} if message.name else {}
    return {**extra, **named, "role": message.role, "content": content or ""}


def split_prompts(prompt: str | Sequence[Any], tokenizer: Tokenizer) -> list[EnginePrompt]:
    """One prompt, or several: a text, token ids, or a list of texts or of token ids."""
    if isinstance(prompt, str):
        return [prompt]
    prompts: Sequence[Any] = [prompt] if isinstance(prompt[0], int) else prompt
    return [p if isinstance(p, str) else check_token_ids(p, tokenizer, "prompt") for p in prompts]


def check_token_ids(token_ids: Sequence[int], tokenizer: Tokenizer, param: str) -> tuple[int, ...]:
    largest = len(tokenizer) - 1
    if outside := next((token_id for token_id in token_ids if token_id > largest), None):
        raise ApiError(400, f"{param}: token ids must be from 0 to {largest}, not {outside}", param)
    return tuple(token_ids)


OPTIONS_KEY = "kvarena"
_OPTIONS_PATH = f"kv_transfer_params.{OPTIONS_KEY}"


def generation_requests(
    server: Server, http: Request, answer_id: str, body: SamplingFields, sampling: Sampling, prompts: Prompts
) -> list[GenerationRequest]:
    """Each prompt `n` times. Where there are several, the choice's number is appended to the id."""
    num_samples, limit = body.num_samples, server.config.max_choices
    if len(prompts.texts) * num_samples > limit:
        raise ApiError(400, f"{len(prompts.texts)} prompts times n {num_samples} is more than {limit} choices", "n")
    options = read_options(server.engine, body.kv_transfer_params)
    requests = [
        GenerationRequest(
            request_id=answer_id,
            prompt=prompt,
            sampling=_sample(sampling, sample),
            http_request_id=http.state.request_id,
            add_special_tokens=prompts.add_special_tokens,
            messages=prompts.messages,
            template_arguments=prompts.template_arguments,
            sample=sample,
            num_samples=num_samples,
            cache_salt=body.cache_salt or "",
            conversation_id=conversation_of(http, body.session_id),
            options=options,
        )
        for prompt in prompts.texts
        for sample in range(num_samples)
    ]
    if len(requests) == 1:
        return requests
    return [replace(request, request_id=f"{answer_id}-{index}") for index, request in enumerate(requests)]


def conversation_of(http: Request, session_id: str | None) -> str | None:
    """Its name, if the client gives it one."""
    return http.headers.get("x-conversation-id") or session_id or None


def sampling_of(body: SamplingFields, num_logprobs: int | None) -> Sampling:
    return Sampling(
        max_tokens=body.answer_tokens,
        temperature=1.0 if body.temperature is None else float(body.temperature),
        top_p=1.0 if body.top_p is None else float(body.top_p),
        seed=None if body.seed == -1 else body.seed,
        num_logprobs=num_logprobs,
        ignore_eos=body.ignore_eos,
    )


def _sample(sampling: Sampling, index: int) -> Sampling:
    """The samples of a prompt differ also where a seed is given: the second has the next seed."""
    if sampling.seed is None or index == 0:
        return sampling
    return replace(sampling, seed=(sampling.seed + index + INT64) % (2 * INT64) - INT64)


def read_options(engine: Engine, kv_transfer_params: Mapping[str, Any] | None) -> BaseModel | None:
    """The engine's own parameters. Raises `ApiError` naming the key or value and the choices."""
    given = (kv_transfer_params or {}).get(OPTIONS_KEY)
    if given is not None and not isinstance(given, Mapping):
        raise ApiError(400, f"{_OPTIONS_PATH} must be an object, not {shown(given)}", _OPTIONS_PATH)
    model = engine.options_model
    choices = [field.alias or name for name, field in model.model_fields.items()] if model else []
    if unknown := sorted(set(given or {}) - set(choices)):
        takes = f"it takes {', '.join(choices)}" if choices else f"{engine.contender} takes no parameters"
        raise ApiError(400, f"{_OPTIONS_PATH} has no {shown(unknown[0])}; {takes}", _OPTIONS_PATH)
    if model is None:
        return None
    try:
        return model.model_validate(given or {})
    except ValidationError as error:
        message, param = validation_message(error.errors(), prefix=f"{_OPTIONS_PATH}.")
        raise ApiError(400, message, param) from None
