"""What clients send and what they get, as Pydantic models: OpenAI's objects, and vLLM's where OpenAI has none.

Requests get the verdict that vLLM 0.32 gives them, so that one client serves every contender: fields have its types and
bounds, `"16"` and `16.0` are numbers, `null` stands where it allows it, unknown fields are ignored. One thing differs:
a parameter that vLLM honours and these engines can't is refused unless its value asks for nothing (`Only`). Ignoring it
would be a wrong answer that looks right. Lists are checked up to their first error: a large bad one must not cost more
than a good one.

Responses. The request report is in `kv_transfer_params.kvarena`. Fields are written when they are set, so an object
says `null` where OpenAI's does and nothing where OpenAI's doesn't.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, model_validator

from kvarena.engines.base import FinishReason

INT64 = 2**63
MAX_LOGPROBS = 20
MAX_STOPS = 4
MAX_PROMPTS = 1024
MAX_SAMPLES = 16384


@dataclass(frozen=True)
class Only:
    """Marks a parameter that these engines can't honour, with the values that ask for nothing."""

    values: tuple[object, ...]


def _unsupported(request: BaseModel) -> str | None:
    """What to say about the first parameter that can't be honoured; `None` where all can."""
    for name, field in type(request).model_fields.items():
        only = next((mark for mark in field.metadata if isinstance(mark, Only)), None)
        if only and getattr(request, name) not in only.values:
            accepted = [str(value) for value in only.values if value is not None]
            allowed = f"; accepted is {' or '.join(accepted)}" if accepted else ""
            return f"{name} is not supported by this server{allowed}"
    return None


def _check_salt(salt: str) -> str:
    """vLLM's rule: a store may take a salt into a path or a key."""
    if not set(salt).isdisjoint("@/\\\0"):
        raise ValueError("must not contain '@', '/', a backslash or NUL")
    return salt


def _check_number(value: object) -> object:
    """vLLM compares before it converts."""
    if not isinstance(value, int | float):
        raise ValueError("Input should be a valid integer")
    return value


Int64 = Annotated[int, Field(ge=-INT64, lt=INT64)]
Salt = Annotated[str, Field(min_length=1, max_length=128), AfterValidator(_check_salt)]
StopString = Annotated[str, Field(min_length=1)]
NumLogprobs = Annotated[int, Field(ge=0, le=MAX_LOGPROBS), BeforeValidator(_check_number)]
TokenId = Annotated[int, Field(ge=0)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
ManyTokenIds = Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
Text = Annotated[str, Field(min_length=1)]
Texts = Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
Prompt = TokenIds | ManyTokenIds | Text | Texts


class RequestModel(BaseModel):
    model_config = ConfigDict(allow_inf_nan=False)


class StreamOptions(RequestModel):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class ResponseFormat(RequestModel):
    type: Literal["text", "json_object", "json_schema", "structural_tag"]

    def __str__(self) -> str:
        return str(self.model_dump())


NOTHING, OFF, ZERO = Only((None,)), Only((None, False)), Only((None, 0))


class SamplingFields(RequestModel):
    """What chat and text completions have in common."""

    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: Int64 | None = None
    n: int | None = Field(1, ge=1, le=MAX_SAMPLES)
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS, fail_fast=True)] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    cache_salt: Salt | None = None
    session_id: str | None = None
    kv_transfer_params: dict[str, Any] | None = None

    # Beyond these engines.
    allowed_token_ids: Annotated[list[int] | None, NOTHING] = None
    bad_words: Annotated[list[str], Only(([],))] = []
    echo: Annotated[bool | None, OFF] = False
    frequency_penalty: Annotated[float | None, ZERO] = None
    logit_bias: Annotated[dict[str, float] | None, Only((None, {}))] = None
    logprob_token_ids: Annotated[list[int] | None, Only((None, []))] = None
    min_p: Annotated[float | None, ZERO] = None
    min_tokens: Annotated[int, ZERO] = 0
    presence_penalty: Annotated[float | None, ZERO] = None
    prompt_logprobs: Annotated[int | None, NOTHING] = None
    repetition_detection: Annotated[dict[str, Any] | None, Only((None, {}))] = None
    repetition_penalty: Annotated[float | None, Only((None, 1))] = None
    response_format: Annotated[ResponseFormat | None, Only((None, ResponseFormat(type="text")))] = None
    return_token_ids: Annotated[bool | None, OFF] = None
    return_tokens_as_token_ids: Annotated[bool | None, OFF] = None
    skip_special_tokens: Annotated[bool, Only((True,))] = True
    stop_token_ids: Annotated[list[int] | None, Only((None, []))] = None
    structured_outputs: Annotated[dict[str, Any] | None, NOTHING] = None
    thinking_token_budget: Annotated[Annotated[int, Field(strict=True)] | None, Only((None, -1))] = None
    top_k: Annotated[int | None, Only((None, 0, -1))] = None
    truncate_prompt_tokens: Annotated[int | None, NOTHING] = None
    use_beam_search: Annotated[bool, OFF] = False

    # Without a meaning here; vLLM checks their types.
    ec_transfer_params: dict[str, Any] | None = None
    length_penalty: float = 1.0
    mm_payload: Literal["tensors", "none"] = "tensors"
    priority: Int64 = 0
    request_id: str = ""
    return_mm_kwargs: bool | None = None
    return_token_offsets: bool | None = False
    routed_experts_prompt_start: int = Field(0, ge=0)
    spaces_between_special_tokens: bool = True
    stream_interval: Annotated[int, Field(ge=1)] | None = None
    truncation_side: Literal["left", "right"] | None = None
    user: str | None = None
    vllm_xargs: dict[str, str | int | float | list[str | int | float]] | None = None
    watermarking: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _check_stream_options(cls, body: Any) -> Any:
        if isinstance(body, dict) and body.get("stream_options") and not body.get("stream"):
            raise ValueError("stream_options: only allowed with stream true")
        return body

    @model_validator(mode="after")
    def _check_together(self) -> SamplingFields:
        if refusal := _unsupported(self):
            raise ValueError(refusal)
        if self.answer_tokens is not None and self.answer_tokens < 1:
            raise ValueError(f"max_tokens: must be greater than or equal to 1 (given: {self.answer_tokens})")
        if self.temperature == 0 and self.num_samples > 1:
            raise ValueError(f"n: with temperature 0 there is one answer, not {self.num_samples}")
        return self

    @property
    def answer_tokens(self) -> int | None:
        """The longest answer that is wanted."""
        return self.max_tokens

    @property
    def num_samples(self) -> int:
        return 1 if self.n is None else self.n

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def includes_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def tells_usage_continuously(self) -> bool:
        """Only beside the usage at the end, as vLLM has it."""
        return self.includes_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)


