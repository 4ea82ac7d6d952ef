"""What can be said of a person or a shop, the sentences that say it, and how they are read.

Every relation has several wordings. In a template `{s}` is the subject, `{v}` the value, `{a}` the value with its
article, `{o}` what was bought; a follow-up says `{p}` for the subject of the question before. The subject stands
before the value, except for streets and days. A chunk's sentences hold references unresolved: "the same shop" is
the shop named last before it. `Reading` resolves them in the order given; gold answers come from it and from
nowhere else, so they hold for any selection and order of chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from kvarena.synthetic_qa import words

Category = Literal["person", "shop", "street", "day", "nickname"]


@dataclass(frozen=True)
class Relation:
    """`value` is the category of its values where they can be referred back to ("on the same street")."""

    name: str
    subject: Category
    values: tuple[str, ...]
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    followups: tuple[str, ...] = ()
    value: Category | None = None
    same_value_statements: tuple[str, ...] = ()


PERSON_RELATIONS = (
    Relation(
        "trade",
        "person",
        words.TRADES,
        ("{s} works as {a}.", "{s} is {a} by trade.", "{s} has been {a} for years.", "By trade, {s} is {a}."),
        ("What does {s} work as?", "What is {s} by trade?", "What is the trade of {s}?"),
        ("And what does {p} work as?", "And what is {p} by trade?"),
    ),
    Relation(
        "animals",
        "person",
        words.ANIMALS,
        ("{s} keeps {v}.", "{s} keeps {v} behind the house.", "{s} also keeps {v}.", "For years, {s} has kept {v}."),
        ("What does {s} keep?", "Which animals does {s} keep?"),
        ("And what does {p} keep?", "And which animals does {p} keep?"),
    ),
    Relation(
        "drink",
        "person",
        words.DRINKS,
        (
            "{s} drinks {v}.",
            "{s} drinks {v} every evening.",
            "In the morning, {s} drinks {v}.",
            "{s} likes to drink {v}.",
        ),
        ("What does {s} drink?", "What does {s} like to drink?"),
        ("And what does {p} drink?", "And what does {p} like to drink?"),
    ),
    Relation(
        "instrument",
        "person",
        words.INSTRUMENTS,
        (
            "{s} plays the {v}.",
            "{s} plays the {v} rather well.",
            "In the town band, {s} plays the {v}.",
            "{s} also plays the {v}.",
        ),
        ("What does {s} play?", "Which instrument does {s} play?"),
        ("And what does {p} play?", "And which instrument does {p} play?"),
    ),
    Relation(
        "collection",
        "person",
        words.COLLECTIONS,
        (
            "{s} collects {v}.",
            "{s} collects old {v}.",
            "{s} has collected {v} since school.",
            "As a hobby, {s} collects {v}.",
        ),
        ("What does {s} collect?", "What does {s} collect as a hobby?"),
        ("And what does {p} collect?",),
    ),
    Relation(
        "food",
        "person",
        words.FOODS,
        ("{s} loves {v}.", "{s} loves to eat {v}.", "For supper, {s} eats {v}.", "{s} often eats {v}."),
        ("What does {s} eat?", "What does {s} love to eat?"),
        ("And what does {p} eat?", "And what does {p} love to eat?"),
    ),
    Relation(
        "birthplace",
        "person",
        words.TOWNS,
        ("{s} was born in {v}.", "{s} comes from {v}.", "{s} grew up in {v}."),
        ("Where was {s} born?", "Where does {s} come from?"),
        ("And where was {p} born?", "And where does {p} come from?"),
    ),
    Relation(
        "door",
        "person",
        words.COLOURS,
        ("{s} has a {v} door.", "{s} painted the door {v}.", "The door of {s} is {v}."),
        ("What colour is the door of {s}?", "Which colour is the door of {s}?"),
    ),
)

STREET_RELATIONS = (
    Relation(
        "home",
        "person",
        words.STREETS,
        ("{s} lives on {v}.", "{s} has a house on {v}."),
        ("Where does {s} live?", "On which street does {s} live?"),
        ("And where does {p} live?",),
        value="street",
        same_value_statements=("{s} lives on the same street.", "On the same street, {s} has a house."),
    ),
    Relation(
        "room",
        "person",
        words.STREETS,
        ("{s} rents a room on {v}.", "{s} has rented a room on {v} since spring."),
        ("Where does {s} rent a room?", "On which street does {s} rent a room?"),
        ("And where does {p} rent a room?",),
        value="street",
        same_value_statements=(
            "{s} rents a room here.",
            "{s} has rented a room here since spring.",
            "On the same street, {s} rents a room.",
            "Here, {s} rents a room.",
        ),
    ),
)

BOUGHT = Relation("bought", "person", words.ITEMS, (), ("What did {s} buy?",), ("And what did {p} buy?",))
BOUGHT_ON = Relation(
    "bought_on",
    "person",
    words.DAYS,
    ("On {v}, {s} bought {o}.", "{s} bought {o} on {v}."),
    ("On which day did {s} buy {o}?", "When did {s} buy {o}?"),
    ("And when did {p} buy it?",),
    value="day",
    same_value_statements=(
        "On the same day, {s} bought {o}.",
        "{s} bought {o} that day.",
        "That day, {s} bought {o}.",
        "{s} bought {o} on the same day.",
    ),
)

SHOP_RELATIONS = (
    Relation(
        "sells",
        "shop",
        words.GOODS,
        ("{s} sells {v}.", "{s} mostly sells {v}.", "{s} is known for its {v}."),
        ("What does {s} sell?", "What can you buy at {s}?"),
        ("And what does {p} sell?",),
    ),
    Relation(
        "opens",
        "shop",
        words.HOURS,
        ("{s} opens at {v}.", "The doors of {s} open at {v}."),
        ("When does {s} open?", "At what time does {s} open?"),
        ("And when does {p} open?",),
    ),
    Relation(
        "closes",
        "shop",
        words.HOURS,
        ("{s} closes at {v}.", "The doors of {s} close at {v}."),
        ("When does {s} close?", "At what time does {s} close?"),
        ("And when does {p} close?",),
    ),
    Relation(
        "owner",
        "shop",
        words.PEOPLE,
        ("{s} belongs to {v}.", "{s} is run by {v}."),
        ("Who runs {s}?", "To whom does {s} belong?"),
        ("And who runs it?",),
        value="person",
    ),
)

NICKNAME = Relation("nickname", "nickname", words.PEOPLE, (), ("Who is {s}?",), value="person")
NICKNAME_DEFINITIONS = (
    "People call {v} {s}.",
    "{v} is known as {s}.",
    "Everybody calls {v} {s}.",
    "{v} is called {s}.",
)
STREET_HEADERS = (
    "This part is about {v}.",
    "The next few lines are about {v}.",
    "These notes are from {v}.",
    "Now to {v}.",
)
DAY_HEADERS = ("These are the notes for {v}.", "This was written on {v}.", "Now to the sales of {v}.")

SAME_SUBJECT: dict[Category, tuple[str, ...]] = {
    "person": ("the same person", "this person"),
    "shop": ("the same shop", "this shop"),
}

RELATIONS = {
    relation.name: relation
    for relation in (*PERSON_RELATIONS, *STREET_RELATIONS, BOUGHT, BOUGHT_ON, *SHOP_RELATIONS, NICKNAME)
}


@dataclass(frozen=True)
class Reference:
    """A name, or "the same" of a category where `name` is empty. The name of a nickname stands for a person."""

    category: Category
    name: str = ""


@dataclass(frozen=True)
class Claim:
    """`bought` is what a question about the day of a purchase has to mention."""

    relation: str
    subject: Reference
    value: str | Reference
    bought: str = ""


@dataclass(frozen=True)
class Sentence:
    """`names` are the things that "the same ..." means from here on, by category, in the order of the text."""

    text: str
    claims: tuple[Claim, ...] = ()
    names: tuple[Reference, ...] = ()


Chunk = tuple[Sentence, ...]


def chunk_text(chunk: Chunk) -> str:
    return " ".join(sentence.text for sentence in chunk)


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
