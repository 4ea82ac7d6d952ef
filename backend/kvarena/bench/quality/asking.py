"""Every question put to every setup in turn, so that a slower minute meets all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from kvarena.bench.quality.answers import Answer, Answerer, NoAnswer
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
    on_answer: Callable[[Attempt], None],
) -> None:
    """`on_answer` gets every outcome as it comes. A contender that fails too often in a row isn't asked any more."""
    failures_in_a_row = Counter[str]()
    for number, question in enumerate(exam.questions):
        messages = question.messages(exam.system, separator)
        for setup in [*setups[number % len(setups) :], *setups[: number % len(setups)]]:
            if failures_in_a_row[setup.contender] >= MAX_FAILURES_IN_A_ROW:
                on_answer(Attempt(setup, number, None, f"not asked after {MAX_FAILURES_IN_A_ROW} failures in a row"))
                continue
            try:
                answer = answerers[setup.contender].answer(messages, setup, max_tokens)
                failures_in_a_row[setup.contender] = 0
                on_answer(Attempt(setup, number, answer))
            except NoAnswer as error:
                failures_in_a_row[setup.contender] += 1
                on_answer(Attempt(setup, number, None, str(error)))
