"""A deterministic engine for tests of the HTTP layer: it answers with the text that its prompt asks for.

The tokenizer is a real byte-level BPE one. A prompt's last line is the script: `say <text>` is tokenised and streamed
token by token; other words make it wait, fail, or never end. The first half of a prompt counts as reused. With a
`Pace` every answer goes on as the test lets it, whatever its prompt says.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from transformers import PreTrainedTokenizerFast

from kvarena.engines.base import (
    EngineUnavailable,
    FinishReason,
    GeneratedToken,
    GenerationRequest,
    Report,
    check_in_vocabulary,
    num_tokens_to_generate,
)
from support.tiny_models import tiny_tokenizer

MAX_MODEL_LEN = 4096
PROMPT_END = "\n# answer:"


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


class ScriptedOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")

    mode: Literal["fast", "slow"] = "fast"
    depth: int = 1


class Pace:
    """A test's hand on all answers of an engine: none has more tokens than `let` through, or ends before `end`."""

    def __init__(self) -> None:
        self._num_tokens = 0
        self._over = False

    def let(self, num_tokens: int) -> None:
        """So many more of each answer."""
        self._num_tokens += num_tokens

    def end(self) -> None:
        self._over = True

    def positions(self, closed: threading.Event) -> Iterator[int]:
        """Of the tokens of one answer, as they come; until the end, or until it is closed."""
        count = 0
        while not closed.wait(0.002) and not (self._over and count == self._num_tokens):
            while count < self._num_tokens and not closed.is_set():
                yield count
                count += 1


@dataclass
class ScriptedEngine:
    """`requests`: what it was asked. `open`: generations that are not closed yet."""

    delay_s: float = 0.0
    contender: str = "scripted"
    model_name: str = "tiny"
    max_model_len: int = MAX_MODEL_LEN
    vocab_size: int = field(default_factory=lambda: len(tokenizer()))
    options_model: type[BaseModel] | None = ScriptedOptions
    pace: Pace | None = None
    tokenizer: PreTrainedTokenizerFast = field(default_factory=tokenizer)
    requests: list[GenerationRequest] = field(default_factory=list)
    open: set[int] = field(default_factory=set)
    closed: bool = False

    def generate(self, request: GenerationRequest) -> ScriptedGeneration:
        self.requests.append(request)
        prompt = request.prompt
        ids: Sequence[int]
        if isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt, add_special_tokens=request.add_special_tokens)
        else:
            ids = prompt
        check_in_vocabulary(list(ids), self.vocab_size)
        max_tokens = num_tokens_to_generate(len(ids), request.sampling.max_tokens, self)
        text = prompt if isinstance(prompt, str) else self.tokenizer.decode(list(ids))
        return ScriptedGeneration(
            self, request, list(ids), max_tokens, text.rstrip("\n").rpartition("\n")[2].strip("\r")
        )

    def describe(self) -> dict[str, Any]:
        return {"modes": ["fast", "slow"]}

    def close(self) -> None:
        self.closed = True


class ScriptedGeneration:
    def __init__(
        self, engine: ScriptedEngine, request: GenerationRequest, ids: Sequence[int], max_tokens: int, script: str
    ) -> None:
        reused = len(ids) // 2
        self.report = Report(False, len(ids), reused, 0, len(ids) - reused, {"lookup_ms": 0.5, "hit": True})
        self.finish_reason: FinishReason | None = None
        self.prompt_token_ids = ids
        self._engine = engine
        self._sampling = request.sampling
        self._max_tokens = max_tokens
        self._script = script
        self._closed = threading.Event()
        engine.open.add(id(self))

    def close(self) -> None:
        self._closed.set()
        self._engine.open.discard(id(self))

    def __iter__(self) -> Iterator[GeneratedToken]:
        if self._engine.pace:
            words = self._engine.tokenizer.encode(" tea", add_special_tokens=False)
            yield from (self._token(words[at % len(words)]) for at in self._engine.pace.positions(self._closed))
            if not self._closed.is_set():
                yield from self._end()
            return
        word, _, rest = self._script.partition(" ")
        if word == "refuse":
            raise ValueError("refused before the first token; nothing is accepted")
        if word == "fail":
            raise RuntimeError("out of memory")
        if word == "gone":
            raise EngineUnavailable("the device is gone; try again in a minute")
        if word == "block":
            self._closed.wait(30)
        for count, token_id in enumerate(self._tokens(word, rest), 1):
            if self._closed.wait(self._engine.delay_s) if self._engine.delay_s else self._closed.is_set():
                return
            yield self._token(token_id)
            if word == "break" and count == 3:
                raise RuntimeError("device lost")
            if count == self._max_tokens:
                self.finish_reason = "length"
                return
        yield from self._end()

    def _end(self) -> Iterator[GeneratedToken]:
        self.finish_reason = "stop"
        yield replace(self._token(self._engine.tokenizer.eos_token_id), is_end=True)

    def _tokens(self, word: str, rest: str) -> Iterator[int]:
        if word == "ids":
            yield from map(int, rest.split())
        elif word == "forever":
            while True:
                time.sleep(0.001)
                yield self._engine.tokenizer.encode("x")[0]
        else:
            yield from self._engine.tokenizer.encode(rest or "tea", add_special_tokens=False)

    def _token(self, token_id: int) -> GeneratedToken:
        wanted = self._sampling.num_logprobs
        if wanted is None:
            return GeneratedToken(token_id)
        others = [(token_id, -0.5), *((other, -2.0 - other) for other in range(300, 340)), (2, -math.inf)]
        return GeneratedToken(token_id, -0.5, tuple(others[:wanted]))
