"""What clients send and what they get, as Pydantic models: OpenAI's objects, and vLLM's where OpenAI has none.

Requests. Types are strict: `"5"` is no number and `true` no count. Nullable fields take `null` as absent, as OpenAI's
do. A parameter that this server can't honour is refused unless its value asks for nothing (`unsupported_parameter`):
ignoring it would be a wrong answer that looks right. Any other unknown field is ignored, as vLLM does. Lists are
checked up to their first error: a large bad one must not cost more than a good one.

Responses. The request report is in `kv_transfer_params.kvarena`. Fields are written when they are set, so an object
says `null` where OpenAI's does and nothing where OpenAI's doesn't.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from kvarena.engines.base import FinishReason

_ABSENT: tuple[Any, ...] = (None, [], {}, False, "")
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "allowed_token_ids": _ABSENT,
    "audio": _ABSENT,
    "bad_words": _ABSENT,
    "best_of": (None, 1),
    "chat_template": _ABSENT,
    "echo": _ABSENT,
    "frequency_penalty": (None, 0),
    "function_call": (None, "none", "auto"),
    "functions": _ABSENT,
    "guided_choice": _ABSENT,
    "guided_grammar": _ABSENT,
    "guided_json": _ABSENT,
    "guided_regex": _ABSENT,
    "length_penalty": (None, 1),
    "logit_bias": _ABSENT,
    "min_p": (None, 0),
    "min_tokens": (None, 0),
    "modalities": (None, [], ["text"]),
    "prediction": _ABSENT,
    "presence_penalty": (None, 0),
    "prompt_embeds": _ABSENT,
    "prompt_logprobs": (None,),
    "repetition_penalty": (None, 1),
    "response_format": (None, {"type": "text"}),
    "skip_special_tokens": (None, True),
    "stop_token_ids": _ABSENT,
    "structured_outputs": _ABSENT,
    "suffix": _ABSENT,
    "tool_choice": (None, "none", "auto"),
    "tools": _ABSENT,
    "top_k": (None, 0, -1),
    "truncate_prompt_tokens": (None,),
    "use_beam_search": _ABSENT,
    "web_search_options": (None,),
}


def unsupported_parameter(body: Mapping[str, Any]) -> str | None:
    """What to say about the first parameter that can't be honoured; `None` where all can."""
    for name, neutral in _NEUTRAL.items():
        if name in body and body[name] not in neutral:
            accepted = [value for value in neutral if value is not None and value not in _ABSENT[1:]]
            allowed = f"; accepted is {' or '.join(map(repr, accepted))}" if accepted else ""
            return f"{name} is not supported by this server{allowed}"
    return None


INT64 = 2**63
MAX_LOGPROBS = 20
MAX_STOPS = 16

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
StopString = Annotated[str, Field(min_length=1, max_length=1024)]
Texts = Annotated[list[str], Field(min_length=1, fail_fast=True)]
ManyTokenIds = Annotated[list[TokenIds], Field(min_length=1, fail_fast=True)]
Prompt = str | TokenIds | Texts | ManyTokenIds


class RequestModel(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class StreamOptions(RequestModel):
    include_usage: bool | None = None


class SamplingFields(RequestModel):
    """What chat and text completions have in common."""

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1, lt=2**31)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-INT64, lt=INT64)
    n: int | None = Field(None, ge=1, le=128)
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS, fail_fast=True)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    cache_salt: str | None = Field(None, min_length=1, max_length=1024)
    add_special_tokens: bool | None = None
    kv_transfer_params: dict[str, Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def _check_supported(cls, body: Any) -> Any:
        if isinstance(body, dict) and (refusal := unsupported_parameter(body)):
            raise ValueError(refusal)
        return body

    @model_validator(mode="after")
    def _check_stream_options(self) -> SamplingFields:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only allowed with stream true")
        return self

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def includes_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class TextPart(RequestModel):
    type: Literal["text"]
    text: str


class Message(RequestModel):
    """`content` may be a list of text parts. What else a message says is the chat template's to use."""

    model_config = ConfigDict(extra="allow")

    role: str = Field(min_length=1)
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = None


Messages = Annotated[list[Message], Field(min_length=1, fail_fast=True)]


class TemplateFields(RequestModel):
    """How messages become a prompt."""

    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check_last_message(self) -> TemplateFields:
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError("continue_final_message: only allowed with add_generation_prompt false")
        return self


class ChatCompletionRequest(TemplateFields, SamplingFields):
    messages: Messages
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    @model_validator(mode="after")
    def _check_logprobs(self) -> ChatCompletionRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: only allowed with logprobs true")
        return self


class CompletionRequest(SamplingFields):
    prompt: Prompt
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)


class TokenizeRequest(TemplateFields):
    """A prompt, or messages; special tokens are added to the former unless it says otherwise."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _check_either(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("either prompt or messages must be given")
        return self


class DetokenizeRequest(RequestModel):
    model: str | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]


Reason = FinishReason | None


class ResponseModel(BaseModel):
    def json_bytes(self) -> bytes:
        return self.model_dump_json(exclude_unset=True).encode()


class PromptTokensDetails(ResponseModel):
    cached_tokens: int


class Usage(ResponseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TopLogprob(ResponseModel):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(ResponseModel):
    content: list[TokenLogprob]


class ChatMessage(ResponseModel):
    role: Literal["assistant"]
    content: str


class ChatChoice(ResponseModel):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Reason


class ChatCompletion(ResponseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    kv_transfer_params: dict[str, Any]


class ChatDelta(ResponseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(ResponseModel):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: Reason


class ChatCompletionChunk(ResponseModel):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class TextLogprobs(ResponseModel):
    """Four lists of the same length. `text_offset`: where a token begins in the text, in characters."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(ResponseModel):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Reason


class Completion(ResponseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage | None = None
    kv_transfer_params: dict[str, Any] | None = None


class Model(ResponseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    max_model_len: int


class ModelList(ResponseModel):
    object: Literal["list"]
    data: list[Model]


class Tokens(ResponseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizedPrompt(ResponseModel):
    prompt: str


class Error(ResponseModel):
    message: str
    type: str
    param: str | None
    code: int


class ErrorAnswer(ResponseModel):
    error: Error


class RequestReport(ResponseModel):
    """The engine's own details stand beside these."""

    model_config = {"extra": "allow"}

    request_id: str
    contender: str
    approximate: bool
    num_prompt_tokens: int
    num_reused_tokens: int
    num_recomputed_tokens: int
    num_computed_tokens: int
