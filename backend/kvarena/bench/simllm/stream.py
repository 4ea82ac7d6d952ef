"""A stream of tasks of which a chosen share is similar to an earlier one: questions on chunks, as in a RAG system.

| task | its context | its question |
|---|---|---|
| new | chunks of a question of the exam; those of every second new task in another order | another one of the exam |
| same context | an earlier new task's chunks, in the same order | that question of the exam, as it is there |
| other order | an earlier new task's chunks, which stood there in another order | that question, as it is there |

No two new tasks have the same set of chunks while the exam has more. With half of the tasks similar, every new task has
one that is similar to it. Where there are more, further ones ask other questions on the same chunks, again in the same
or in another order. A question is only put on chunks that its gold answers hold for.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from kvarena.bench.quality.questions import EvalQuestion, Exam
from kvarena.context import TextChunk

TaskKind = Literal["new", "same context", "other order"]
Context = tuple[TextChunk, ...]


@dataclass(frozen=True)
class StreamTask:
    """`question.chunks` is the context. `earlier` is the place in the stream of the task that it is similar to."""

    question: EvalQuestion
    kind: TaskKind
    earlier: int | None = None


@dataclass(frozen=True)
class _Topic:
    """A new task that later ones may be similar to, and the question that its chunks were taken from."""

    place: int
    context: Context
    planned: EvalQuestion
    kind: TaskKind


def make_stream(exam: Exam, num_tasks: int, similar_ratio: float, seed: int = 0) -> list[StreamTask]:
    """Equal arguments make equal streams. Raises `ValueError` for a stream without tasks and a share that is none."""
    if num_tasks < 1:
        raise ValueError(f"a stream has 1 task or more, not {num_tasks}")
    if not 0 <= similar_ratio <= 1:
        raise ValueError(f"the share of similar tasks must be from 0 to 1, not {similar_ratio}")
    return _StreamMaker(exam, random.Random(seed)).make(num_tasks, min(round(num_tasks * similar_ratio), num_tasks - 1))


class _StreamMaker:
    def __init__(self, exam: Exam, rng: random.Random) -> None:
        self._exam, self._rng = exam, rng
        self._asked = Counter[str]()
        self._tasks: list[StreamTask] = []
        self._fresh: list[_Topic] = []
        self._used: list[_Topic] = []

    def make(self, num_tasks: int, num_similar: int) -> list[StreamTask]:
        """Similar tasks come in between, at chance distances, and while they can each have a new task of its own."""
        planned = self._planned_questions(num_tasks - num_similar)
        while len(self._tasks) < num_tasks:
            num_left = num_tasks - len(self._tasks)
            is_similar = self._rng.random() * num_left >= len(planned)
            if planned and not (is_similar and self._fresh):
                self._add_new(planned.pop())
            else:
                self._add_similar()
        return self._tasks

    def _planned_questions(self, count: int) -> list[EvalQuestion]:
        """In random order; those whose chunks no other has come first."""
        drawn = self._rng.sample(self._exam.questions, len(self._exam.questions))
        firsts = {frozenset(question.chunks): question for question in reversed(drawn)}
        ordered = [*firsts.values(), *(question for question in drawn if question not in firsts.values())]
        return [ordered[number % len(ordered)] for number in range(count)]

    def _add_new(self, planned: EvalQuestion) -> None:
        kind: TaskKind = "other order" if (len(self._fresh) + len(self._used)) % 2 else "same context"
        context = self._reordered(planned.chunks) if kind == "other order" else planned.chunks
        question = self._another(context, planned)
        if question is None:
            kind, question = "same context", planned
        topic = _Topic(len(self._tasks), question.chunks, planned, kind)
        self._fresh.append(topic)
        self._add(StreamTask(question, "new"))

    def _add_similar(self) -> None:
        if self._fresh:
            topic = self._fresh.pop(self._rng.randrange(len(self._fresh)))
            self._used.append(topic)
            question: EvalQuestion | None = topic.planned
        else:
            topic = self._rng.choice(self._used)
            context = self._reordered(topic.context) if topic.kind == "other order" else topic.context
            question = self._another(context, self._tasks[topic.place].question)
        self._add(StreamTask(question or topic.planned, topic.kind, topic.place))

    def _add(self, task: StreamTask) -> None:
        self._tasks.append(task)
        self._asked[task.question.question] += 1

    def _another(self, context: Context, than: EvalQuestion) -> EvalQuestion | None:
        """A question that this context answers, of those that were asked least; on this context."""
        others = [
            question
            for question in self._exam.questions
            if question.question != than.question and is_answered_by(question, context)
        ]
        self._rng.shuffle(others)
        least = min(others, key=lambda question: self._asked[question.question], default=None)
        return least and replace(least, chunks=context)

    def _reordered(self, context: Context) -> Context:
        if len(context) < 2:
            return context
        while (mixed := tuple(self._rng.sample(context, len(context)))) == context:
            pass
        return mixed


def is_answered_by(question: EvalQuestion, context: Sequence[TextChunk]) -> bool:
    """Whether the gold answers hold on this context: from the first chunk that the question needs to the last one, its
    chunks must stand there unbroken, for what "the same person" is depends on what stands before. Where a question
    doesn't say what it needs, that is all of its chunks.
    """
    own, names = [chunk.name for chunk in question.chunks], [chunk.name for chunk in context]
    needed = sorted(own.index(name) for name in question.needs) or [0, len(own) - 1]
    stretch = own[needed[0] : needed[-1] + 1]
    return any(names[start : start + len(stretch)] == stretch for start in range(len(names)))
