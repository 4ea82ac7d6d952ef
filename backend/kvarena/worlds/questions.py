"""Questions on chunks in a given order, with gold answers from `reading`."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from kvarena.worlds import words
from kvarena.worlds.reading import Fact, Reading, read_chunks
from kvarena.worlds.relations import PERSON_RELATIONS, RELATIONS, SAME_SUBJECT, STREET_RELATIONS
from kvarena.worlds.sentence import Chunk, Reference

Kind = Literal["single", "across", "unanswerable", "followup"]
NOT_SAID = "The notes do not say."


@dataclass(frozen=True)
class Turn:
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
    history: tuple[Turn, ...] = ()

    @property
    def turns(self) -> tuple[Turn, ...]:
        return (*self.history, Turn(self.question, self.answer))


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
        history = (Turn(before.question, before.answer),)
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
