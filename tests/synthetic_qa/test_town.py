"""What is written of a town, and how it is read: "the same" is what was named last, whatever the chunks' order."""

from __future__ import annotations

import random
import re

import pytest

from kvarena.synthetic_qa import words
from kvarena.synthetic_qa.facts import Claim, Fact, Reference, Sentence, chunk_text, read_chunks
from kvarena.synthetic_qa.town import LINKS, TownShape, count_words, write_town
from support.towns import small_town

# --- Writing ---


def test_equal_seeds_write_equal_towns() -> None:
    assert small_town(5) == small_town(5)
    assert small_town(5) != small_town(6)


@pytest.mark.parametrize("chunk_tokens", [20, 100, 400])
def test_chunks_have_about_the_size_asked_for(chunk_tokens: int) -> None:
    sizes = [count_words(chunk_text(chunk)) for chunk in small_town(1, 20, chunk_tokens)]
    assert len(sizes) == 20
    assert all(0.7 * chunk_tokens - 1 <= size <= 1.3 * chunk_tokens + 45 for size in sizes)
    assert 0.85 * chunk_tokens <= sum(sizes) / len(sizes) <= 1.15 * chunk_tokens + 10


def test_every_seed_ends() -> None:
    for seed in range(150):
        rng = random.Random(seed)
        write_town(rng, TownShape(rng.randint(1, 6), rng.choice((8, 30, 120)), rng.randint(1, 8), rng.random(), ()))


def test_a_sentence_is_a_sentence() -> None:
    for chunk in small_town(2, 30):
        for sentence in chunk:
            assert re.fullmatch(r"[A-Z][\w, ]*\.", sentence.text), sentence.text


def test_nothing_is_told_twice() -> None:
    """Of nobody and no shop two values for the same thing, read in the order written."""
    for seed in range(20):
        told = [(fact.subject, fact.relation) for fact in read_chunks(small_town(seed)).facts]
        assert len(told) == len(set(told))


def test_links_can_be_left_out() -> None:
    town = write_town(random.Random(3), TownShape(8, 80, links=("person",)))
    categories = {reference.category for chunk in town for sentence in chunk for reference in sentence.names}
    assert categories == {"person"}


def test_values_tell_what_they_are_values_of() -> None:
    pools = [words.TRADES, words.ANIMALS, words.DRINKS, words.INSTRUMENTS, words.COLLECTIONS, words.FOODS, words.TOWNS]
    pools += [words.COLOURS, words.GOODS, words.HOURS, words.STREETS, words.DAYS, words.PEOPLE, words.ITEMS]
    pools += [words.NICKNAMES, words.SHOPS]
    assert len({word for pool in pools for word in pool}) == sum(map(len, pools))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_chunks": 0}, "at least 1 chunk"),
        ({"num_relations": 99}, "num_relations must be 1 to 8, not 99"),
        ({"links": ("cousin",)}, f"links must be of {', '.join(LINKS)}, not cousin"),
    ],
)
def test_bad_shapes_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        TownShape(**({"num_chunks": 3, "chunk_tokens": 50} | settings))  # type: ignore[arg-type]


# --- Reading ---


BRUNO, VERA = Reference("person", "Bruno"), Reference("person", "Vera")
BEES = Sentence("Bruno keeps bees.", (Claim("animals", BRUNO, "bees"),), (BRUNO,))
TEA = Sentence("Vera drinks tea.", (Claim("drink", VERA, "tea"),), (VERA,))
LUTE = Sentence("The same person plays the lute.", (Claim("instrument", Reference("person"), "lute"),))
IBIS = Sentence(
    "People call Bruno the Ibis.", (Claim("nickname", Reference("nickname", "Ibis"), BRUNO),), (BRUNO,)
)  # fmt: skip
WEAVER = Sentence(
    "The Ibis is a weaver.",
    (Claim("trade", Reference("nickname", "Ibis"), "weaver"),),
    (Reference("nickname", "Ibis"),),
)
ELMGATE = Sentence("Now to Elmgate.", (), (Reference("street", "Elmgate"),))
ROOM = Sentence("Vera rents a room here.", (Claim("room", VERA, Reference("street")),), (VERA,))


def test_the_same_person_is_the_one_named_last() -> None:
    assert read_chunks([(TEA, BEES), (LUTE,)]).facts[-1] == Fact(BRUNO, "instrument", "lute", (0, 1), "person")
    assert read_chunks([(BEES, TEA), (LUTE,)]).facts[-1] == Fact(VERA, "instrument", "lute", (0, 1), "person")
    assert read_chunks([(BEES, LUTE)]).facts[-1].chunks == (0,)


def test_without_an_earlier_chunk_nobody_knows() -> None:
    assert read_chunks([(LUTE,), (BEES,)]).facts == [Fact(BRUNO, "animals", "bees", (1,))]
    assert read_chunks([(ROOM,)]).facts == []
    assert read_chunks([(WEAVER,), (IBIS,)]).facts == [Fact(Reference("nickname", "Ibis"), "nickname", "Bruno", (1,))]


def test_a_nickname_stands_for_a_person() -> None:
    facts = read_chunks([(IBIS,), (TEA,), (WEAVER,)]).facts
    assert facts[-1] == Fact(BRUNO, "trade", "weaver", (0, 2), "nickname")


def test_behind_a_nickname_the_same_person_is_unclear() -> None:
    assert len(read_chunks([(IBIS, WEAVER), (LUTE,)]).facts) == 2


def test_here_is_the_street_named_last() -> None:
    assert read_chunks([(ELMGATE, BEES), (TEA,), (ROOM,)]).facts[-1] == Fact(VERA, "room", "Elmgate", (0, 2), "street")
