"""Every question put to every setup in turn, so that a slower minute meets all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from kvarena.bench.openai_server import NoAnswer
from kvarena.bench.quality.answers import Answer, Answerer, Messages
from kvarena.bench.quality.questions import Exam
from kvarena.bench.quality.setups import Setup

MAX_FAILURES_IN_A_ROW = 5

Outcome = Literal["answered", "unparsed", "failed"]


@dataclass(frozen=True)
class Attempt:
    """What became of a question. `failed`: no answer came, `reason` says why; `unparsed`: empty, or cut off."""

    setup: Setup
    question: int
    answer: Answer | None
    reason: str = ""

    @property
    def outcome(self) -> Outcome:
        if self.answer is None:
            return "failed"
        return "answered" if self.answer.is_complete and self.answer.text.strip() else "unparsed"


def ask_all(
    exam: Exam,
    setups: Sequence[Setup],
    answerers: Mapping[str, Answerer],
    separator: str,
    max_tokens: int,
    on_attempt: Callable[[Attempt], None],
) -> None:
    """`on_attempt` gets every outcome as it comes. Setups that do the same work share a question's answer.

    A contender that fails too often in a row isn't asked any more.
    """
    failures_in_a_row = Counter[str]()
    for number, question in enumerate(exam.questions):
        messages = question.messages(exam.system, separator)
        done: dict[Setup, Attempt] = {}
        for setup in [*setups[number % len(setups) :], *setups[: number % len(setups)]]:
            if setup.work not in done:
                answerer = answerers[setup.contender]
                done[setup.work] = _attempt(answerer, messages, setup, number, max_tokens, failures_in_a_row)
            on_attempt(replace(done[setup.work], setup=setup))


def _attempt(
    answerer: Answerer,
    messages: Messages,
    setup: Setup,
    number: int,
    max_tokens: int,
    failures_in_a_row: Counter[str],
) -> Attempt:
    if failures_in_a_row[answerer.name] >= MAX_FAILURES_IN_A_ROW:
        return Attempt(setup, number, None, f"not asked after {MAX_FAILURES_IN_A_ROW} failures in a row")
    try:
        answer = answerer.answer(messages, setup, max_tokens)
    except NoAnswer as error:
        failures_in_a_row[answerer.name] += 1
        return Attempt(setup, number, None, str(error))
    failures_in_a_row[answerer.name] = 0
    return Attempt(setup, number, answer)
