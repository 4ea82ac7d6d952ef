"""From an HTTP request to what an engine is asked: the body, the prompts, one `GenerationRequest` for each choice.

FastAPI reads a body through its request's `body` and `json`; `JsonRoute` gives it a request whose two methods refuse
what is too large (413), what isn't JSON by its header (415), and what isn't by its content (400): invalid UTF-8, lone
surrogates, NaN, nesting without end. A body that is too large is never kept, let alone parsed. Clients send messages,
texts, token ids, or several of these; engines take a text or token ids.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pydantic_core
from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

from kvarena.engines.base import Engine, GenerationRequest, Sampling, Tokenizer
from kvarena.server.errors import ApiError, shown, validation_message
from kvarena.server.protocol import INT64, Message, SamplingFields, TemplateFields
from kvarena.server.state import Server


class JsonRequest(Request):
    async def body(self) -> bytes:
        if not hasattr(self, "_body"):
            self._check_type()
            self._body = await self._read()
        return self._body

    async def json(self) -> Any:
        try:
            return pydantic_core.from_json(await self.body(), allow_inf_nan=False)
        except ValueError as error:
            raise ApiError(400, f"the body isn't valid JSON: {error}") from None

    async def _read(self) -> bytes:
        limit: int = self.app.state.server.config.max_body_bytes
        length = self.headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > limit:
            raise _too_large(limit)
        body = bytearray()
        try:
            async for part in self.stream():
                body += part
                if len(body) > limit:
                    raise _too_large(limit)
        except ClientDisconnect:
            raise ApiError(400, "the client went away before its request was complete") from None
        if not body:
            raise ApiError(400, "the body is empty; it must be a JSON object")
        return bytes(body)

    def _check_type(self) -> None:
        given = self.headers.get("content-type", "")
        kind = given.partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(415, f"the content type must be application/json, not {shown(given)}")


class JsonRoute(APIRoute):
    """The route class of every path that takes a body: `APIRouter(route_class=JsonRoute)`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_json(request: Request) -> Response:
            return await handle(JsonRequest(request.scope, request.receive))

        return handle_json


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"the body is larger than {limit} bytes")


EnginePrompt = str | tuple[int, ...]

_OUR_TEMPLATE_ARGUMENTS = frozenset(
    {
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "conversation",
        "documents",
        "max_length",
        "padding",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "tokenize",
        "tokenizer_kwargs",
        "tools",
        "truncation",
    }
)


@dataclass(frozen=True)
class RenderedChat:
    """The prompt's text, special tokens written out, the messages that it was made of, and the template's arguments."""

    text: str
    messages: tuple[dict[str, Any], ...]
    template_arguments: Mapping[str, Any]


def render_chat(tokenizer: Tokenizer, chat: Sequence[Message], how: TemplateFields) -> RenderedChat:
    if not tokenizer.chat_template:
        raise ApiError(400, "this model has no chat template; use /v1/completions", "messages")
    messages = tuple(_plain(message) for message in chat)
    arguments = how.chat_template_kwargs or {}
    if ours := sorted(_OUR_TEMPLATE_ARGUMENTS & arguments.keys()):
        raise ApiError(400, f"chat_template_kwargs can't set {ours[0]}", "chat_template_kwargs")
    continues = bool(how.continue_final_message)
    generates = not continues if how.add_generation_prompt is None else how.add_generation_prompt
    arguments = {**arguments, "add_generation_prompt": generates, "continue_final_message": continues}
    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, **arguments)
    except Exception as error:
        # A template is a program of the model's author; it fails on messages that it wasn't written for.
        raise ApiError(400, f"the model's chat template can't render these messages: {error}", "messages") from error
    return RenderedChat(str(text), messages, arguments)


def _plain(message: Message) -> dict[str, Any]:
    """Text parts are joined by line breaks, as vLLM does for templates that take texts."""
    content = message.content
    if isinstance(content, list):
        content = "\n".join(part.text for part in content)
    extra = {name: value for name, value in (message.model_extra or {}).items() if value is not None}
    if unsupported := sorted(name for name in ("audio", "function_call", "tool_calls") if extra.get(name)):
        raise ApiError(400, f"messages with {unsupported[0]} are not supported by this server", "messages")
    return {**extra, "role": message.role, "content": content or ""}


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


@dataclass(frozen=True)
class Prompts:
    texts: Sequence[EnginePrompt]
    add_special_tokens: bool
    messages: tuple[Mapping[str, Any], ...] = ()
    template_arguments: Mapping[str, Any] = field(default_factory=dict)


def generation_requests(
    server: Server, http: Request, answer_id: str, body: SamplingFields, sampling: Sampling, prompts: Prompts
) -> list[GenerationRequest]:
    """Each prompt `n` times. Where there are several, the choice's number is appended to the id."""
    num_samples, limit = body.n or 1, server.config.max_choices
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
            conversation_id=http.headers.get("x-conversation-id") or body.user or None,
            options=options,
        )
        for prompt in prompts.texts
        for sample in range(num_samples)
    ]
    if len(requests) == 1:
        return requests
    return [replace(request, request_id=f"{answer_id}-{index}") for index, request in enumerate(requests)]


def sampling_of(body: SamplingFields, *, max_tokens: int | None, num_logprobs: int | None) -> Sampling:
    return Sampling(
        max_tokens=max_tokens,
        temperature=1.0 if body.temperature is None else float(body.temperature),
        top_p=1.0 if body.top_p is None else float(body.top_p),
        seed=body.seed,
        num_logprobs=num_logprobs,
        ignore_eos=bool(body.ignore_eos),
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
