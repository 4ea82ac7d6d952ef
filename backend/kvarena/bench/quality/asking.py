"""The contract with whatever answers questions, and every question put to every variant.

The variants take turns, so that a slower minute of the machine meets all of them. Each answer is compared with full
prefill's: how close the next-token distributions along it are, after the same tokens. In this process that is exact:
full prefill's answer is fed to the other KV (teacher forcing), so every position is compared, over the whole
vocabulary. A server only tells the likeliest tokens along its own answer, so the comparison ends where the answers
differ.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from kvarena.bench.measure import Reuse, in_turn
from kvarena.bench.quality.questions import QuestionSet
from kvarena.bench.variants import Variant
from kvarena.documents import TextChunk

if TYPE_CHECKING:
    import torch


Messages = Sequence[Mapping[str, str]]
NUM_LOGPROBS = 20
"""The most that OpenAI's API gives for a token."""


class NoAnswer(Exception):
    """A question wasn't answered; the message says why."""


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
    """How all are asked. Variants are compared with the answers of `reference`, which is asked first.

    `compares_only`: only that closeness is wanted, so a contender that can compare without answering may leave the
    text empty.
    """

    separator: str
    max_tokens: int
    reference: Variant | None = None
    compares_only: bool = False


InContexts = Literal["scores", "seams"]
"""The scores of chunks' tokens, and each chunk as it is after the one before it."""


class Answerer(ABC):
    """A contender. `warm`, `compute` and `answer` raise `NoAnswer`. This one keeps nothing of chunks."""

    name: str
    is_blend = False
    has_seams = False
    """Whether it takes chunks as they are after the chunk before them."""
    separator: str | None = None
    """Where it cuts chunks, or what its model's profile says; None where neither is known."""
    sinks: Sequence[int] = ()
    """The `sink_tokens` that a variant may have here, its own first; empty where that isn't known."""
    num_layers: int | None = None
    model_folder: Path | None = None
    """Of the served model, where it is on this machine."""

    def warm(self, chunks: Sequence[TextChunk], separator: str, on_chunk: Callable[[], None]) -> None:
        """Makes the KV of these chunks ready, where the contender keeps any."""
        return

    def compute(
        self, what: InContexts, chunks: Sequence[TextChunk], separator: str, on_prompt: Callable[[int, int], None]
    ) -> None:
        """Then what needs chunks in contexts. `on_prompt` gets how many of how many contexts are computed."""
        return

    @abstractmethod
    def answer(
        self, messages: Messages, variant: Variant, asking: Asking, full: GreedyAnswer | None = None
    ) -> GreedyAnswer:
        """`full` is full prefill's answer, to be compared with along its tokens; None where this is to become it."""

    @abstractmethod
    def describe(self) -> dict[str, object]:
        """As it goes into the result file's settings."""

    def close(self) -> None:
        """Gives back what it holds."""
        return


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
        kl = full_kl(full.forced_logprobs, other.forced_logprobs)
        agreement = (full.forced_logprobs.argmax(-1) == other.forced_logprobs.argmax(-1)).float().mean()
        return Closeness(float(kl.mean()), float(kl[0]), float(agreement), len(kl), "teacher_forced")
    if full.logprobs and other.logprobs:
        num_same = common_prefix([one.token for one in full.logprobs], [one.token for one in other.logprobs])
        # The first tokens that differ have the same ones before them, so they count too.
        pairs = list(zip(full.logprobs, other.logprobs, strict=False))[: num_same + 1]
        kls = [top_kl(mine.top, others.top) for mine, others in pairs]
        return Closeness(sum(kls) / len(kls), kls[0], num_same / len(full.logprobs), len(kls), "common_prefix_top20")
    return None


def common_prefix(tokens: Sequence[object], others: Sequence[object]) -> int:
    """The number of tokens before the first that differs."""
    pairs = zip(tokens, others, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


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


@dataclass(frozen=True)
class Attempt:
    """What became of a question; where no answer came, `reason` says why. `closeness` is that to full prefill."""

    variant: Variant
    question: int
    answer: GreedyAnswer | None
    reason: str = ""
    closeness: Closeness | None = None

    @property
    def outcome(self) -> str:
        return "failed" if self.answer is None else "answered"


def ask_all(
    question_set: QuestionSet,
    variants: Sequence[Variant],
    answerers: Mapping[str, Answerer],
    asking: Asking,
    on_attempt: Callable[[Attempt], None],
    numbers: Sequence[int] | None = None,
) -> None:
    """`on_attempt` gets every attempt as it comes. Variants that do the same work share a question's answer.

    `numbers` are the places of the questions to ask, all by default. Distributions are compared at once and not kept:
    only those of full prefill's answer to the present question are in memory. A contender that fails too often in a
    row isn't asked any more.
    """
    failures_in_a_row = Counter[str]()

    def attempt(variant: Variant, number: int, full: GreedyAnswer | None) -> Attempt:
        name = variant.contender
        if failures_in_a_row[name] >= MAX_FAILURES_IN_A_ROW:
            return Attempt(variant, number, None, f"not asked after {MAX_FAILURES_IN_A_ROW} failures in a row")
        messages = question_set.questions[number].messages(question_set.system, asking.separator)
        try:
            answer = answerers[name].answer(messages, variant, asking, full)
        except NoAnswer as error:
            failures_in_a_row[name] += 1
            return Attempt(variant, number, None, str(error))
        failures_in_a_row[name] = 0
        return Attempt(variant, number, answer)

    for number in range(len(question_set.questions)) if numbers is None else numbers:
        done: dict[Variant, Attempt] = {}
        full: GreedyAnswer | None = None
        others = [variant for variant in variants if variant != asking.reference]
        reference = [variant for variant in variants if variant == asking.reference][:1]
        for variant in [*reference, *in_turn(others, number)]:
            if variant.work not in done:
                found = attempt(variant, number, full)
                if variant == asking.reference:
                    full = found.answer
                done[variant.work] = _compared(found, full)
            on_attempt(replace(done[variant.work], variant=variant))


def _compared(attempt: Attempt, full: GreedyAnswer | None) -> Attempt:
    """With its closeness in place of the distributions, which are large."""
    if attempt.answer is None:
        return attempt
    found = closeness(full, attempt.answer) if full else None
    return replace(attempt, answer=replace(attempt.answer, logprobs=(), forced_logprobs=None), closeness=found)
