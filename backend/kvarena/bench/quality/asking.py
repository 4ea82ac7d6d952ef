"""Every question put to every setup in turn, so that a slower minute meets all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from kvarena.bench.openai_server import NoAnswer
from kvarena.bench.quality.answers import Answer, Answerer, Messages
from kvarena.bench.quality.closeness import Closeness, closeness
from kvarena.bench.quality.questions import Exam
from kvarena.bench.quality.setups import Setup

MAX_FAILURES_IN_A_ROW = 5

Outcome = Literal["answered", "failed"]


@dataclass(frozen=True)
class Attempt:
    """What became of a question. `failed`: no answer came, `reason` says why. `closeness` is that to full prefill."""

    setup: Setup
    question: int
    answer: Answer | None
    reason: str = ""
    closeness: Closeness | None = None

    @property
    def outcome(self) -> Outcome:
        return "failed" if self.answer is None else "answered"


@dataclass(frozen=True)
class Asking:
    """How all are asked. Setups are compared with the answers of `reference`, which is asked first.

    `compares_only`: nothing but that closeness is wanted of the others.
    """

    separator: str
    max_tokens: int
    reference: Setup | None = None
    compares_only: bool = False


def ask_all(
    exam: Exam,
    setups: Sequence[Setup],
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
    for number in range(len(exam.questions)) if numbers is None else numbers:
        messages = exam.questions[number].messages(exam.system, asking.separator)
        done: dict[Setup, Attempt] = {}
        full: Answer | None = None
        for setup in _in_turn(setups, asking.reference, number):
            if setup.work not in done:
                attempt = _attempt(answerers[setup.contender], messages, setup, number, asking, full, failures_in_a_row)
                if setup == asking.reference:
                    full = attempt.answer
                done[setup.work] = _compared(attempt, full)
            on_attempt(replace(done[setup.work], setup=setup))


def _in_turn(setups: Sequence[Setup], reference: Setup | None, number: int) -> list[Setup]:
    """The reference first; each of the others stands in every place once."""
    others = [setup for setup in setups if setup != reference]
    start = number % len(others) if others else 0
    return [*([reference] if reference in setups and reference else []), *others[start:], *others[:start]]


def _compared(attempt: Attempt, full: Answer | None) -> Attempt:
    """With its closeness in place of the distributions, which are large."""
    if attempt.answer is None:
        return attempt
    found = closeness(full, attempt.answer) if full else None
    return replace(attempt, answer=replace(attempt.answer, logprobs=(), forced_logprobs=None), closeness=found)


def _attempt(
    answerer: Answerer,
    messages: Messages,
    setup: Setup,
    number: int,
    asking: Asking,
    full: Answer | None,
    failures_in_a_row: Counter[str],
) -> Attempt:
    if failures_in_a_row[answerer.name] >= MAX_FAILURES_IN_A_ROW:
        return Attempt(setup, number, None, f"not asked after {MAX_FAILURES_IN_A_ROW} failures in a row")
    compares_only = asking.compares_only and full is not None
    try:
        answer = answerer.answer(messages, setup, asking.max_tokens, full, compares_only)
    except NoAnswer as error:
        failures_in_a_row[answerer.name] += 1
        return Attempt(setup, number, None, str(error))
    failures_in_a_row[answerer.name] = 0
    return Attempt(setup, number, answer)
