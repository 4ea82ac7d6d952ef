"""Writes a town, chunk by chunk: fresh random facts, some of which need an earlier chunk to be understood.

A chunk opens, with probability `across_ratio`, with sentences on "the same person", "the same shop", "the same
street" or "the same day" whose referent stands in an earlier chunk. Alone such a chunk can't be understood, and
other chunks name other people, so guessing fails.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from kvarena.synthetic_qa import words
from kvarena.synthetic_qa.facts import (
    BOUGHT_ON,
    DAY_HEADERS,
    NICKNAME_DEFINITIONS,
    PERSON_RELATIONS,
    SAME_SUBJECT,
    SHOP_RELATIONS,
    STREET_HEADERS,
    STREET_RELATIONS,
    Category,
    Chunk,
    Claim,
    Reading,
    Reference,
    Relation,
    Sentence,
)
from kvarena.synthetic_qa.words import sentence_case, with_article

LINKS: tuple[Category, ...] = ("person", "shop", "street", "day", "nickname")
DEFAULT_LINKS: tuple[Category, ...] = ("person", "shop", "street")
"""Without days and nicknames: they are what a small model learns last."""
_TOKENS_PER_FACT = 8.0
_MAX_TRIES = 60


@dataclass(frozen=True)
class TownShape:
    """`chunk_tokens` counts words and punctuation marks; a chunk has 0.7 to 1.3 times as many.

    `num_relations` is how many kinds of things are told about people: with few, names matter most. `links` are the
    kinds of references that are used. `num_wordings` is in how many ways a thing about a person may be put.
    """

    num_chunks: int
    chunk_tokens: int
    num_relations: int = 6
    across_ratio: float = 0.6
    links: tuple[Category, ...] = DEFAULT_LINKS
    num_wordings: int = 4

    def __post_init__(self) -> None:
        if self.num_chunks < 1 or self.chunk_tokens < 8:
            raise ValueError(f"a town has at least 1 chunk of 8 tokens, not {self.num_chunks} of {self.chunk_tokens}")
        if not 1 <= self.num_relations <= len(PERSON_RELATIONS):
            raise ValueError(f"num_relations must be 1 to {len(PERSON_RELATIONS)}, not {self.num_relations}")
        if unknown := set(self.links) - set(LINKS):
            raise ValueError(f"links must be of {', '.join(LINKS)}, not {', '.join(sorted(unknown))}")


def count_words(text: str) -> int:
    """Words and punctuation marks; about the town tokenizer's tokens."""
    return len(re.findall(r"\w+|[^\w\s]", text))


def write_town(rng: random.Random, shape: TownShape) -> list[Chunk]:
    writer = _Writer(rng, shape)
    return [writer.write_chunk(place) for place in range(shape.num_chunks)]


