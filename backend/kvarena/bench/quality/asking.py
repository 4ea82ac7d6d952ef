"""The contract with whatever answers questions, and every question put to every variant in turn.

In turn, so that a slower minute of the machine meets all of them. Each answer is compared with full prefill's: how
close the next-token distributions along the answer are, on the same tokens before them. In this process that is
exact: full prefill's answer is fed to the other KV (teacher forcing), so every position is compared, over the whole
vocabulary. A server tells the likeliest tokens along its own answer alone, so the comparison ends where the answers
differ.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from kvarena.bench.quality.questions import QuestionSet
from kvarena.bench.variants import Variant
from kvarena.documents import TextChunk

if TYPE_CHECKING:
    import torch


Messages = Sequence[Mapping[str, str]]
NUM_LOGPROBS = 20
"""As many of a token's as OpenAI's API gives."""


class NoAnswer(Exception):
    """A question wasn't answered; the message says why."""


@dataclass(frozen=True)
class Reuse:
    """Tokens of a prompt by origin; the rest was computed as usual. Those of a prefix cache are among the reused.

    `unscored_chunks`: those without the scores that the policy goes by, so that it chose as it does without any.
    """

    num_prompt_tokens: int
    num_reused_tokens: int
    num_recomputed_tokens: int = 0
    num_prefix_tokens: int = 0
    unscored_chunks: int = 0

    @property
    def is_mostly_cached(self) -> bool:
        """Most of the prompt was in the server's own prefix cache, as when it was asked before."""
        return 2 * self.num_prefix_tokens > self.num_prompt_tokens

    @classmethod
    def of_report(cls, report: Mapping[str, Any]) -> Reuse:
        """Of a request report, which has of these counts what its contender knows."""
        return cls(**{name: int(report.get(name) or 0) for name in cls.__annotations__})


@dataclass(frozen=True)
class TokenLogprobs:
    """A token of an answer, as its text, and the likeliest ones at its place (nats)."""

    token: str
    top: Mapping[str, float]


@dataclass(frozen=True)
class GreedyAnswer:
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


@dataclass(frozen=True)
class Asking:
    """How all are asked. Setups are compared with the answers of `reference`, which is asked first.

    `compares_only`: nothing but that closeness is wanted of the others, so a contender that can compare without
    answering may leave the text empty.
    """

    separator: str
    max_tokens: int
    reference: Variant | None = None
    compares_only: bool = False


ComputeContexts = Callable[[Sequence[TextChunk], str, Callable[[int, int], None]], None]
"""Called with chunks, the separator, and who gets how many of how many contexts have been computed."""


class Answerer(Protocol):
    """A contender. `warm` and `answer` raise `NoAnswer`."""

    name: str
    is_blend: bool
    has_seams: bool
    """Whether it takes chunks as they are after the chunk before them."""
    separator: str | None
    """What it cuts chunks at, or its model's profile says; None where nothing is known."""
    sinks: Sequence[int]
    """The `sink_tokens` that a variant may have here, its own first; none where nothing is known of them."""
    num_layers: int | None
    model_folder: Path | None
    """The served model's, where it is one on this machine."""

    def warm(self, chunks: Sequence[TextChunk], separator: str, on_chunk: Callable[[], None]) -> None:
        """Has the KV of these chunks ready where the contender keeps any."""
        ...

    def score(self, chunks: Sequence[TextChunk], separator: str, on_prompt: Callable[[int, int], None]) -> None:
        """And the scores of their tokens. `on_prompt` gets how many of how many contexts have been computed."""
        ...

    def make_seams(self, chunks: Sequence[TextChunk], separator: str, on_prompt: Callable[[int, int], None]) -> None:
        """And each chunk as it is after the one before it."""
        ...

    def answer(
        self, messages: Messages, variant: Variant, asking: Asking, full: GreedyAnswer | None = None
    ) -> GreedyAnswer:
        """`full` is full prefill's answer, to be compared with along its tokens; None where this is to become it."""
        ...

    def describe(self) -> dict[str, object]:
        """What goes into the result file's settings."""
        ...

    def close(self) -> None: ...


KLMethod = Literal["teacher_forced", "common_prefix_top20"]
_LEAST_PROBABILITY = 1e-9


@dataclass(frozen=True)
class Closeness:
    """`kl` is KL(full prefill || this) in nats, the mean over `num_tokens` positions; `first_kl` that of the first one.

    `token_agreement` is the share of full prefill's tokens at which this one's likeliest token is the same; with
    `common_prefix_top20` of those before the first other one, which is a lower bound.
    """

    kl: float
    first_kl: float
    token_agreement: float
    num_tokens: int
    method: KLMethod


def closeness(full: GreedyAnswer, other: GreedyAnswer) -> Closeness | None:
    """None where an answer has nothing to compare by."""
    if full.forced_logprobs is not None and other.forced_logprobs is not None:
        return _teacher_forced(full.forced_logprobs, other.forced_logprobs)
    if full.logprobs and other.logprobs:
        return _along_common_prefix(full.logprobs, other.logprobs)
    return None


