"""What can be said of a person or a shop, and asked: several wordings each.

In a template `{s}` is the subject, `{v}` the value, `{a}` the value with its article, `{o}` what was bought. A
follow-up says `{p}` for the subject of the question before. The subject stands before the value, but for streets and
days.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kvarena.worlds import words

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
