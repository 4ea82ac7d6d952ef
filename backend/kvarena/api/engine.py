"""The seam between the HTTP server and an engine.

The server reads requests, checks them, detokenises, finds stop strings, writes answers, metrics and the log line. The
engine tokenises, prefills, samples and reports. Who does what:

| | server | engine |
|---|---|---|
| chat template, stop strings, logprob texts, usage, errors as HTTP | x | |
| tokenising, limits of the context, KV, sampling, seeds, timings | | x |
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from pydantic import BaseModel

from kvarena.api.tokenizer import Tokenizer

FinishReason = Literal["stop", "length"]


class EngineUnavailable(RuntimeError):
    """What an engine runs on is gone, for now; the message is for clients, who may try again."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. `temperature` 0 is greedy; `seed` None draws a fresh one.

    `max_tokens` None goes on to the end of the context. `num_logprobs` None gives no logprobs, 0 only the drawn
    token's own. `ignore_eos` goes on behind the end-of-sequence token.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    num_logprobs: int | None = None
    ignore_eos: bool = False


@dataclass(frozen=True)
class GenerationRequest:
    """A checked request. `prompt` is text, special tokens written out or added by the tokenizer as
    `add_special_tokens` says, or token ids.

    `request_id` is the answer's, `http_request_id` the HTTP request's: for logs. Clients choose them, so they may come
    twice.

    `messages` and `template_arguments` are what the prompt was rendered from, for engines that look at a conversation.
    `sample` numbers the `num_samples` that a client asked of one prompt. `options` is an instance of the engine's own
    `options_model`.
    """

    request_id: str
    prompt: str | tuple[int, ...]
    sampling: Sampling
    http_request_id: str = ""
    add_special_tokens: bool = True
    messages: tuple[Mapping[str, Any], ...] = ()
    template_arguments: Mapping[str, Any] = field(default_factory=dict)
    sample: int = 0
    num_samples: int = 1
    cache_salt: str = ""
    conversation_id: str | None = None
    options: BaseModel | None = None


@dataclass(frozen=True, slots=True)
class GeneratedToken:
    """A drawn token. `top` are the most likely ones, best first, `(token id, logprob)`."""

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass
class Report:
    """What a request cost, filled in while it runs; complete when its tokens have ended.

    `num_prompt_tokens = num_reused_tokens + num_recomputed_tokens + num_computed_tokens`. `details` is the engine's own
    and goes into the answer and the log line as it is: JSON values, times in `_ms`. `texts` go into the answer alone:
    what people wrote doesn't belong into a log.
    """

    approximate: bool = False
    num_prompt_tokens: int = 0
    num_reused_tokens: int = 0
    num_recomputed_tokens: int = 0
    num_computed_tokens: int = 0
    details: dict[str, Any] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)


class Generation(Protocol):
    """A running request. The server iterates it in one thread of its own and always calls `close`.

    Tokens end when `finish_reason` is set: "stop" at an end-of-sequence token (which is not yielded), else "length".
    `close` gives everything back, from any thread and more than once, without waiting for a token under way, which may
    still be yielded; a closed generation ends with its next token at the latest. `prompt_token_ids` are known with the
    first token: what a text's first token looks like depends on what stands before it.
    """

    report: Report
    finish_reason: FinishReason | None
    prompt_token_ids: Sequence[int]

    def __iter__(self) -> Iterator[GeneratedToken]: ...

    def close(self) -> None: ...


class Engine(Protocol):
    """Serves one model. Every method may be called from several threads at once."""

    contender: str
    model_name: str
    max_model_len: int
    tokenizer: Tokenizer
    options_model: type[BaseModel] | None
    """The engine's own request parameters, under `kv_transfer_params.kvarena`; unknown ones and bad values get 400."""

    def generate(self, request: GenerationRequest) -> Generation:
        """A request, ready to be iterated; the work may begin with the first token that is asked for.

        One that can't be served (an empty prompt, one that is too long) raises `ValueError` with the value and the
        bounds: here, or before the first token, so that a refusal is an HTTP status and never a broken stream.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """The settings, as `GET /kvarena` answers them."""
        ...

    def close(self) -> None:
        """Ends everything that runs and gives the model back."""
        ...
