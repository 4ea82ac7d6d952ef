"""Questions on a town's chunks: asked, rendered as chats, collected into a set, written to disk.

Gold answers come from `facts.Reading`, over the chunks in the given order. On disk a town is a text file for each
chunk, `sys_prompt.txt`, and `questions.jsonl`, whose lines are objects with `question` and `answers`; `chunks` are
the names of the chunk files it is asked on, in that order, `needs` those it can't be answered without; `kind` and
`detail` say what sort it is; `history` holds the turns before it. The chat is the same for training, evaluation and
these files.
"""

from __future__ import annotations

import itertools
import json
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kvarena.documents import QUESTIONS_NAME, SYSTEM_PROMPT_NAME, build_messages
from kvarena.synthetic_qa import words
from kvarena.synthetic_qa.facts import (
    PERSON_RELATIONS,
    RELATIONS,
    SAME_SUBJECT,
    STREET_RELATIONS,
    Chunk,
    Fact,
    Reading,
    Reference,
    chunk_text,
    read_chunks,
)

Kind = Literal["single", "across", "unanswerable", "followup"]
NOT_SAID = "The notes do not say."


@dataclass(frozen=True)
class AnsweredQuestion:
    question: str
    answer: str


@dataclass(frozen=True)
class Question:
    """`chunks` are the places of the chunks that it needs; `history` are the turns before it in the same chat.

    `detail` says more than `kind`: the link that has to be followed, or what sort of question it is.
    """

    question: str
    answer: str
    kind: Kind
    detail: str
    chunks: tuple[int, ...] = ()
    history: tuple[AnsweredQuestion, ...] = ()

    @property
    def turns(self) -> tuple[AnsweredQuestion, ...]:
        return (*self.history, AnsweredQuestion(self.question, self.answer))


class Quiz:
    """Asks about chunks as they stand in this order. What they say twice, and differently, isn't asked."""

    def __init__(self, chunks: Sequence[Chunk], rng: random.Random, num_wordings: int = 4) -> None:
        self._rng, self._num_wordings = rng, num_wordings
        self._reading: Reading = read_chunks(chunks)
        told = Counter((fact.subject, fact.relation) for fact in self._reading.facts)
        self._facts = [fact for fact in self._reading.facts if told[fact.subject, fact.relation] == 1]
        self._told = set(told)

    def all_facts(self) -> list[Question]:
        """Every fact once, in the order of the text."""
        return [self._about(fact) for fact in self._facts]

    def followups(self, count: int) -> list[Question]:
        """Two facts of the same person or shop; the second question doesn't name it."""
        by_subject: dict[Reference, list[Fact]] = {}
        for fact in self._facts:
            by_subject.setdefault(fact.subject, []).append(fact)
        pairs = [
            (first, second)
            for facts in by_subject.values()
            for first in facts
            for second in facts
            if first.relation != second.relation and _can_follow(first, second)
        ]
        return [self._followup(first, second) for first, second in self._rng.sample(pairs, min(count, len(pairs)))]

    def unanswerable(self, count: int) -> list[Question]:
        """About people of these chunks, and now and then others, of whom the chunks don't say it."""
        used = {name for _, name in self._told}
        relations = [relation for relation in (*PERSON_RELATIONS, *STREET_RELATIONS) if relation.name in used]
        known = list(self._reading.people)
        others = [person for person in words.PEOPLE if person not in self._reading.people]
        asked: dict[tuple[str, str], Question] = {}
        for _ in range(4 * count):
            if len(asked) == count or not relations or not known:
                break
            is_stranger = bool(others) and self._rng.random() < 0.3
            person, relation = self._rng.choice(others if is_stranger else known), self._rng.choice(relations)
            if (Reference("person", person), relation.name) not in self._told:
                question = self._rng.choice(relation.questions).format(s=person)
                detail = "unknown_person" if is_stranger else "unknown_fact"
                asked[person, relation.name] = Question(question, NOT_SAID, "unanswerable", detail)
        return list(asked.values())

    def _about(self, fact: Fact) -> Question:
        wordings = RELATIONS[fact.relation].questions[: self._num_wordings]
        question = self._rng.choice(wordings).format(s=_called(fact.subject), o=fact.bought)
        detail = f"same_{fact.link}" if fact.link and fact.link != "nickname" else fact.link or "plain"
        return Question(question, fact.value, "across" if fact.is_across else "single", detail, fact.chunks)

    def _followup(self, first: Fact, second: Fact) -> Question:
        before = self._about(first)
        phrases: tuple[str, ...] = SAME_SUBJECT[first.subject.category]
        if first.subject.category == "person":
            phrases = (words.pronoun(first.subject.name), words.pronoun(first.subject.name), "the same person")
        question = self._rng.choice(RELATIONS[second.relation].followups).format(p=self._rng.choice(phrases))
        chunks = tuple(sorted({*first.chunks, *second.chunks}))
        history = (AnsweredQuestion(before.question, before.answer),)
        detail = "across" if first.is_across or second.is_across else "single"
        return Question(question, second.value, "followup", detail, chunks, history)


