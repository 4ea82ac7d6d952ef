"""The contract with whatever answers questions, and what an answer is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from kvarena.bench.quality.setups import Setup
from kvarena.context import TextChunk

Messages = Sequence[Mapping[str, str]]
NUM_LOGPROBS = 20
"""As many of the first token's as OpenAI's API gives."""


@dataclass(frozen=True)
class Reuse:
    """Tokens of a prompt by origin; the rest was computed as usual. Those of a prefix cache are among the reused."""

    num_prompt_tokens: int
    num_reused_tokens: int
    num_recomputed_tokens: int = 0
    num_prefix_tokens: int = 0


@dataclass(frozen=True)
class Answer:
    """A greedy answer. `is_complete`: it ended by itself. `first_logprobs` are the likeliest first tokens' (nats)."""

    text: str
    is_complete: bool
    ttft_ms: float
    reuse: Reuse | None = None
    first_logprobs: Mapping[str, float] | None = None


class Answerer(Protocol):
    """A contender. `warm` and `answer` raise `NoAnswer`."""

    name: str
    is_blend: bool
    separator: str | None
    """What it cuts chunks at, or its model's profile says; None where nothing is known."""
    num_layers: int | None
    model_folder: Path | None
    """The served model's, where it is one on this machine."""

    def warm(self, chunks: Sequence[TextChunk], separator: str, on_chunk: Callable[[], None]) -> None:
        """Has the KV of these chunks ready where the contender keeps any."""
        ...

    def answer(self, messages: Messages, setup: Setup, max_tokens: int) -> Answer: ...

    def describe(self) -> dict[str, object]:
        """What goes into the result file's settings."""
        ...

    def close(self) -> None: ...