@dataclass
class _Writer:
    rng: random.Random
    shape: TownShape
    _reading: Reading = field(default_factory=Reading)
    _taken: set[tuple[str, str]] = field(default_factory=set)
    _pools: dict[str, list[str]] = field(default_factory=dict)
    _place: int = 0
    _street_is_headed: bool = False

    def __post_init__(self) -> None:
        rng, shape = self.rng, self.shape
        num_facts = shape.num_chunks * shape.chunk_tokens / _TOKENS_PER_FACT
        num_people = int(num_facts / (shape.num_relations + 1) * rng.uniform(0.9, 1.9))
        self._people = rng.sample(words.PEOPLE, max(4, min(len(words.PEOPLE), num_people)))
        self._shops = rng.sample(words.SHOPS, max(2, min(len(words.SHOPS), int(num_facts / 12))))
        self._relations = rng.sample(PERSON_RELATIONS, shape.num_relations)
        self._kinds = self._weighted_kinds()

    def _weighted_kinds(self) -> tuple[list[Callable[[], Sentence | None]], list[float]]:
        links = self.shape.links
        kinds: list[tuple[Callable[[], Sentence | None], float, bool]] = [
            (self._about_person, 0.38, True),
            (self._about_same_person, 0.07, "person" in links),
            (self._about_shop, 0.16, "shop" in links),
            (self._about_same_shop, 0.05, "shop" in links),
            (self._on_street, 0.04, "street" in links),
            (self._street_header, 0.03, "street" in links),
            (self._on_same_street, 0.06, "street" in links),
            (self._on_day, 0.05, "day" in links),
            (self._day_header, 0.03, "day" in links),
            (self._on_same_day, 0.06, "day" in links),
            (self._nickname, 0.04, "nickname" in links),
            (self._about_nickname, 0.06, "nickname" in links),
            (self._filler, 0.04, True),
        ]
        used = [(kind, weight) for kind, weight, wanted in kinds if wanted]
        return [kind for kind, _ in used], [weight for _, weight in used]

    def write_chunk(self, place: int) -> Chunk:
        self._place = place
        wanted = max(8, int(self.shape.chunk_tokens * self.rng.uniform(0.7, 1.3)))
        sentences: list[Sentence] = []
        num_tokens = 0
        for sentence in self._opening() if place else []:
            sentences.append(sentence)
            num_tokens += count_words(sentence.text)
        kinds, weights = self._kinds
        tries = 0
        while num_tokens < wanted:
            tries += 1
            kind = self.rng.choices(kinds, weights)[0] if tries < _MAX_TRIES else self._filler
            sentence_or_none = kind()
            if sentence_or_none:
                sentences.append(sentence_or_none)
                num_tokens += count_words(sentence_or_none.text)
                self._reading.read(sentence_or_none, place)
        return tuple(sentences)

    def _opening(self) -> list[Sentence]:
        """One or two sentences each for some of the links; people first, for the others name people."""
        if self.rng.random() >= self.shape.across_ratio:
            return []
        makers: dict[Category, Callable[[], Sentence | None]] = {
            "person": self._about_same_person,
            "shop": self._about_same_shop,
            "street": self._on_same_street,
            "day": self._on_same_day,
        }
        known = [link for link in makers if link in self.shape.links and self._reading.last(link)]
        if not known:
            return []
        picked = self.rng.sample(known, min(len(known), self.rng.choice((1, 1, 2, 2, 3))))
        sentences: list[Sentence] = []
        for link in sorted(picked, key=list(makers).index):
            for _ in range(self.rng.choice((1, 1, 2))):
                if sentence := makers[link]():
                    sentences.append(sentence)
                    self._reading.read(sentence, self._place)
        return sentences

    def _about_person(self) -> Sentence | None:
        person = self.rng.choice(self._people)
        return self._statement(self._relations, person, person, Reference("person", person), names=True)

    def _about_same_person(self) -> Sentence | None:
        if not (last := self._reading.last("person")):
            return None
        phrase = self.rng.choice(SAME_SUBJECT["person"])
        return self._statement(self._relations, last[0], phrase, Reference("person"))

    def _about_shop(self) -> Sentence | None:
        shop = self.rng.choice(self._shops)
        return self._statement(SHOP_RELATIONS, shop, f"the {shop}", Reference("shop", shop), names=True)

    def _about_same_shop(self) -> Sentence | None:
        if not (last := self._reading.last("shop")):
            return None
        phrase = self.rng.choice(SAME_SUBJECT["shop"])
        return self._statement(SHOP_RELATIONS, last[0], phrase, Reference("shop"))

    def _about_nickname(self) -> Sentence | None:
        if not self._reading.nicknames:
            return None
        nickname = self.rng.choice(list(self._reading.nicknames))
        person = self._reading.nicknames[nickname][0]
        reference = Reference("nickname", nickname)
        return self._statement(self._relations, person, f"the {nickname}", reference, names=True)

    def _statement(
        self,
        relations: list[Relation] | tuple[Relation, ...],
        key: str,
        phrase: str,
        subject: Reference,
        names: bool = False,
    ) -> Sentence | None:
        """One more thing about `key`, who is called `phrase` here; `None` if that is told already."""
        relation = self.rng.choice(relations)
        if not self._take(key, relation):
            return None
        value = self._fresh(relation)
        text = self.rng.choice(relation.statements[: self.shape.num_wordings]).format(
            s=phrase, v=value, a=with_article(value)
        )
        named = (subject,) if names else ()
        if relation.value:
            reference = Reference(relation.value, value)
            return Sentence(sentence_case(text), (Claim(relation.name, subject, reference),), (*named, reference))
        return Sentence(sentence_case(text), (Claim(relation.name, subject, value),), named)

    def _on_street(self) -> Sentence | None:
        self._street_is_headed = False
        person = self.rng.choice(self._people)
        return self._statement(STREET_RELATIONS, person, person, Reference("person", person), names=True)

    def _street_header(self) -> Sentence:
        street = self._fresh(STREET_RELATIONS[0])
        self._street_is_headed = True
        return Sentence(self.rng.choice(STREET_HEADERS).format(v=street), (), (Reference("street", street),))

    def _on_same_street(self) -> Sentence | None:
        person, relation = self.rng.choice(self._people), self.rng.choice(STREET_RELATIONS)
        if not self._reading.last("street") or not self._take(person, relation):
            return None
        wordings = [
            wording
            for wording in relation.same_value_statements
            if self._street_is_headed or "here" not in wording.lower()
        ]
        text = self.rng.choice(wordings).format(s=person)
        subject = Reference("person", person)
        return Sentence(sentence_case(text), (Claim(relation.name, subject, Reference("street")),), (subject,))

    def _day_header(self) -> Sentence:
        day = self.rng.choice(words.DAYS)
        return Sentence(self.rng.choice(DAY_HEADERS).format(v=day), (), (Reference("day", day),))

    def _on_day(self) -> Sentence | None:
        return self._purchase(Reference("day", self.rng.choice(words.DAYS)), BOUGHT_ON.statements)

    def _on_same_day(self) -> Sentence | None:
        if not self._reading.last("day"):
            return None
        return self._purchase(Reference("day"), BOUGHT_ON.same_value_statements)

    def _purchase(self, day: Reference, wordings: tuple[str, ...]) -> Sentence | None:
        person = self.rng.choice(self._people)
        if not self._take(person, BOUGHT_ON):
            return None
        item = self._fresh_of("bought", words.ITEMS)
        text = self.rng.choice(wordings).format(s=person, v=day.name, o=with_article(item))
        subject = Reference("person", person)
        claims = (Claim("bought", subject, item), Claim("bought_on", subject, day, with_article(item)))
        return Sentence(sentence_case(text), claims, (subject, day) if day.name else (subject,))

    def _nickname(self) -> Sentence | None:
        nicknamed = {person for person, _ in self._reading.nicknames.values()}
        person = self.rng.choice(self._people)
        free = [name for name in words.NICKNAMES if name not in self._reading.nicknames]
        if person in nicknamed or not free:
            return None
        nickname = self.rng.choice(free)
        subject = Reference("person", person)
        text = self.rng.choice(NICKNAME_DEFINITIONS).format(v=person, s=f"the {nickname}")
        return Sentence(text, (Claim("nickname", Reference("nickname", nickname), subject),), (subject,))

    def _filler(self) -> Sentence:
        return Sentence(self.rng.choice(words.FILLERS))

    def _take(self, subject: str, relation: Relation) -> bool:
        """Whether this wasn't told yet; from now on it is."""
        if (subject, relation.name) in self._taken:
            return False
        self._taken.add((subject, relation.name))
        return True

    def _fresh(self, relation: Relation) -> str:
        return self._fresh_of(relation.name if relation.value != "street" else "street", relation.values)

    def _fresh_of(self, pool: str, values: tuple[str, ...]) -> str:
        """A value that nothing else has, as long as there is one."""
        left = self._pools.get(pool)
        if not left:
            left = self._pools[pool] = self.rng.sample(values, len(values))
        return left.pop()