class TextPart(RequestModel):
    type: Literal["text"]
    text: str


class RefusalPart(RequestModel):
    type: Literal["refusal"]
    refusal: str

    @property
    def text(self) -> str:
        return self.refusal


class ThinkingPart(RequestModel):
    type: Literal["thinking"]
    thinking: str

    @property
    def text(self) -> str:
        return self.thinking


Part = TextPart | RefusalPart | ThinkingPart


class CalledFunction(RequestModel):
    name: str
    arguments: str


class ToolCall(RequestModel):
    id: str
    type: Literal["function"]
    function: CalledFunction

    def for_template(self) -> dict[str, Any]:
        """With arguments as an object: none, as in vLLM, where the text is no JSON object."""
        try:
            arguments = json.loads(self.function.arguments)
        except (ValueError, RecursionError):
            arguments = None
        function = {"name": self.function.name, "arguments": arguments if isinstance(arguments, dict) else {}}
        return {"id": self.id, "type": self.type, "function": function}


TOOL_CALLS = TypeAdapter(list[ToolCall])


class Message(RequestModel):
    """`content` may be a list of parts; an assistant's may be null. Only an assistant's `tool_calls` count. What else a
    message says is the chat template's to use.
    """

    model_config = ConfigDict(extra="allow")

    role: str
    content: str | Annotated[list[Part], Field(fail_fast=True)] | None = None
    name: str = ""
    tool_calls: str | list[Any] | dict[str, Any] | None = None
    tool_call_id: Any = None

    @property
    def called(self) -> list[ToolCall]:
        return TOOL_CALLS.validate_python(self.tool_calls) if self.role == "assistant" and self.tool_calls else []

    @model_validator(mode="after")
    def _check_tools(self) -> Message:
        _ = self.called  # raises for bad ones
        if self.role == "tool" and not isinstance(self.tool_call_id, str | None):
            raise ValueError("tool_call_id: Input should be a valid string")
        return self

    @model_validator(mode="after")
    def _check_content(self) -> Message:
        if self.content is None and "content" in self.model_fields_set and self.role != "assistant":
            raise ValueError("content: null is for the assistant's messages only")
        return self


Messages = Annotated[list[Message], Field(min_length=1, fail_fast=True)]


class TemplateFields(RequestModel):
    """How messages become a prompt."""

    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check_last_message(self) -> TemplateFields:
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError("continue_final_message: only allowed with add_generation_prompt false")
        return self


class ChatCompletionRequest(TemplateFields, SamplingFields):
    messages: Messages
    max_completion_tokens: int | None = None
    logprobs: bool | None = False
    top_logprobs: NumLogprobs | None = None
    documents: list[dict[str, str]] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None

    # Beyond these engines.
    chat_template: Annotated[str | None, NOTHING] = None
    echo: Annotated[bool, OFF] = False
    media_io_kwargs: Annotated[dict[str, dict[str, Any]] | None, Only((None, {}))] = None
    mm_processor_kwargs: Annotated[dict[str, Any] | None, Only((None, {}))] = None
    return_prompt_text: Annotated[bool | None, OFF] = None
    tool_choice: Annotated[str | dict[str, Any] | None, Only((None, "none"))] = None
    tools: Annotated[list[Any] | None, NOTHING] = None

    # Without a meaning here; vLLM checks their types.
    include_reasoning: bool = True
    parallel_tool_calls: bool | None = True

    @model_validator(mode="before")
    @classmethod
    def _check_logprobs(cls, body: Any) -> Any:
        if isinstance(body, dict) and body.get("top_logprobs") and not body.get("logprobs"):
            raise ValueError("top_logprobs: only allowed with logprobs true")
        return body

    @property
    def answer_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class CompletionRequest(SamplingFields):
    prompt: Prompt
    n: int = Field(1, ge=1, le=MAX_SAMPLES)
    logprobs: NumLogprobs | None = None
    add_special_tokens: bool = True

    # Beyond these engines.
    prompt_embeds: Annotated[str | list[str] | None, Only((None, []))] = None
    suffix: Annotated[str | None, NOTHING] = None

    @property
    def answer_tokens(self) -> int:
        """OpenAI's default, and vLLM's."""
        return 16 if self.max_tokens is None else self.max_tokens


class TokenizeRequest(TemplateFields):
    """A prompt, or messages; special tokens are added to the former unless it says otherwise."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
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
    prompt_tokens_details: PromptTokensDetails | None = None


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
    code: int | str


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
