"""One chat over an engine in this process: asks, keeps what every turn cost, and says it in a line."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from ai100.engine import AI100Engine
from ai100.options import AI100Options
from ai100.slots import Status
from kvarena.api.engine import GenerationRequest, Sampling
from kvarena.api.text_stream import StopRule, TextStream

TAGS = {
    Status.NEW_TOPIC: "NEW",
    Status.INCREMENTAL_PREFILL: "INCR",
    Status.RESET_TOPIC: "RESET",
    Status.FULL_PREFILL: "FULL",
}


@dataclass(frozen=True)
class Reply:
    """An answer. `details` are the engine's; times in milliseconds as the caller saw them."""

    question: str
    text: str
    first_token_ms: float
    total_ms: float
    num_tokens: int
    num_prompt_tokens: int
    details: dict[str, Any]

    @property
    def line(self) -> str:
        """`[INCR] Slot 0 | Turn 2 | Prefilled 8 tokens | ...`"""
        told, timings = self.details, self.details["timings"]
        return " | ".join(
            [
                f"[{TAGS[told['status']]}] Slot {told['slot']}",
                f"Turn {told['turn']}",
                f"Prefilled {told['num_prefilled_tokens']} tokens",
                f"First token {self.first_token_ms:,.0f} ms",
                f"Prefill {timings['prefill_ms']:,.0f} ms",
                f"Decode {timings['decode_ms']:,.0f} ms",
                f"Total {self.total_ms:,.0f} ms",
            ]
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "question": self.question,
            "answer": self.text,
            "first_token_ms": round(self.first_token_ms, 3),
            "total_ms": round(self.total_ms, 3),
            "num_prompt_tokens": self.num_prompt_tokens,
            **self.details,
        }


@dataclass
class ChatSession:
    """A conversation of its own; the engine remembers what was said in it, and adds notes where it has some."""

    engine: AI100Engine
    use_cache: bool = True
    replies: list[Reply] = field(default_factory=list)
    _name: str = field(default_factory=lambda: uuid.uuid4().hex)

    def ask(self, question: str, on_text: Callable[[str], None] = lambda text: None) -> Reply:
        """Greedy. `on_text` gets the answer's text as it comes. Raises `ValueError` for what can't be served and
        `EngineUnavailable`; the chat goes on after both.
        """
        generation = self.engine.generate(self._request(question))
        started_s, first_s = perf_counter(), 0.0
        text: TextStream | None = None
        said: list[str] = []
        num_tokens = 0
        try:
            for token in generation:
                first_s = first_s or perf_counter()
                num_tokens += 1
                text = text or TextStream(self.engine.tokenizer, generation.prompt_token_ids, StopRule())
                said.append(text.push(token).text)
                on_text(said[-1])
        finally:
            generation.close()
        ended_s = perf_counter()
        reply = Reply(
            question,
            "".join(said),
            1e3 * ((first_s or ended_s) - started_s),
            1e3 * (ended_s - started_s),
            num_tokens,
            generation.report.num_prompt_tokens,
            {**generation.report.texts, **generation.report.details},
        )
        self.replies.append(reply)
        return reply

    def _request(self, question: str) -> GenerationRequest:
        return GenerationRequest(
            request_id=uuid.uuid4().hex,
            prompt="",
            sampling=Sampling(temperature=0.0),
            add_special_tokens=False,
            messages=({"role": "user", "content": question},),
            conversation_id=self._name,
            options=AI100Options(use_cache=self.use_cache),
        )