def _teacher_forced(full: torch.Tensor, other: torch.Tensor) -> Closeness:
    kl = full_kl(full, other)
    agreement = (full.argmax(-1) == other.argmax(-1)).float().mean()
    return Closeness(float(kl.mean()), float(kl[0]), float(agreement), len(kl), "teacher_forced")


def _along_common_prefix(full: Sequence[TokenLogprobs], other: Sequence[TokenLogprobs]) -> Closeness:
    """The first tokens that differ have the same ones before them, so they count too."""
    pairs = list(zip(full, other, strict=False))
    num_same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0].token == pair[1].token, pairs))
    kl = [top_kl(mine.top, others.top) for mine, others in pairs[: num_same + 1]]
    return Closeness(sum(kl) / len(kl), kl[0], num_same / len(full), len(kl), "common_prefix_top20")


def full_kl(full: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """KL(full || other) `(T,)` in nats of log-probabilities `(T, V)`."""
    from torch.nn.functional import kl_div

    return kl_div(other, full, reduction="none", log_target=True).sum(-1).clamp(min=0)


def top_kl(full: Mapping[str, float], other: Mapping[str, float]) -> float:
    """KL(full || other) in nats over the tokens that both list, everything else as one outcome.

    Taking outcomes together can only lower the divergence, so this is a lower bound of that of all tokens.
    """
    shared = sorted(full.keys() & other.keys())
    p = [math.exp(full[token]) for token in shared]
    q = [math.exp(other[token]) for token in shared]
    pairs = zip([*p, 1 - sum(p)], [*q, 1 - sum(q)], strict=True)
    floored = [(max(a, _LEAST_PROBABILITY), max(b, _LEAST_PROBABILITY)) for a, b in pairs]
    return max(0.0, sum(a * math.log(a / b) for a, b in floored))


MAX_FAILURES_IN_A_ROW = 5

Outcome = Literal["answered", "failed"]


@dataclass(frozen=True)
class Attempt:
    """What became of a question. `failed`: no answer came, `reason` says why. `closeness` is that to full prefill."""

    variant: Variant
    question: int
    answer: GreedyAnswer | None
    reason: str = ""
    closeness: Closeness | None = None

    @property
    def outcome(self) -> Outcome:
        return "failed" if self.answer is None else "answered"


def ask_all(
    question_set: QuestionSet,
    variants: Sequence[Variant],
    answerers: Mapping[str, Answerer],
    asking: Asking,
    on_attempt: Callable[[Attempt], None],
    numbers: Sequence[int] | None = None,
) -> None:
    """`on_attempt` gets every outcome as it comes. Setups that do the same work share a question's answer.

    `numbers` are the places of the questions to ask, all by default. Distributions are compared at once and not kept:
    those of full prefill's answer are in memory for one question at a time. A contender that fails too often in a row
    isn't asked any more.
    """
    failures_in_a_row = Counter[str]()
    for number in range(len(question_set.questions)) if numbers is None else numbers:
        messages = question_set.questions[number].messages(question_set.system, asking.separator)
        done: dict[Variant, Attempt] = {}
        full: GreedyAnswer | None = None
        for variant in _in_turn(variants, asking.reference, number):
            if variant.work not in done:
                attempt = _attempt(
                    answerers[variant.contender], messages, variant, number, asking, full, failures_in_a_row
                )
                if variant == asking.reference:
                    full = attempt.answer
                done[variant.work] = _compared(attempt, full)
            on_attempt(replace(done[variant.work], variant=variant))


def _in_turn(variants: Sequence[Variant], reference: Variant | None, number: int) -> list[Variant]:
    """The reference first; each of the others stands in every place once."""
    others = [variant for variant in variants if variant != reference]
    start = number % len(others) if others else 0
    return [*([reference] if reference in variants and reference else []), *others[start:], *others[:start]]


def _compared(attempt: Attempt, full: GreedyAnswer | None) -> Attempt:
    """With its closeness in place of the distributions, which are large."""
    if attempt.answer is None:
        return attempt
    found = closeness(full, attempt.answer) if full else None
    return replace(attempt, answer=replace(attempt.answer, logprobs=(), forced_logprobs=None), closeness=found)


def _attempt(
    answerer: Answerer,
    messages: Messages,
    variant: Variant,
    number: int,
    asking: Asking,
    full: GreedyAnswer | None,
    failures_in_a_row: Counter[str],
) -> Attempt:
    if failures_in_a_row[answerer.name] >= MAX_FAILURES_IN_A_ROW:
        return Attempt(variant, number, None, f"not asked after {MAX_FAILURES_IN_A_ROW} failures in a row")
    try:
        answer = answerer.answer(messages, variant, asking, full)
    except NoAnswer as error:
        failures_in_a_row[answerer.name] += 1
        return Attempt(variant, number, None, str(error))
    failures_in_a_row[answerer.name] = 0
    return Attempt(variant, number, answer)
