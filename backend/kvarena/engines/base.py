"""The contract between the HTTP server and an engine, and what every engine needs to fulfil it.

The server reads requests, checks them, detokenises, finds stop strings, writes answers, metrics and the log line. The
engine tokenises, prefills, samples and reports. Who does what:

| | server | engine |
|---|---|---|
| chat template, stop strings, logprob texts, usage, errors as HTTP | x | |
| tokenising, limits of the context, KV, sampling, seeds, timings | | x |

In order: the tokenizer, requests and reports, a report's spans and misses, `Generation` and `Engine`; the last reports
by request id; a prompt's token ids, and how many more fit after it. No torch, no HTTP.
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import tokenizers
from pydantic import BaseModel


class Tokenizer(Protocol):
    """The part of `transformers.PreTrainedTokenizerFast` that is used."""

    chat_template: Any
    eos_token_id: int | None

    @property
    def backend_tokenizer(self) -> tokenizers.Tokenizer: ...

    def __len__(self) -> int: ...

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str: ...

    def convert_ids_to_tokens(self, token_ids: Sequence[int]) -> list[str]: ...

    def apply_chat_template(self, conversation: Sequence[Any], **arguments: Any) -> Any: ...


FinishReason = Literal["stop", "length"]


class PromptTooLong(ValueError):
    """The prompt exceeds the model's context."""


class EngineUnavailable(RuntimeError):
    """What an engine runs on is gone for now; the message is for clients, who may try again."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. `temperature` 0 is greedy; `seed` None draws a fresh one.

    With `max_tokens` None an answer may fill the context. `num_logprobs` None gives no logprobs, 0 only the drawn
    token's own. `ignore_eos` goes on after the end-of-sequence token.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    num_logprobs: int | None = None
    ignore_eos: bool = False


@dataclass(frozen=True)
class GenerationRequest:
    """A checked request. `prompt` is token ids, or text to which the tokenizer adds special tokens if
    `add_special_tokens` says so.

    `request_id` is the answer's, `http_request_id` the HTTP request's: for logs. Clients choose them, so neither is
    unique. `messages` and `template_arguments` are what the prompt was rendered from, for engines that look at a
    conversation. `sample` numbers the `num_samples` that a client wants of one prompt. `options` is an instance of the
    engine's own `options_model`.
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
    """A drawn token. `top` are the most likely ones, best first, `(token id, logprob)`. `is_end`: an end-of-sequence
    token that ends the answer; it is counted, and has no text.
    """

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    is_end: bool = False


@dataclass
class Report:
    """What a request cost, filled in while it runs; complete when its tokens have ended.

    `num_prompt_tokens = num_reused_tokens + num_recomputed_tokens + num_computed_tokens`. `details` is the engine's own
    and goes into the answer and the log line as it is: JSON values, times in `_ms`. `texts` go into the answer alone,
    for what people wrote doesn't belong in a log.
    """

    approximate: bool = False
    num_prompt_tokens: int = 0
    num_reused_tokens: int = 0
    num_recomputed_tokens: int = 0
    num_computed_tokens: int = 0
    details: dict[str, Any] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)


def spans_of(reused: Iterable[tuple[int, int, str]], num_prompt_tokens: int) -> list[dict[str, Any]]:
    """Where the KV of each range of a prompt comes from, as reports have it, without empty ranges.

    `reused` are ranges in order, `[start, end)` with their source; what lies between them is computed.
    """
    ranges: list[tuple[int, int, str]] = []
    position = 0
    for start, end, source in [*reused, (num_prompt_tokens, num_prompt_tokens, "")]:
        ranges += [(position, start, "computed"), (start, end, source)]
        position = end
    return [{"start": start, "end": end, "source": source} for start, end, source in ranges if start < end]


MissReason = Literal[
    "never_seen",
    "other_salt",
    "other_model",
    "evicted",
    "store_down",
    "boundary_inside_token",
    "too_short",
    "mostly_new",
]
"""Why a chunk wasn't reused (docs/http.md). `other_salt` tells of the empty salt only: a tenant's is its secret."""


