"""Prompts as an engine takes them, from what clients send: messages, texts, token ids, or several of these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvarena.api.errors import ApiError
from kvarena.api.request_models import Message, TemplateFields
from kvarena.api.tokenizer import Tokenizer

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
