"""A set of questions on a town, each with the chunks that it is asked on, in their order."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from kvarena.worlds.questions import Kind, Question, Quiz
from kvarena.worlds.sentence import Chunk

KIND_SHARES: dict[Kind, float] = {"single": 0.4, "across": 0.35, "unanswerable": 0.1, "followup": 0.15}
_MAX_TRIES = 40


@dataclass(frozen=True)
class Item:
    """`context` are the places of chunks in the town; those that the question needs are `needs`, in context order."""

    question: Question
    context: tuple[int, ...]

    @property
    def needs(self) -> tuple[int, ...]:
        return tuple(self.context[place] for place in self.question.chunks)


def write_exam(town: Sequence[Chunk], rng: random.Random, num_questions: int, context_chunks: int) -> list[Item]:
    """Questions of all kinds in fixed shares, no two alike, the links of those across chunks in turn.

    Across chunks the context is a stretch of the town as it was written; else it is any chunks in any order. Fewer
    questions come back where the town has too little to ask.
    """
    if not 1 <= context_chunks <= len(town):
        raise ValueError(f"a context has 1 to {len(town)} chunks of this town, not {context_chunks}")
    return _Examiner(town, rng, context_chunks).write(num_questions)


class _Examiner:
    def __init__(self, town: Sequence[Chunk], rng: random.Random, context_chunks: int) -> None:
        self._town, self._rng, self._size = town, rng, context_chunks
        self._asked: set[tuple[str, str]] = set()
        self._details: dict[str, int] = {}

    def write(self, num_questions: int) -> list[Item]:
        items: list[Item] = []
        for kind in _spread(KIND_SHARES, num_questions):
            item = self._ask(kind) or self._ask("single")
            if item:
                items.append(item)
        return items

    def _ask(self, kind: Kind) -> Item | None:
        for _ in range(_MAX_TRIES):
            context = self._context(is_stretch=kind == "across")
            quiz = Quiz([self._town[place] for place in context], self._rng)
            if question := self._pick(self._questions(quiz, kind)):
                self._asked.add((question.turns[0].question, question.question))
                self._details[question.detail] = self._details.get(question.detail, 0) + 1
                return Item(question, context)
        return None

    def _context(self, is_stretch: bool) -> tuple[int, ...]:
        if is_stretch:
            start = self._rng.randint(0, len(self._town) - self._size)
            return tuple(range(start, start + self._size))
        return tuple(self._rng.sample(range(len(self._town)), self._size))

    def _questions(self, quiz: Quiz, kind: Kind) -> list[Question]:
        if kind == "unanswerable":
            return quiz.unanswerable(2)
        if kind == "followup":
            return quiz.followups(2)
        return [question for question in quiz.all_facts() if question.kind == kind]

    def _pick(self, questions: list[Question]) -> Question | None:
        """A new one, of a detail that was asked least."""
        self._rng.shuffle(questions)
        new = [asked for asked in questions if (asked.turns[0].question, asked.question) not in self._asked]
        return min(new, key=lambda asked: self._details.get(asked.detail, 0), default=None)


def _spread(shares: dict[Kind, float], count: int) -> list[Kind]:
    """Kinds in their shares, evenly mixed."""
    taken = dict.fromkeys(shares, 0)
    kinds: list[Kind] = []
    for number in range(1, count + 1):
        kind = max(shares, key=lambda kind: shares[kind] * number - taken[kind])
        taken[kind] += 1
        kinds.append(kind)
    return kinds