def _can_follow(first: Fact, second: Fact) -> bool:
    """ "And when did she buy it?" needs the thing that was bought; whoever runs a shop would be "she" as well."""
    if first.subject.category == "nickname" or first.relation == "owner":
        return False
    if second.relation == "bought_on":
        return first.relation == "bought"
    return first.relation != "bought_on" and bool(RELATIONS[second.relation].followups)


def _called(subject: Reference) -> str:
    return subject.name if subject.category == "person" else f"the {subject.name}"


SYSTEM_PROMPT = "You answer questions about the town. Use only the notes below."
OTHER_SYSTEM_PROMPTS = (
    "You answer questions about a town from notes.",
    "Answer in one word from the notes. If they do not say it, say so.",
    "You are a helpful assistant.",
    "",
)
NOTE = "<note>"
SEPARATORS = (NOTE, "\n\n", " # # ", " ", "\n", "")
_SEPARATOR_WEIGHTS = (60, 14, 10, 8, 4, 4)


def messages(
    texts: Sequence[str], turns: Sequence[AnsweredQuestion], separator: str = NOTE, system: str = SYSTEM_PROMPT
) -> list[dict[str, str]]:
    """The chat up to the last turn's question; the answers before it are the gold ones."""
    chat = build_messages(system, texts, turns[0].question, separator)
    for before, turn in itertools.pairwise(turns):
        chat += [{"role": "assistant", "content": before.answer}, {"role": "user", "content": turn.question}]
    return chat


def random_separator(rng: random.Random) -> str:
    return rng.choices(SEPARATORS, _SEPARATOR_WEIGHTS)[0]


def random_system_prompt(rng: random.Random) -> str:
    return SYSTEM_PROMPT if rng.random() < 0.8 else rng.choice(OTHER_SYSTEM_PROMPTS)


KIND_SHARES: dict[Kind, float] = {"single": 0.4, "across": 0.35, "unanswerable": 0.1, "followup": 0.15}
_MAX_QUESTION_TRIES = 40


@dataclass(frozen=True)
class Item:
    """`context` are the places of chunks in the town; those that the question needs are `needs`, in context order."""

    question: Question
    context: tuple[int, ...]

    @property
    def needs(self) -> tuple[int, ...]:
        return tuple(self.context[place] for place in self.question.chunks)


def write_questions(town: Sequence[Chunk], rng: random.Random, num_questions: int, context_chunks: int) -> list[Item]:
    """Questions of all kinds in fixed shares, no two alike, the links of those across chunks in turn.

    Across chunks the context is a stretch of the town as it was written; else it is any chunks in any order. Fewer
    questions come back where the town has too little to ask.
    """
    if not 1 <= context_chunks <= len(town):
        raise ValueError(f"a context has 1 to {len(town)} chunks of this town, not {context_chunks}")
    return _QuestionSetWriter(town, rng, context_chunks).write(num_questions)


class _QuestionSetWriter:
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
        for _ in range(_MAX_QUESTION_TRIES):
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


def chunk_names(town: Sequence[Chunk]) -> list[str]:
    """A number and what the chunk names first, such as `03-elmgate`."""
    width = max(2, len(str(len(town))))
    return [f"{number:0{width}}-{_first_name(chunk)}" for number, chunk in enumerate(town, 1)]


def write_folder(folder: Path, town: Sequence[Chunk], items: Sequence[Item]) -> None:
    """Writes all files of a town into `folder`, which is made when it isn't there."""
    folder.mkdir(parents=True, exist_ok=True)
    names = chunk_names(town)
    for name, chunk in zip(names, town, strict=True):
        (folder / f"{name}.txt").write_text(chunk_text(chunk) + "\n", encoding="utf-8")
    (folder / SYSTEM_PROMPT_NAME).write_text(SYSTEM_PROMPT + "\n", encoding="utf-8")
    lines = [json.dumps(_record(item, names), ensure_ascii=False) for item in items]
    (folder / QUESTIONS_NAME).write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def _record(item: Item, names: Sequence[str]) -> dict[str, Any]:
    question = item.question
    record: dict[str, Any] = {
        "question": question.question,
        "answers": [question.answer],
        "kind": question.kind,
        "detail": question.detail,
        "chunks": [names[place] for place in item.context],
        "needs": [names[place] for place in item.needs],
    }
    if question.history:
        record["history"] = [{"question": turn.question, "answer": turn.answer} for turn in question.history]
    return record


def _first_name(chunk: Chunk) -> str:
    named = [reference.name for sentence in chunk for reference in sentence.names if reference.name]
    return re.sub(r"[^a-z0-9]+", "-", named[0].lower()) if named else "notes"