class Generation(Protocol):
    """A running request. The server iterates it in one thread of its own and always calls `close`.

    Tokens end when `finish_reason` is set: "stop" with an end-of-sequence token (the last one), else "length". `close`
    gives everything back. It may be called from any thread and more than once, and doesn't wait for a token under way,
    which may still be yielded; a closed generation ends with its next token at the latest. `prompt_token_ids` are known
    with the first token: how that reads depends on what is before it.
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


TOKEN_COUNTS = ("num_reused_tokens", "num_recomputed_tokens", "num_computed_tokens")


_CHOICE_NUMBER, _PROMPT_NUMBER = re.compile(r"(\d+_)?"), re.compile(r"([-_]\d+)?")


class ReportLog:
    """The last reports by request id, with at most `max_values` numbers and texts together. Thread-safe.

    A report belongs to whoever has the whole id of the answer. The requests of one answer have its id with a number
    after it (one prompt of many, one turn of a response) or before it (vLLM's one choice of many); the newest counts.
    """

    def __init__(self, max_reports: int = 1024, max_values: int = 1 << 20) -> None:
        self._max_reports = max_reports
        self._max_values = max_values
        self._num_values = 0
        self._reports: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, report: dict[str, Any]) -> None:
        """The newest is kept, however long it is."""
        with self._lock:
            self._drop(report["request_id"])
            self._reports[report["request_id"]] = report
            self._num_values += _num_values(report)
            while len(self._reports) > 1 and (
                len(self._reports) > self._max_reports or self._num_values > self._max_values
            ):
                self._drop(next(iter(self._reports)))

    def forget(self, answer_id: str) -> None:
        """What is kept for this answer, as `get` finds it."""
        with self._lock:
            for key in [key for key in self._reports if _is_of_answer(key, answer_id)]:
                self._drop(key)

    def get(self, answer_id: str) -> dict[str, Any] | None:
        with self._lock:
            newest_first = reversed(self._reports.items())
            found = next((report for key, report in newest_first if _is_of_answer(key, answer_id)), None)
        return found and {**found, "request_id": answer_id}

    def _drop(self, request_id: str) -> None:
        if (report := self._reports.pop(request_id, None)) is not None:
            self._num_values -= _num_values(report)


def _num_values(value: object) -> int:
    """In lists and dicts, however deep."""
    if isinstance(value, Mapping):
        return sum(map(_num_values, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(_num_values, value))
    return 1


def _is_of_answer(request_id: str, answer_id: str) -> bool:
    if not answer_id or answer_id not in request_id:
        return False
    before, _, after = request_id.rpartition(answer_id)
    return _CHOICE_NUMBER.fullmatch(before) is not None and _PROMPT_NUMBER.fullmatch(after) is not None


class ServedModel(Protocol):
    """What a prompt has to fit."""

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def max_model_len(self) -> int: ...


def token_ids_of(request: GenerationRequest, model: ServedModel) -> list[int]:
    """Raises `ValueError` for an id that isn't in the vocabulary, and for an empty prompt."""
    if isinstance(request.prompt, str):
        token_ids = model.tokenizer.encode(request.prompt, add_special_tokens=request.add_special_tokens)
    else:
        token_ids = list(request.prompt)
    check_in_vocabulary(token_ids, model.vocab_size)
    return token_ids


def check_in_vocabulary(token_ids: list[int], vocab_size: int) -> None:
    if not token_ids:
        raise ValueError("the prompt is empty; it needs at least one token")
    if bad := [token for token in token_ids if not 0 <= token < vocab_size]:
        raise ValueError(f"token id {bad[0]} is not in the vocabulary: ids go from 0 to {vocab_size - 1}")


def num_tokens_to_generate(num_prompt_tokens: int, wanted: int | None, model: ServedModel) -> int:
    """`wanted`, or as many as the context has room for. Raises `PromptTooLong` for a prompt that exceeds it, and
    `ValueError` for one that fills it, and for a `wanted` that no prompt leaves room for.
    """
    longest = model.max_model_len
    limit = f"this model's maximum context length is {longest} tokens"
    if wanted is not None and wanted > longest:
        raise ValueError(f"{limit}; max_tokens is {wanted}")
    if num_prompt_tokens > longest:
        raise PromptTooLong(f"{limit}; the prompt has {num_prompt_tokens}")
    if num_prompt_tokens == longest:
        raise ValueError(f"{limit}; the prompt fills it, and an answer needs room")
    room = longest - num_prompt_tokens
    return room if wanted is None else min(wanted, room)
