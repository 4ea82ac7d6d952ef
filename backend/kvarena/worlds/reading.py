"""Reads chunks in the order given, as a careful person would: "the same shop" is the shop that was named last.

Gold answers come from here and from nowhere else, so they hold for any selection and order of chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from kvarena.worlds.relations import Category
from kvarena.worlds.sentence import Chunk, Claim, Reference, Sentence


@dataclass(frozen=True)
class Fact:
    """`chunks` are the places of the chunks it takes to know it, in order: with two, the second needs the first.

    `link` is the category of the reference that had to be resolved, empty where the fact stands in one sentence.
    """

    subject: Reference
    relation: str
    value: str
    chunks: tuple[int, ...]
    link: Category | None = None
    bought: str = ""

    @property
    def is_across(self) -> bool:
        return len(self.chunks) > 1


Named = tuple[str, int]
"""A name and the chunk that it stands in."""


@dataclass
class Reading:
    """What is known after the sentences read so far."""

    facts: list[Fact] = field(default_factory=list)
    people: dict[str, None] = field(default_factory=dict)
    nicknames: dict[str, Named] = field(default_factory=dict)
    _last: dict[Category, Named | None] = field(default_factory=dict)

    def read(self, sentence: Sentence, place: int) -> None:
        for claim in sentence.claims:
            self._learn(claim, place)
        for reference in sentence.names:
            self._remember(reference, place)

    def last(self, category: Category) -> Named | None:
        """What "the same" means now, and where it was named."""
        return self._last.get(category)

    def _remember(self, reference: Reference, place: int) -> None:
        if reference.category == "nickname":  # whoever goes by a nickname isn't "the same person" of anything
            self._last["person"] = None
            return
        self._last[reference.category] = (reference.name, place)
        if reference.category == "person":
            self.people[reference.name] = None

    def _learn(self, claim: Claim, place: int) -> None:
        value = self._resolve(claim.value, place) if isinstance(claim.value, Reference) else (claim.value, place)
        if claim.relation == "nickname" and value:
            self.nicknames.setdefault(claim.subject.name, value)
            subject: Named | None = (claim.subject.name, place)
        else:
            subject = self._resolve(claim.subject, place)
        if subject is None or value is None:
            return
        self.facts.append(
            Fact(
                Reference(_category(claim), subject[0]),
                claim.relation,
                value[0],
                tuple(sorted({subject[1], value[1], place})),
                _link(claim),
                claim.bought,
            )
        )

    def _resolve(self, reference: Reference, place: int) -> Named | None:
        if not reference.name:
            return self._last.get(reference.category)
        return self.nicknames.get(reference.name) if reference.category == "nickname" else (reference.name, place)


def _category(claim: Claim) -> Category:
    if claim.relation == "nickname":
        return "nickname"
    return "person" if claim.subject.category == "nickname" else claim.subject.category


def _link(claim: Claim) -> Category | None:
    if claim.relation == "nickname":
        return None
    if not claim.subject.name or claim.subject.category == "nickname":
        return claim.subject.category
    return claim.value.category if isinstance(claim.value, Reference) and not claim.value.name else None


def read_chunks(chunks: Sequence[Chunk]) -> Reading:
    reading = Reading()
    for place, chunk in enumerate(chunks):
        for sentence in chunk:
            reading.read(sentence, place)
    return reading
