"""The contract with whatever answers questions, and what an answer is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from kvarena.bench.quality.setups import Setup
from kvarena.context import TextChunk

if TYPE_CHECKING:
    import torch

Messages = Sequence[Mapping[str, str]]
NUM_LOGPROBS = 20
"""As many of a token's as OpenAI's API gives."""


@dataclass(frozen=True)
class Reuse:
    """Tokens of a prompt by origin; the rest was computed as usual. Those of a prefix cache are among the reused."""

    num_prompt_tokens: int
    num_reused_tokens: int
    num_recomputed_tokens: int = 0
    num_prefix_tokens: int = 0


@dataclass(frozen=True)
class TokenLogprobs:
    """A token of an answer, as its text, and the likeliest ones at its place (nats)."""

    token: str
    top: Mapping[str, float]


@dataclass(frozen=True)
class Answer:
    """A greedy answer. `is_complete`: it ended by itself; else it is cut.

    Of a server's answer there are `logprobs`, one for each token. Of one in this process there are `token_ids`, the end
    token among them where it came, and `forced_logprobs` `(T, V)`, float32: the whole distributions of the next token
    along full prefill's answer (its own where it is full prefill's), from the first token on.
    """

    text: str
    is_complete: bool
    ttft_ms: float
    reuse: Reuse | None = None
    logprobs: Sequence[TokenLogprobs] = ()
    token_ids: Sequence[int] = ()
    forced_logprobs: torch.Tensor | None = None


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

    def answer(
        self,
        messages: Messages,
        setup: Setup,
        max_tokens: int,
        full: Answer | None = None,
        compares_only: bool = False,
    ) -> Answer:
        """`full` is full prefill's answer, to be compared with along its tokens; None where this is to become it.

        `compares_only`: what it would answer itself isn't wanted, so a contender that can compare without answering
        may leave the text empty.
        """
        ...

    def describe(self) -> dict[str, object]:
        """What goes into the result file's settings."""
        ...

    def close(self) -> None: ...
